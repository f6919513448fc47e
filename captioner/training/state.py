"""What a training run has learnt so far, in memory and as a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from captioner.artifacts.model_directory import pack_weights, unpack_weights
from captioner.config import LearningConfig
from captioner.training.data import Done
from captioner.training.history import EpochRecord, best_epoch, read_history
from captioner.training.steps import ParameterGroup, Schedule, build_optimizer

LAST, BEST, STATE, HISTORY = "last.safetensors", "best.safetensors", "state.pt", "history.json"


@dataclass
class EpochSoFar:
    """What has happened of an epoch that is not over."""

    done: list[Done] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)
    """By worker: its sums over target tokens, of the loss and of those that were the most probable."""
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.done)

    def sums_of(self, rank: int, workers: int) -> Tensor:
        """What a worker goes on with, float64 [2]: its own sums, so that a run ends equal to the bit; of a run with
        another number of workers the first has all."""
        if len(self.sums) == workers:
            return torch.tensor(self.sums[rank], dtype=torch.float64)
        every = self.sums if rank == 0 else []
        return torch.tensor([[0.0, 0.0], *every], dtype=torch.float64).sum(dim=0)


def after_steps(done: Sequence[Done], steps: int, workers: int) -> list[Done]:
    """What is over of an epoch after some more steps."""
    if done and done[-1].workers == workers:
        return [*done[:-1], Done(done[-1].steps + steps, workers)]
    return [*done, Done(steps, workers)]


class _Ema(AveragedModel):
    """The exponential moving average of a model."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """As torch's, which copies its count to the model's device every time and waits for that."""
        own, new = list(self.module.parameters()), list(model.parameters())
        if self.n_averaged:
            self.average(own, new, None)
        else:
            for mine, theirs in zip(own, new, strict=True):
                mine.copy_(theirs)
        self.n_averaged += 1


class TrainingState:
    """The network in training with its EMA, optimizer, schedule and history: everything that a checkpoint holds."""

    def __init__(
        self,
        network: nn.Module,
        config: LearningConfig,
        steps_per_epoch: int,
        groups: Sequence[ParameterGroup] | None = None,
    ):
        """
        Args:
            network: on the device it is trained on.
            groups: the parameters that learn; None: all, at one pace.
        """
        self.network = network
        self.ema: AveragedModel | None = None
        if config.ema_decay:
            self.ema = _Ema(network, config.ema_decay)
            # A copy's weights lie apart in memory, and cuDNN would put them together at every call.
            for part in self.ema.modules():
                if isinstance(part, nn.RNNBase):
                    part.flatten_parameters()
        self.optimizer = build_optimizer(config.rule, network, groups)
        self.steps_per_epoch = steps_per_epoch
        self.schedule = Schedule(config.rule, config.epochs * steps_per_epoch)
        self.history: list[EpochRecord] = []
        self.best: bytes | None = None
        self.epoch = EpochSoFar()

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and published: the EMA of the one in training, or that one itself."""
        return self.network if self.ema is None else self.ema.module

    def before_step(self, epochs_done: float) -> float:
        """Set the learning rate of the next step and return it."""
        rate = self.schedule.rate(epochs_done * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("pace", 1.0)
        return rate

    def after_step(self) -> None:
        """Every worker has the same weights after a step, and so the same EMA."""
        if self.ema is not None:
            self.ema.update_parameters(self.network)

    def after_epoch(self, record: EpochRecord) -> bool:
        """Add an epoch to the history; returns whether it is the best so far, whose weights are kept."""
        self.history.append(record)
        self.epoch = EpochSoFar()
        improved = best_epoch(self.history) is record
        if improved:
            self.best = pack_weights(self.judged)
        self.schedule.after_epoch(improved)
        return improved

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        (folder / LAST).write_bytes(pack_weights(self.network))
        if self.best is not None:
            (folder / BEST).write_bytes(self.best)
        (folder / HISTORY).write_text(json.dumps([epoch.model_dump() for epoch in self.history]))
        schedule = {"factor": self.schedule.factor, "waited": self.schedule.waited}
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule,
            "epoch": asdict(self.epoch),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        torch.save(state, folder / STATE)

    def restore(self, folder: Path) -> None:
        """Continue from what ``save`` wrote under the same configuration."""
        unpack_weights(self.network, (folder / LAST).read_bytes(), LAST)
        device = next(self.network.parameters()).device
        state = torch.load(folder / STATE, map_location=device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.schedule.factor = state["schedule"]["factor"]
        self.schedule.waited = state["schedule"]["waited"]
        self.history = read_history((folder / HISTORY).read_text())
        self.best = (folder / BEST).read_bytes() if self.history else None
        self.epoch = EpochSoFar(**state["epoch"])
        self.epoch.done = [Done(**part) for part in state["epoch"]["done"]]
