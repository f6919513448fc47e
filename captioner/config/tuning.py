"""Settings of the search for hyperparameters."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from captioner.config.parts import (
    DecoderKind,
    JobConfig,
    Positive,
    Restart,
    Seed,
    TextConfig,
    Track,
    check_gpu_share,
)


class TuneConfig(JobConfig):
    """Search hyperparameters with Ray Tune: many trainings, the worst stopped early by ASHA."""

    features: str
    """Feature store (path or URI)."""
    output: str
    """Directory of the search (path or URI): the best trial's model in model/, trials.parquet, trials.png."""
    space: Literal["notebook", "wide"] = "notebook"
    """notebook: the notebook's grid, width {128, 256, 512} x optimizer {adam, rmsprop}. wide: samples of decoder
    kind, picture layers, ensemble size, width, optimizer, learning rate, dropout, label smoothing, batch, weight decay
    and EMA decay."""
    decoders: Annotated[tuple[DecoderKind, ...], Field(min_length=1)] | None = None
    """Kinds of decoder in the wide space; default: all that the features have the columns for."""
    num_samples: Positive = 12
    """Trials of the wide space; the notebook's grid always has 6."""
    max_epochs: Positive = 10
    """Most epochs of one trial."""
    time_budget: Annotated[float, Field(gt=0.0)] | None = None
    """Minutes that trials may run, all runs of the command together; then the best so far is published."""
    max_concurrent: Positive | None = None
    """Trials at a time; default: as many as the cluster has CPUs or, with GPUs, shares of --gpus-per-trial for. The
    others queue."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: after 1, 3, 9 ... epochs only the best third of the trials goes on. none: every trial runs to its end."""
    grace_epochs: Positive = 1
    """asha: epochs before a trial may be stopped."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha: one of so many trials goes on at each step."""
    metric: Literal["validation_loss", "cider"] = "validation_loss"
    """What trials are judged by. cider captions the validation images greedily after every epoch, which takes time."""
    text: TextConfig = TextConfig()
    workers_per_trial: Positive = 1
    """Data-parallel workers of one trial, each with one GPU where the cluster has any."""
    gpus_per_trial: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a GPU for one trial, where the cluster has any; below 1 trials of one worker share GPUs."""
    trial_retries: Annotated[int, Field(ge=0)] = 2
    """How often a trial is tried again that failed for another reason than its loss, which may pass: a store out of
    reach, a process out of memory. Each command tries anew."""
    seed: Seed = 0
    """Seed of the samples and of every trial."""
    track: Track = None
    restart: Restart = False

    @model_validator(mode="after")
    def _notebook_has_its_own(self) -> "TuneConfig":
        if self.decoders is not None and self.space == "notebook":
            raise ValueError("decoders: the notebook's space has its own; give space wide")
        return self

    @model_validator(mode="after")
    def _workers_do_not_share_gpus(self) -> "TuneConfig":
        check_gpu_share("gpus_per_trial", self.gpus_per_trial, self.workers_per_trial)
        return self
