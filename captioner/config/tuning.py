"""Settings of the search for hyperparameters."""

from typing import Annotated, Literal

from pydantic import Field

from captioner.config.parts import Config, Positive, Restart, Seed, TextConfig


class TuneConfig(Config):
    """Search hyperparameters with Ray Tune: many trainings, the worst stopped early by ASHA."""

    features: str
    """Feature store (path or URI)."""
    output: str
    """Directory of the search (path or URI): the best trial's model in model/, trials.parquet, trials.png."""
    space: Literal["notebook", "wide"] = "notebook"
    """notebook: the notebook's grid, width {128, 256, 512} x optimizer {adam, rmsprop}. wide: samples of decoder kind,
    width, optimizer, learning rate, dropout, label smoothing, batch and weight decay."""
    num_samples: Positive = 12
    """Trials of the wide space; the notebook's grid always has 6."""
    max_epochs: Positive = 10
    """Most epochs of one trial."""
    max_concurrent: Positive | None = None
    """Trials at a time; default: one for every CPU, or every --gpus-per-trial of the GPUs. The others queue."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: after 1, 3, 9 ... epochs only the best third of the trials goes on. none: every trial runs to its end."""
    grace_epochs: Positive = 1
    """asha: epochs before a trial may be stopped."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha: one of so many trials goes on at each step."""
    metric: Literal["validation_loss", "cider"] = "validation_loss"
    """What trials are judged by. cider captions the validation images greedily after every epoch, which takes time."""
    text: TextConfig = TextConfig()
    gpus_per_trial: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a GPU for one trial, where the cluster has any."""
    seed: Seed = 0
    """Seed of the samples and of every trial."""
    restart: Restart = False
