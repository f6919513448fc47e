"""What a search tries: every trial's hyperparameters are known before it starts, so a resumed search has the same."""

from typing import Any

import numpy as np

from captioner import notebook
from captioner.config import DECODER_KINDS, DecoderConfig, OptimizerConfig, TrainConfig, TuneConfig
from captioner.decoders import decoder_class

Hyperparameters = dict[str, str | int | float]

# Kinds of decoder with blocks over the grid's cells.
_PICTURE_LAYERS = ("adaptive_attention", "transformer")


def draw_trials(config: TuneConfig, *, grid: bool) -> list[Hyperparameters]:
    """The hyperparameters of every trial, in order.

    Args:
        grid: whether the store holds the grid, which most of the wide space's decoders read. Those that
            ``config.decoders`` names are drawn without it, too.
    """
    if config.space == "notebook":
        return [dict(trial) for trial in notebook.SEARCH_SPACE]
    generator = np.random.default_rng(config.seed)
    kinds = config.decoders or tuple(
        kind for kind in DECODER_KINDS if grid or "grid" not in decoder_class(kind).columns
    )

    def choose(*values: Any) -> Any:
        return values[int(generator.integers(len(values)))]

    def draw() -> Hyperparameters:
        kind = choose(*kinds)
        pictures = choose(0, 1, 2)
        return {
            "decoder": kind,
            "picture_layers": pictures if kind in _PICTURE_LAYERS else 0,
            "ensemble_size": choose(1, 1, 2, 3),
            "width": choose(128, 256, 512),
            "optimizer": choose("adam", "adamw", "rmsprop"),
            "learning_rate": float(f"{10 ** generator.uniform(-3.7, -2.5):.2g}"),
            "dropout": choose(0.2, 0.3, 0.4, 0.5),
            "label_smoothing": choose(0.0, 0.05, 0.1),
            "global_batch": choose(32, 64, 128),
            "weight_decay": choose(0.0, 1e-5, 1e-4),
            "ema_decay": choose(0.0, 0.99, 0.995),
        }

    return [draw() for _ in range(config.num_samples)]


def training_of(
    config: TuneConfig, trial: Hyperparameters, output: str, *, threads: int
) -> TrainConfig:
    """The training run of one trial."""
    return TrainConfig(
        features=config.features,
        output=output,
        decoder=DecoderConfig.model_validate(
            {
                "kind": trial["decoder"],
                "width": trial["width"],
                "dropout": trial["dropout"],
                "picture_layers": trial.get("picture_layers", 0),
                "ensemble_size": trial.get("ensemble_size", 1),
                # As in the preset notebook_merge.
                "standardize": "whole" if config.space == "notebook" else "channels",
            }
        ),
        text=config.text,
        optimizer=OptimizerConfig.model_validate(
            {
                "name": trial["optimizer"],
                "learning_rate": trial.get("learning_rate", 1e-3),
                "weight_decay": trial.get("weight_decay", 0.0),
                # The notebook clipped nothing.
                "clip_norm": None if config.space == "notebook" else 5.0,
            }
        ),
        epochs=config.max_epochs,
        global_batch=int(trial.get("global_batch", 64)),
        label_smoothing=float(trial.get("label_smoothing", 0.0)),
        ema_decay=float(trial.get("ema_decay", 0.0)),
        patience=None,
        validation_cider=config.metric == "cider",
        num_workers=config.workers_per_trial,
        gpus_per_worker=config.gpus_per_trial,
        threads_per_worker=threads,
        seed=config.seed,
    )
