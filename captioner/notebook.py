"""The notebook this project grew out of (ResNet50 features and Keras LSTMs on Flickr8k): its cleaning of captions, its
scores, its configurations and its search space. Nothing else needs them.
"""

import itertools
import warnings
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from captioner.config import DecodeConfig, DecoderConfig, OptimizerConfig, TextConfig, TrainConfig

# The characters that Keras' Tokenizer replaces by spaces by default; apostrophes and digits stay.
_KERAS_FILTERS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))
# Its weights of 1-grams to 4-grams for BLEU-1 to BLEU-4; the third row sums to .9.
_BLEU_WEIGHTS = [(1, 0, 0, 0), (0.5, 0.5, 0, 0), (0.3, 0.3, 0.3, 0), (0.25, 0.25, 0.25, 0.25)]

# Its search space. The widest first: the longest trials do not come last, and those that ASHA judges later meet a
# strong one.
SEARCH_SPACE: list[dict[str, str | int | float]] = [
    {"decoder": "merge", "width": width, "optimizer": optimizer, "dropout": 0.5}
    for width, optimizer in itertools.product((512, 256, 128), ("adam", "rmsprop"))
]


def clean_text(caption: str) -> str:
    """Its cleaning as it really ran: lower case, words of one character dropped, punctuation kept.

    It counted distinct and longest captions on this text, which its tokenizer then split further.
    """
    return " ".join(word for word in caption.lower().split() if len(word) > 1)


def tokenize(caption: str) -> list[str]:
    """Words of ``clean_text`` after Keras' Tokenizer, whose filter characters become spaces: words of one character
    come back ("t-shirt" becomes "t shirt")."""
    return clean_text(caption).translate(_KERAS_FILTERS).split()


class NotebookScores(BaseModel):
    """BLEU under its protocol, whose tags in every caption inflate each figure; fractions of 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float


def score(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, cleaned: bool
) -> NotebookScores:
    """BLEU as it computed it: nltk's ``corpus_bleu`` on captions that still hold both tags.

    References go through ``clean_text``, which leaves punctuation inside words.

    Args:
        references: raw captions of each image.
        hypotheses: the caption of each image.
        cleaned: whether the hypotheses are words of ``tokenize``, which are scored as they are; others go through
            ``clean_text``, as the references hold no word of one character.
    """
    from nltk.translate.bleu_score import corpus_bleu  # takes a second

    if not cleaned:
        hypotheses = [clean_text(text) for text in hypotheses]
    truth = [[_tagged(clean_text(text)) for text in texts] for texts in references]
    with warnings.catch_warnings():
        # nltk warns when no 4-gram matches; the score, next to 0, says it already.
        warnings.simplefilter("ignore", UserWarning)
        bleu = corpus_bleu(truth, [_tagged(text) for text in hypotheses], weights=_BLEU_WEIGHTS)
    return NotebookScores(bleu_1=bleu[0], bleu_2=bleu[1], bleu_3=bleu[2], bleu_4=bleu[3])


def _tagged(text: str) -> list[str]:
    return ["startseq", *text.split(), "endseq"]


def notebook_merge() -> TrainConfig:
    """The notebook's merge decoder with the hyperparameters its search chose (best at epoch 7 of 50)."""
    return TrainConfig(
        features="runs/flickr8k/features",
        output="runs/flickr8k/notebook_merge",
        # It fed the features as they came.
        decoder=DecoderConfig(
            kind="merge", width=256, output_width=128, dropout=0.5, standardize="whole"
        ),
        text=TextConfig(rules="notebook", min_count=1),
        optimizer=OptimizerConfig(name="adam", learning_rate=1e-3, clip_norm=None),
        epochs=50,
        global_batch=64,
        patience=5,
        decode=DecodeConfig(beam_size=1),
    )


def notebook_attention() -> TrainConfig:
    """The notebook's attention over the decoder's own words, made causal."""
    base = notebook_merge()
    decoder = base.decoder.model_copy(update={"kind": "sequence_attention"})
    return base.model_copy(
        update={"output": "runs/flickr8k/notebook_attention", "decoder": decoder}
    )
