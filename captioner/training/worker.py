"""What every Ray Train worker runs: epochs over its share of each global batch, a checkpoint after each."""

import logging
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import TrainConfig
from captioner.decoders import build_decoder
from captioner.errors import TrainingError
from captioner.runtime.device import choose_compute, memory_bytes, prepare_device
from captioner.runtime.progress import TrainingGauges
from captioner.text import Vocabulary
from captioner.training.data import on_device, units_to_learn
from captioner.training.history import EpochRecord, Interval, Stopwatch, epoch_line, finished
from captioner.training.ingest import fit_standardize, open_split
from captioner.training.references import References
from captioner.training.self_critical import SelfCritical
from captioner.training.start import load_weights
from captioner.training.state import EpochSoFar, TrainingState, after_steps
from captioner.training.steps import TeacherForcing, check_compute, require_finite, train_step
from captioner.training.validation import GreedyCider

# Between two lines about the same epoch.
_TELL_SECONDS = 1.0
# Between two questions whether a checkpoint is due.
_AGREE_STEPS = 10


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
        # All workers stop here together: the loss is the sum over all of them.
        return str(error)
    return None


class Worker:
    """One data-parallel worker: its data, its replica of the decoder, and the state that a restart needs."""

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, messages: Any):
        # Ray Train tells of every report under a name outside ray.train; ours is one line per epoch.
        logging.getLogger().setLevel(logging.WARNING)
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
        check_compute(self.device, self.compute)
        store = FeatureStore.open(config.features)
        torch.manual_seed(config.seed)
        self.decoder = build_decoder(
            config.decoder, len(vocabulary), store.manifest.encoder.spec.shape
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
                memory=memory_bytes(),
            )
            for split in ("train", "validation")
        )
        if config.init is None:
            fit_standardize(self.decoder, self.train, whole=config.decoder.standardize == "whole")
        else:
            load_weights(self.decoder, config.init, vocabulary, store.manifest.encoder.spec.shape)
        self.model = ray.train.torch.prepare_model(
            self.objective(),
            parallel_strategy_kwargs={
                # Gradients lie where they are exchanged, in buckets of the order in which they come to be.
                "gradient_as_bucket_view": True,
                # The same weights take part in every step; but with parts, which exchange nothing, torch cannot tell.
                "static_graph": config.gradient_accumulation == 1,
            },
        )
        units, batch = units_to_learn(self.train.data, config)
        self.state = TrainingState(self.decoder, config, -(-int((units >= 0).sum()) // batch))
        self.cider: GreedyCider | None = None
        if config.scores_captions:
            self.cider = GreedyCider(self.validation.data, config.decode.max_length)
        self.gauges = TrainingGauges(config.output) if self.rank == 0 else None
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self.state.restore(Path(folder))

    def objective(self) -> nn.Module:
        """What is trained: whatever returns a summed loss and another sum for features, tokens and images."""
        config = self.config
        if config.objective == "cross_entropy":
            return TeacherForcing(self.decoder, config.label_smoothing)
        references = References(self.train.data)
        return SelfCritical(self.decoder, references, config.samples, config.decode.max_length)

    def run(self) -> None:
        """Train until the epochs or the patience are over, with a checkpoint after every epoch and within long ones."""
        with self.gauges or nullcontext():
            while not finished(self.state.history, self.config):
                record = self.epoch(len(self.state.history))
                improved = self.state.after_epoch(record)
                self.tell(epoch_line(self.state.history, self.config, improved=improved))
                metrics = record.model_dump()
                if self.gauges is not None:
                    self.gauges.set(metrics)
                self.report(metrics)

    def epoch(self, epoch: int) -> EpochRecord:
        """One pass over the train captions, or what is left of it, and its validation."""
        self.model.train()
        so_far = self.state.epoch
        batches, first = self.train.epoch(epoch, so_far.done), so_far.steps
        total = first + len(batches)
        # Added up where they come to be: to see one, a GPU would have to be waited for.
        sums = so_far.sums_of(self.rank, self.workers).to(self.device)
        timer = Stopwatch(on_device(iter(batches), self.device), so_far.seconds, so_far.waited)
        tell, save = Interval(_TELL_SECONDS), Interval(60 * self.config.checkpoint_minutes)
        for step, batch in enumerate(timer, first):
            rate = self.state.before_step(epoch + step / total)
            loss, correct = train_step(
                self.model,
                self.state.optimizer,
                batch,
                seed=(self.config.seed, epoch, step, self.rank),
                workers=self.workers,
                config=self.config,
                compute=self.compute,
            )
            self.state.after_step()
            sums += torch.stack([loss.double(), correct.double()])
            if tell.over():
                left = int(timer.elapsed / (step + 1) * (total - step - 1))
                self.tell(
                    f"epoch {epoch + 1}/{self.config.epochs} | {step + 1:,} of {total:,} steps | "
                    f"{left // 60}:{left % 60:02d} left",
                    passing=True,
                )
            if step + 1 < total and self.agree(step, save):
                self.state.epoch = EpochSoFar(
                    after_steps(so_far.done, step + 1 - first, self.workers),
                    self.gather(sums),
                    timer.elapsed,
                    timer.waited,
                )
                self.report({})
        learnt = self.figures(self.reduce(sums), epoch, timer.seconds)
        validation_loss, validation_accuracy = self.validate()
        require_finite(validation_loss, epoch, "validation")
        return EpochRecord(
            epoch=epoch + 1,
            **learnt,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            validation_cider=None if self.cider is None else self.validation_cider(self.cider),
            learning_rate=rate,
            seconds=timer.seconds,
            data_wait_fraction=timer.waited / timer.seconds,
        )

    def figures(self, sums: Tensor, epoch: int, seconds: float) -> dict[str, Any]:
        """Of an epoch's record what its objective decides, from the sums of all workers."""
        loss, other = sums.tolist()
        require_finite(loss, epoch, "training")
        data = self.train.data
        if self.config.objective == "cross_entropy":
            return {
                "train_loss": loss / data.targets,
                "train_accuracy": other / data.targets,
                "captions_per_second": len(data) / seconds,
            }
        images = len(units_to_learn(data, self.config)[0])
        return {
            "train_loss": None,
            "train_accuracy": None,
            "train_cider": other / images,
            "captions_per_second": images * self.config.samples / seconds,
        }

    def agree(self, step: int, interval: Interval) -> bool:
        """Whether the first worker's interval is over; the others, whose clocks differ, are asked for every few steps,
        for it takes an exchange."""
        if self.workers == 1:
            return interval.over()
        if step % _AGREE_STEPS:
            return False
        return bool(self.reduce(torch.tensor([float(self.rank == 0 and interval.over())])))

    @torch.inference_mode()
    def validate(self) -> tuple[float, float]:
        """Loss and accuracy over the whole validation split: every caption once, over all workers."""
        forcing = TeacherForcing(self.state.judged).eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in on_device(iter(self.validation.ordered()), self.device):
            # In float32 whatever training computes in: bfloat16 ties words that are not equally probable, and these
            # figures must be those that evaluation finds.
            loss, correct = forcing(batch.features, batch.tokens)
            sums += torch.stack([loss.double(), correct.double()])
        loss, accuracy = (self.reduce(sums) / self.validation.data.targets).tolist()
        return loss, accuracy

    def validation_cider(self, cider: GreedyCider) -> float:
        """Mean CIDEr-D of greedy captions of the validation images."""
        decoder = self.state.judged.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        images_at_once = self.validation.ordered(images=self.config.global_batch)
        for batch in on_device(iter(images_at_once), self.device):
            sums += cider.sums(decoder, batch)
        total, images = self.reduce(sums).tolist()
        return float(total / images)

    def tell(self, line: str, *, passing: bool = False) -> None:
        """Progress, from the first worker alone."""
        if self.rank == 0 and self.messages is not None:
            (self.messages.put_passing if passing else self.messages.put).remote(line)

    def reduce(self, sums: Tensor) -> Tensor:
        """Sum over the workers, on the CPU."""
        there = sums.to(self.device)
        if self.workers > 1:
            dist.all_reduce(there)
        return there.cpu()

    def gather(self, sums: Tensor) -> list[list[float]]:
        """The sums of every worker."""
        found = [sums.to(self.device)]
        if self.workers > 1:
            found = [torch.empty_like(found[0]) for _ in range(self.workers)]
            dist.all_gather(found, sums.to(self.device))
        return [each.tolist() for each in found]

    def report(self, metrics: dict[str, Any]) -> None:
        """Every worker reports, as Ray Train's barrier wants; the first attaches the checkpoint.

        Args:
            metrics: of an epoch; none within one.
        """
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.state.save(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)
