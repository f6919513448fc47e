"""What every Ray Train worker runs: epochs over its share of each global batch, a checkpoint after each."""

import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from captioner.config import LearningConfig
from captioner.decoders.base import Decoder, Features
from captioner.errors import TrainingError
from captioner.runtime.device import choose_compute, prepare_device
from captioner.runtime.progress import TrainingGauges
from captioner.training.data import Batch, on_device
from captioner.training.history import EpochRecord, Interval, Stopwatch, epoch_line, finished
from captioner.training.ingest import Passes
from captioner.training.state import EpochSoFar, TrainingState, after_steps
from captioner.training.steps import (
    ParameterGroup,
    TeacherForcing,
    check_compute,
    require_finite,
    train_step,
)
from captioner.training.validation import GreedyCider

# Between two lines about the same epoch.
_TELL_SECONDS = 1.0
# Between two questions whether a checkpoint is due.
_AGREE_STEPS = 10


@dataclass(frozen=True)
class Learner:
    """What a worker trains, and on what."""

    network: nn.Module
    """What a checkpoint keeps; on the CPU."""
    objective: nn.Module
    """What DDP wraps: gives a summed loss and another sum for columns, tokens and images."""
    train: Passes
    validation: Passes
    steps: int
    """Of an epoch."""
    longest: int
    """Words of a greedy caption at most."""
    groups: Sequence[ParameterGroup] | None = None
    """The parameters that learn; None: all, at one pace."""


def run_worker(worker: "Callable[[], Worker]") -> str | None:
    """Make a worker and let it train.

    Returns:
        why training had to stop before its end, else None. It is not raised, because Ray Train would then restart the
        workers, only for them to come to the same point again.
    """
    made = worker()
    try:
        made.run()
    except TrainingError as error:
        # All workers stop here together: the loss is the sum over all of them.
        return str(error)
    return None


class Worker(ABC):
    """One data-parallel worker: its data, its replica of the network, and the state that a restart needs."""

    def __init__(self, config: LearningConfig, messages: Any):
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
        torch.manual_seed(config.seed)
        learner = self.prepare()
        self.train, self.validation = learner.train, learner.validation
        self.model = ray.train.torch.prepare_model(
            learner.objective,
            parallel_strategy_kwargs={
                # Gradients lie where they are exchanged, in buckets of the order in which they come to be.
                "gradient_as_bucket_view": True,
                # The same weights take part in every step; but with parts, which exchange nothing, torch cannot tell.
                "static_graph": config.gradient_accumulation == 1,
            },
        )
        self.state = TrainingState(learner.network, config, learner.steps, learner.groups)
        self.cider: GreedyCider | None = None
        if config.scores_captions:
            self.cider = GreedyCider(self.validation.data, learner.longest)
        self.gauges = TrainingGauges(config.output) if self.rank == 0 else None
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self.state.restore(Path(folder))

    @abstractmethod
    def prepare(self) -> Learner:
        """What this worker trains, and on what."""

    @abstractmethod
    def judge(self) -> tuple[Decoder, Callable[[Batch], Features]]:
        """The decoder that is validated, and the features of a batch on its device."""

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
        loss, correct = sums.tolist()
        require_finite(loss, epoch, "training")
        data = self.train.data
        return {
            "train_loss": loss / data.targets,
            "train_accuracy": correct / data.targets,
            "captions_per_second": len(data) / seconds,
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
        decoder, seen = self.judge()
        forcing = TeacherForcing(decoder).eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in on_device(iter(self.validation.ordered()), self.device):
            # In float32 whatever training computes in: bfloat16 ties words that are not equally probable, and these
            # figures must be those that evaluation finds.
            loss, correct = forcing(seen(batch), batch.tokens)
            sums += torch.stack([loss.double(), correct.double()])
        loss, accuracy = (self.reduce(sums) / self.validation.data.targets).tolist()
        return loss, accuracy

    def validation_cider(self, cider: GreedyCider) -> float:
        """Mean CIDEr-D of greedy captions of the validation images."""
        decoder, seen = self.judge()
        decoder.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        images_at_once = self.validation.ordered(images=self.config.global_batch)
        for batch in on_device(iter(images_at_once), self.device):
            sums += cider.sums(decoder, replace(batch, features=seen(batch)))
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
