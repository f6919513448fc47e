"""What every Ray Train worker runs: epochs over its share of each global batch, a checkpoint after each."""

import json
import logging
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution import context as train_context
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.model_directory import pack_weights, unpack_weights
from captioner.config import TrainConfig
from captioner.decoders import build_decoder
from captioner.decoders.base import Decoder, Features, Standardize
from captioner.errors import TrainingError
from captioner.runtime.device import choose_compute, memory_bytes, prepare_device
from captioner.runtime.progress import TrainingGauges
from captioner.text import Vocabulary
from captioner.training.history import EpochRecord, Stopwatch, best_epoch, epoch_line, read_history
from captioner.training.ingest import open_split
from captioner.training.self_critical import Critic, Drawing, self_critical_step
from captioner.training.steps import (
    Schedule,
    TeacherForcing,
    build_optimizer,
    require_finite,
    train_step,
)

# Between two lines about the same epoch.
_TELL_SECONDS = 20.0

LAST, BEST, STATE, HISTORY = "last.safetensors", "best.safetensors", "state.pt", "history.json"


def train_worker(arguments: dict[str, Any]) -> str | None:
    """Ray Train's per-worker function.

    Args:
        arguments: ``config`` (TrainConfig as JSON), ``vocabulary`` (its JSON), and ``messages``, an actor for progress
            lines or None.

    Returns:
        why training had to stop before its end, else None. It is not raised, because Ray Train would then restart the
        workers, only for them to come to the same point again.
    """
    worker = Worker(
        TrainConfig.model_validate_json(arguments["config"]),
        Vocabulary.from_json(arguments["vocabulary"]),
        arguments["messages"],
    )
    try:
        worker.run()
    except TrainingError as error:
        # All workers stop here together: the loss they judge is the sum over all of them.
        return str(error)
    return None


class Worker:
    """One data-parallel worker: its data, its replica of the decoder, and the state that a restart needs."""

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, messages: Any):
        # Ray Train's own account of every report and checkpoint; ours is one line per epoch.
        for name in (
            "ray.train",
            train_context.__file__,
        ):  # one of its modules logs under its file's name
            logging.getLogger(name).setLevel(logging.WARNING)
        context = ray.train.get_context()
        self.config, self.messages = config, messages
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        prepare_device(
            self.device.type,
            threads=config.threads_per_worker,
            processes=context.get_local_world_size(),
        )
        self.compute = choose_compute(config.compute, self.device.type)
        store = FeatureStore.open(config.features)
        torch.manual_seed(config.seed)
        self.decoder = build_decoder(
            config.decoder, len(vocabulary), store.manifest.encoder.channels
        )
        columns = self.decoder.columns
        self.train, self.validation = (
            open_split(
                store,
                split,
                columns,
                vocabulary,
                config,
                rank=self.rank,
                workers=self.workers,
                neighbours=context.get_local_world_size(),
                memory=memory_bytes(),
            )
            for split in ("train", "validation")
        )
        statistics = self.train.statistics(columns[0])
        for part in self.decoder.modules():
            if isinstance(part, Standardize):
                part.fit(*statistics, whole=config.decoder.standardize == "whole")
        self.model = ray.train.torch.prepare_model(
            TeacherForcing(self.decoder, config.label_smoothing)
        )
        self.average: AveragedModel | None = None
        if config.ema_decay:
            self.average = AveragedModel(
                self.decoder,
                multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay),  # type: ignore[no-untyped-call]
            )
            # A copy's weights lie apart in memory, and cuDNN would put them together at every call.
            for part in self.average.modules():
                if isinstance(part, nn.RNNBase):
                    part.flatten_parameters()
        self.optimizer = build_optimizer(config.optimizer, self.decoder)
        self.steps_per_epoch = -(-len(self.train.data) // config.global_batch)
        self.schedule = Schedule(config.optimizer, config.epochs * self.steps_per_epoch)
        self.gauges = TrainingGauges(config.output) if self.rank == 0 else None
        if config.validation_cider or config.self_critical.epochs:
            self.judge = Critic(self.validation.data, config.self_critical)
        self.history: list[EpochRecord] = []
        self.best: bytes | None = None
        # The optimizer of a self-critical phase that was left in its middle.
        self.restored: dict[str, Any] | None = None
        self.restore()

    def run(self) -> None:
        """Both phases, each until its epochs are over; the first also ends ``patience`` epochs after its best."""
        with self.gauges or nullcontext():
            while not self.finished("cross_entropy"):
                self.keep(self.epoch(len(self.history)))
            if self.config.self_critical.epochs:
                self.start_self_critical()
            while not self.finished("self_critical"):
                self.keep(self.self_critical_epoch(len(self.history)))

    def keep(self, record: EpochRecord) -> None:
        """Add an epoch to the history, and its weights to the checkpoint if they are the best of their phase."""
        self.history.append(record)
        improved = best_epoch(self.history) is record
        if improved:
            self.best = pack_weights(self.judged)
        self.schedule.after_epoch(improved)
        if self.rank == 0 and self.messages is not None:
            self.messages.put.remote(epoch_line(self.history, self.config, improved=improved))
        self.report(record)

    def finished(self, phase: str) -> bool:
        config = self.config
        losses = [record.validation_loss for record in self.history if record.phase == phase]
        if phase == "self_critical":
            return len(losses) >= config.self_critical.epochs
        # The second phase only ever follows a finished first one.
        if len(losses) >= config.epochs or len(losses) < len(self.history):
            return True
        stale = len(losses) - 1 - losses.index(min(losses)) if losses else 0
        return config.patience is not None and stale >= config.patience

    def epoch(self, epoch: int) -> EpochRecord:
        """One pass over the train captions under teacher forcing."""
        # Dropout of a worker depends on seed, epoch and rank alone, so a resumed run draws what an unbroken one does.
        self.reseed(epoch)
        self.model.train()
        plan = self.train.plan(epoch)
        sums = torch.zeros(2, dtype=torch.float64)
        timer = Stopwatch(self.train.batches(plan, epoch))
        for number, batch in enumerate(timer):
            rate = self.schedule.rate((epoch + number / len(plan)) * self.steps_per_epoch)
            self.set_rate(rate)
            loss, correct = train_step(
                self.model,
                self.optimizer,
                self.to_device(batch.features),
                batch.tokens.to(self.device),
                global_targets=batch.global_targets,
                workers=self.workers,
                config=self.config,
                compute=self.compute,
            )
            self.after_step()
            sums += torch.stack([loss.double(), correct.double()]).cpu()
            self.tell(epoch, number + 1, len(plan), timer)
        train_loss, train_accuracy = (self.reduce(sums) / self.train.data.words).tolist()
        require_finite(train_loss, epoch, "training")
        validation_loss, validation_accuracy = self.validate(epoch)
        return EpochRecord(
            epoch=epoch + 1,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            learning_rate=rate,
            captions_per_second=len(self.train.data) / timer.seconds,
            seconds=timer.seconds,
            data_wait_fraction=timer.waited / timer.seconds,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            validation_cider=self.validation_cider() if self.config.validation_cider else None,
        )

    def start_self_critical(self) -> None:
        """Go on from the best weights of the first phase, or from where the second was left."""
        settings = self.config.self_critical
        # In place of the first phase's, whose hooks on the gradients go with it.
        self.model = ray.train.torch.prepare_model(Drawing(self.decoder, settings))
        self.optimizer = torch.optim.AdamW(
            self.decoder.parameters(), settings.learning_rate, weight_decay=0.0, fused=True
        )
        if self.history[-1].phase == "cross_entropy":
            assert self.best is not None
            unpack_weights(self.decoder, self.best, BEST)
            if self.average is not None:
                # The average starts anew, from those weights.
                self.average.n_averaged.zero_()
        elif self.restored is not None:
            self.optimizer.load_state_dict(self.restored)
            self.restored = None
        self.critic = Critic(self.train.data, settings)

    def self_critical_epoch(self, epoch: int) -> EpochRecord:
        """One pass over the train images with captions drawn from the decoder itself."""
        self.reseed(epoch)
        settings = self.config.self_critical
        self.model.train()
        done = sum(record.phase == "self_critical" for record in self.history)
        plan = self.train.plan(epoch, images=max(1, settings.global_batch // settings.samples))
        sums = torch.zeros(3, dtype=torch.float64)
        timer = Stopwatch(self.train.batches(plan, epoch))
        for number, batch in enumerate(timer):
            progress = (done + number / len(plan)) / settings.epochs
            rate = settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
            self.set_rate(rate)
            sums += self_critical_step(
                self.model,
                self.optimizer,
                self.to_device(batch.features),
                batch,
                self.critic,
                workers=self.workers,
                clip_norm=self.config.optimizer.clip_norm,
                compute=self.compute,
            )
            self.after_step()
            self.tell(epoch, number + 1, len(plan), timer)
        reward, captions, loss = self.reduce(sums).tolist()
        require_finite(loss, epoch, "self-critical", "self-critical.learning-rate")
        validation_loss, validation_accuracy = self.validate(epoch)
        return EpochRecord(
            epoch=epoch + 1,
            phase="self_critical",
            train_loss=None,
            train_accuracy=None,
            train_reward=reward / captions,
            learning_rate=rate,
            captions_per_second=captions / timer.seconds,
            seconds=timer.seconds,
            data_wait_fraction=timer.waited / timer.seconds,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            validation_cider=self.validation_cider(),
        )

    def validation_cider(self) -> float:
        """Mean CIDEr-D of greedy captions of the validation images."""
        decoder = self.judged.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        plan = self.validation.plan(None, images=self.config.global_batch)
        for batch in self.validation.batches(plan, None):
            features = self.to_device(batch.features)
            sums += self.judge.greedy(decoder, features, self.judge.images(batch))
        total, images = self.reduce(sums).tolist()
        return float(total / images)

    def tell(self, epoch: int, done: int, steps: int, timer: Stopwatch) -> None:
        """Where a long epoch stands, now and then."""
        if self.rank != 0 or self.messages is None or not timer.tick(_TELL_SECONDS):
            return
        left = timer.elapsed / done * (steps - done)
        self.messages.put.remote(
            f"epoch {epoch + 1} | {done} of {steps} steps | {int(left // 60)}:{int(left % 60):02d} left"
        )

    @property
    def judged(self) -> Decoder:
        """The decoder that is validated and published: the one in training, or the average of its weights."""
        return self.decoder if self.average is None else cast(Decoder, self.average.module)

    def after_step(self) -> None:
        """Every worker has the same weights after a step, and so the same average."""
        if self.average is not None:
            self.average.update_parameters(self.decoder)

    def reseed(self, epoch: int) -> None:
        torch.manual_seed(hash((self.config.seed, epoch, self.rank)) % 2**63)

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def to_device(self, features: Features) -> Features:
        return {name: tensor.to(self.device) for name, tensor in features.items()}

    @torch.inference_mode()
    def validate(self, epoch: int) -> tuple[float, float]:
        """Loss and accuracy over the whole validation split: every caption once, over all workers."""
        forcing = TeacherForcing(self.judged).eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.validation.batches(self.validation.plan(None), None):
            # In float32 whatever training computes in: bfloat16 ties words that are not equally probable, and these
            # figures must be those that evaluation finds.
            loss, correct = forcing(self.to_device(batch.features), batch.tokens.to(self.device))
            sums += torch.stack([loss.double(), correct.double()]).cpu()
        loss, accuracy = (self.reduce(sums) / self.validation.data.words).tolist()
        require_finite(loss, epoch, "validation")
        return loss, accuracy

    def reduce(self, sums: Tensor) -> Tensor:
        """Sum over the workers."""
        if self.workers > 1:
            on_device = sums.to(self.device)
            dist.all_reduce(on_device)
            sums = on_device.cpu()
        return sums

    def report(self, record: EpochRecord) -> None:
        """Every worker reports, as Ray Train's barrier wants; the first attaches the checkpoint."""
        metrics = record.model_dump()
        if self.gauges is not None:
            self.gauges.set(metrics)
        if self.rank != 0:
            ray.train.report(metrics)
            return
        assert self.best is not None
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / LAST).write_bytes(pack_weights(self.decoder))
            (root / BEST).write_bytes(self.best)
            (root / HISTORY).write_text(json.dumps([epoch.model_dump() for epoch in self.history]))
            schedule = {"factor": self.schedule.factor, "waited": self.schedule.waited}
            state: dict[str, Any] = {
                "optimizer": self.optimizer.state_dict(),
                "schedule": schedule,
            }
            if self.average is not None:
                state["average"] = self.average.state_dict()
            torch.save(state, root / STATE)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)

    def restore(self) -> None:
        """Continue from the run's last checkpoint, if it has one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            root = Path(folder)
            unpack_weights(self.decoder, (root / LAST).read_bytes(), LAST)
            state = torch.load(root / STATE, map_location=self.device, weights_only=True)
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.schedule.factor = state["schedule"]["factor"]
            self.schedule.waited = state["schedule"]["waited"]
            self.history = read_history((root / HISTORY).read_text())
            self.best = (root / BEST).read_bytes()
            if self.history[-1].phase == "cross_entropy":
                self.optimizer.load_state_dict(state["optimizer"])
            else:
                self.restored = state["optimizer"]
