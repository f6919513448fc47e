"""Whole training configurations by name, one per published result; command-line flags override them."""

from collections.abc import Callable

from captioner.config import (
    DecodeConfig,
    DecoderConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
)
from captioner.notebook import notebook_attention, notebook_merge


def demo() -> TrainConfig:
    """Generated scenes: a small vocabulary, so a small and quick decoder, which looks at the grid.

    Wants features with --grid.
    """
    return TrainConfig(
        features="runs/demo/features",
        output="runs/demo/model",
        decoder=DecoderConfig(
            kind="adaptive_attention",
            width=128,
            picture_layers=1,
            heads=4,
            dropout=0.1,
            feature_dropout=0.0,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=2e-3,
            weight_decay=1e-4,
            warmup_steps=100,
            schedule="cosine",
        ),
        epochs=12,
        global_batch=80,
        patience=None,
        group_captions=True,
    )


def flickr8k_merge() -> TrainConfig:
    """The merge decoder on real photographs, tuned for its captions rather than for the comparison."""
    return TrainConfig(
        features="runs/flickr8k/features",
        output="runs/flickr8k/merge",
        decoder=DecoderConfig(kind="merge", width=512, output_width=512, dropout=0.5),
        text=TextConfig(min_count=5),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, schedule="cosine"),
        epochs=10,
        global_batch=64,
        patience=None,
    )


def flickr8k_best() -> TrainConfig:
    """Made for the best captions on Flickr8k: three decoders that look at the grid, trained side by side.

    Wants features with --grid, --mirrored and --crops 4.
    """
    return TrainConfig(
        features="runs/flickr8k/features",
        output="runs/flickr8k/best",
        decoder=DecoderConfig(
            kind="adaptive_attention",
            ensemble_size=3,
            width=512,
            picture_layers=1,
            dropout=0.3,
            feature_dropout=0.1,
            tie_embeddings=True,
        ),
        text=TextConfig(min_count=5),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1.5e-3,
            weight_decay=1e-4,
            clip_norm=1.0,
            warmup_steps=190,
            schedule="cosine",
        ),
        epochs=12,
        global_batch=160,
        patience=None,
        label_smoothing=0.1,
        ema_decay=0.995,
        group_captions=True,
        mirrored=True,
        crops=4,
        decode=DecodeConfig(beam_size=5, no_repeat_ngram=3, mbr_samples=120),
    )


def flickr30k_best() -> TrainConfig:
    """As ``flickr8k_best`` for five times the images: fewer passes over them. Not measured."""
    base = flickr8k_best()
    return base.model_copy(
        update={
            "features": "runs/flickr30k/features",
            "output": "runs/flickr30k/best",
            "optimizer": base.optimizer.model_copy(update={"warmup_steps": 900}),
            "epochs": 6,
        }
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    preset.__name__: preset
    for preset in (
        demo,
        notebook_merge,
        notebook_attention,
        flickr8k_merge,
        flickr8k_best,
        flickr30k_best,
    )
}
