"""What is found of each image of a split: its caption, where the decoder looked, sums under teacher forcing."""

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import torch

from captioner.captioning.captioner import Caption, Captioner, DecoderCaptioner
from captioner.config import DecodeConfig
from captioner.decoders.base import Features
from captioner.text import clean
from captioner.training.steps import teacher_forcing

SCORED = pa.schema(
    [
        pa.field("caption", pa.string()),
        pa.field("log_prob", pa.float32()),
        # The words and, for each, its weights over the grid's rows and columns; null for images that are not drawn.
        pa.field("words", pa.list_(pa.string())),
        pa.field("attention", pa.list_(pa.list_(pa.list_(pa.float32())))),
        # The sums over a batch's references under teacher forcing travel on its first row; null of a model without it.
        pa.field("loss_sum", pa.float64()),
        pa.field("correct", pa.int64()),
        pa.field("targets", pa.int64()),
    ]
)


def scored(
    found: Sequence[Caption],
    drawn: Sequence[bool],
    sums: tuple[float, int, int] | None = None,
) -> pa.Table:
    """Columns of ``SCORED`` for the images of a batch.

    Args:
        drawn: of each image, whether its attention is wanted.
        sums: cross-entropy, right target tokens and target tokens over all references of the batch.
    """
    looked = [one.attention if wanted else None for one, wanted in zip(found, drawn, strict=True)]
    others = len(found) - 1
    loss, correct, targets = (None,) * 3 if sums is None else sums
    return pa.table(
        {
            "caption": [one.text for one in found],
            "log_prob": [one.log_prob for one in found],
            "words": [
                None if weights is None else one.words
                for one, weights in zip(found, looked, strict=True)
            ],
            "attention": [None if weights is None else weights.tolist() for weights in looked],
            "loss_sum": [loss] + [None if loss is None else 0.0] * others,
            "correct": [correct] + [None if correct is None else 0] * others,
            "targets": [targets] + [None if targets is None else 0] * others,
        },
        SCORED,
    )


def score_encoded(
    captioner: Captioner[Any],
    encoded: Any,
    references: Sequence[Sequence[str]],
    drawn: Collection[bool],
    decode: DecodeConfig,
) -> pa.Table:
    """``score_features`` of what any model makes of pictures: without sums where it predicts no words of ours."""
    if isinstance(captioner, DecoderCaptioner):
        return score_features(captioner, encoded, references, drawn, decode)
    return scored(captioner.caption_features(encoded, decode), list(drawn))


def score_features(
    captioner: DecoderCaptioner,
    features: Features,
    references: Sequence[Sequence[str]],
    drawn: Collection[bool],
    decode: DecodeConfig,
) -> pa.Table:
    """Caption images and compare their references with the model's next words: columns of ``SCORED``.

    Args:
        features: of at least one image, float32.
        references: raw captions of each image.
        drawn: of each image, whether its attention is wanted.
    """
    model = captioner.model
    features = {name: column.to(captioner.device) for name, column in features.items()}
    found = captioner.caption_features(features, decode)
    image = torch.tensor([row for row, texts in enumerate(references) for _ in texts])
    text = model.record.text
    tokens = [
        model.vocabulary.encode(clean(caption, text.rules), text.max_length)
        for captions in references
        for caption in captions
    ]
    sums = teacher_forcing(model.decoder, features, image, tokens)
    return scored(found, list(drawn), sums)
