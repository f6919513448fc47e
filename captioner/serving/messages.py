"""What clients send and get: plain data, importable without torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from captioner.config import DecodeConfig, DecodeOverrides
from captioner.config.decoding import optional


class Message(BaseModel):
    """Base: immutable; a docstring under a field is its description in the OpenAPI document."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@optional(DecodeConfig)
class CaptionParameters(Message):
    """What a request may ask for; what it leaves out is as the model's card says."""

    model: Annotated[str | None, Field(examples=[None])] = None
    """Name of the model, as /v1/models lists them; default: its first."""
    attention: bool = False
    """Also return where the model looked for each word; null from models that look at no places."""

    def decode(self, default: DecodeConfig) -> DecodeConfig:
        """The search asked for. One of beam_size and num_captions given alone moves the other where it must.

        Raises:
            ValidationError: num_captions is larger than beam_size, both given.
        """
        return DecodeOverrides(**self.model_dump(exclude={"model", "attention"})).over(default)


class WordAttention(Message):
    """Where the model looked while it wrote a word."""

    word: str
    weights: list[list[float]]
    """Over the cells of a grid laid on the image: rows from top to bottom, in each columns from left to right; they sum
    to 1."""


class Alternative(Message):
    """A caption of an image."""

    caption: str
    log_prob: float
    """Natural logarithm of its probability, summed over the words and the end."""
    probability: float


class ImageCaption(Alternative):
    """The answer for one image: its best caption, and more of them."""

    name: str | None
    """Its file name in the request."""
    alternatives: list[Alternative]
    attention: list[WordAttention] | None
    attention_box: tuple[float, float, float, float]
    """Where the grid lies: left, top, right and bottom edge of what the model saw, in parts of the image's width and
    height."""


class Timing(Message):
    """Where the time went, in milliseconds; of several images the longest."""

    load_ms: float
    """Loading the image."""
    wait_ms: float
    """Waiting for the model to be free."""
    model_ms: float
    """The forward pass and the search, shared by the batch."""
    total_ms: float = 0.0
    """From the complete request to the answer."""
    batch_size: int
    """Images that went through the model together."""


class CaptionResponse(Message):
    """Captions of all images of a request, in its order."""

    model: str
    version: str
    """Beginning of the SHA-256 of the model's weights."""
    captions: list[ImageCaption]
    timing: Timing


class EncoderCard(Message):
    """What turns a picture into features."""

    family: str
    name: str
    layer: str


class ModelCard(Message):
    """A model of the service."""

    name: str
    version: str
    """Beginning of the SHA-256 of its weights or, of a model of transformers, of its files."""
    decoder: str
    """What writes: a kind of decoder or, of transformers, of model."""
    encoder: EncoderCard | None = None
    """None of models of transformers, which are one network."""
    vocabulary_size: int | None = None
    """Words; None of models of transformers, which write parts of words."""
    attention: bool = False
    """Whether it can say where it looked."""
    decode: DecodeConfig
    """Search for its captions where a request asks for nothing else."""
    default: bool
    """Whether it answers requests that name no model."""


class ModelList(Message):
    models: list[ModelCard]


class Health(Message):
    """Whether every model captions."""

    status: str
    models: dict[str, str]


class ErrorDetail(Message):
    code: str
    """For programs: does not change."""
    message: str
    """For people: what is wrong and what to do."""


class ErrorResponse(Message):
    error: ErrorDetail
