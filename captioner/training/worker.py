"""What every Ray Train worker runs: epochs over its share of each global batch, a checkpoint after each."""

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from captioner.config import TrainConfig
from captioner.encoder import fast_bfloat16
from captioner.errors import TrainingError
from captioner.model_store import pack_weights, unpack_weights
from captioner.models import build_decoder
from captioner.schema import Record
from captioner.store import FeatureStore
from captioner.text import Vocabulary
from captioner.training.data import CaptionData, epoch_order, sequential_order
from captioner.training.steps import (
    Schedule,
    TeacherForcing,
    build_optimizer,
    require_finite,
    train_step,
)

LAST, BEST, STATE, HISTORY = "last.safetensors", "best.safetensors", "state.pt", "history.json"


class EpochRecord(Record):
    """One epoch, as in ``history.parquet``. Losses are nats per next word under teacher forcing."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    """Of the epoch's last step."""
    seconds: float
    """Training alone, validation left out."""
    captions_per_second: float
    data_wait_fraction: float
    """Share of those seconds in which the first worker waited for its batches."""


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
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        context = ray.train.get_context()
        self.config, self.messages = config, messages
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            # Ray leaves one thread per worker; share out the node's cores.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        wanted = config.compute
        auto = "bfloat16" if fast_bfloat16(self.device.type) else "float32"
        self.compute = auto if wanted == "auto" else wanted
        store = FeatureStore.open(config.features)
        torch.manual_seed(config.seed)
        self.decoder = build_decoder(
            config.decoder, len(vocabulary), store.manifest.encoder.channels
        )
        columns = self.decoder.columns
        self.train = CaptionData.load(store, "train", columns, vocabulary, config.text)
        self.validation = CaptionData.load(store, "validation", columns, vocabulary, config.text)
        self.decoder.standardize.fit(*self.train.statistics(columns[0]))
        self.model = ray.train.torch.prepare_model(
            TeacherForcing(self.decoder, config.label_smoothing)
        )
        self.optimizer = build_optimizer(config.optimizer, self.decoder)
        self.steps_per_epoch = -(-len(self.train) // config.global_batch)
        self.schedule = Schedule(config.optimizer, config.epochs * self.steps_per_epoch)
        self.history: list[EpochRecord] = []
        self.best: tuple[float, bytes] | None = None
        self.restore()

    def run(self) -> None:
        """Train until the epochs are over or the validation loss has not improved for ``patience`` epochs."""
        while not self.finished():
            record = self.epoch(len(self.history))
            self.history.append(record)
            improved = self.best is None or record.validation_loss < self.best[0]
            if improved:
                self.best = (record.validation_loss, pack_weights(self.decoder))
            self.schedule.after_epoch(improved)
            if self.rank == 0 and self.messages is not None:
                self.messages.put.remote(_line(record, self.config.epochs, improved))
            self.report(record)

    def finished(self) -> bool:
        if not self.history or len(self.history) >= self.config.epochs:
            return len(self.history) >= self.config.epochs
        losses = [record.validation_loss for record in self.history]
        stale = len(losses) - 1 - losses.index(min(losses))
        return self.config.patience is not None and stale >= self.config.patience

    def epoch(self, epoch: int) -> EpochRecord:
        # Dropout of a worker depends on seed, epoch and rank alone, so a resumed run draws what an unbroken one does.
        torch.manual_seed(hash((self.config.seed, epoch, self.rank)) % 2**63)
        order = epoch_order(self.train.lengths, self.config.global_batch, epoch, self.config.seed)
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64)
        started, waited = time.perf_counter(), 0.0
        batches = self.train.batches(order, self.rank, self.workers)
        for number in range(len(order)):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            rate = self.schedule.rate(epoch * self.steps_per_epoch + number)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, correct = train_step(
                self.model,
                self.optimizer,
                {name: tensor.to(self.device) for name, tensor in batch.features.items()},
                batch.tokens.to(self.device),
                global_targets=batch.global_targets,
                workers=self.workers,
                config=self.config,
                compute=self.compute,
            )
            sums += torch.stack([loss.double(), correct.double()]).cpu()
        seconds = time.perf_counter() - started
        words = int(self.train.lengths.sum()) - len(self.train)
        train_loss, train_accuracy = (self.reduce(sums) / words).tolist()
        require_finite(train_loss, epoch, "training")
        validation_loss, validation_accuracy = self.validate()
        require_finite(validation_loss, epoch, "validation")
        return EpochRecord(
            epoch=epoch + 1,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            learning_rate=rate,
            seconds=seconds,
            captions_per_second=len(self.train) / seconds,
            data_wait_fraction=waited / seconds,
        )

    @torch.inference_mode()
    def validate(self) -> tuple[float, float]:
        """Loss and accuracy over the whole validation split: every caption once, over all workers."""
        self.model.eval()
        unwrapped: nn.Module = getattr(self.model, "module", self.model)
        sums = torch.zeros(2, dtype=torch.float64)
        order = sequential_order(self.validation.lengths, self.config.global_batch)
        for batch in self.validation.batches(order, self.rank, self.workers):
            features = {name: tensor.to(self.device) for name, tensor in batch.features.items()}
            # In float32 whatever training computes in: bfloat16 ties words that are not equally probable, and these
            # figures must be those that evaluation finds.
            loss, correct = unwrapped(features, batch.tokens.to(self.device))
            sums += torch.stack([loss.double(), correct.double()]).cpu()
        words = int(self.validation.lengths.sum()) - len(self.validation)
        loss, accuracy = (self.reduce(sums) / words).tolist()
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
        if self.rank != 0:
            ray.train.report(metrics)
            return
        assert self.best is not None
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / LAST).write_bytes(pack_weights(self.decoder))
            (root / BEST).write_bytes(self.best[1])
            (root / HISTORY).write_text(json.dumps([epoch.model_dump() for epoch in self.history]))
            schedule = {"factor": self.schedule.factor, "waited": self.schedule.waited}
            torch.save(
                {"optimizer": self.optimizer.state_dict(), "schedule": schedule}, root / STATE
            )
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
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.factor = state["schedule"]["factor"]
            self.schedule.waited = state["schedule"]["waited"]
            self.history = read_history((root / HISTORY).read_text())
            self.best = (
                min(record.validation_loss for record in self.history),
                (root / BEST).read_bytes(),
            )


def read_history(text: str) -> list[EpochRecord]:
    """Parse a checkpoint's history."""
    return [EpochRecord.model_validate(epoch) for epoch in json.loads(text)]


def _line(record: EpochRecord, epochs: int, improved: bool) -> str:
    return (
        f"epoch {record.epoch}/{epochs} | train loss {record.train_loss:.4f} | "
        f"validation loss {record.validation_loss:.4f}{' *' if improved else ''} | "
        f"validation accuracy {record.validation_accuracy:.4f} | "
        f"{record.captions_per_second:,.0f} captions/s | {record.seconds:.0f} s"
    )
