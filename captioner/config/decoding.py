"""The search for a caption, each setting written once: what a model has, and what a job or a request may ask for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel, Field, create_model, model_validator

from captioner.config.parts import Config

Model = TypeVar("Model", bound=BaseModel)
Beams = Annotated[int, Field(ge=1, le=32)]


class DecodeConfig(Config):
    """Search for the caption."""

    beam_size: Beams = 3
    """Beams kept per image; 1 is greedy."""
    num_captions: Beams = 1
    """Captions returned per image, best first; at most beam_size."""
    max_length: Annotated[int, Field(ge=1, le=200)] = 30
    """Longest caption, in words."""
    length_penalty: Annotated[float, Field(ge=0.0, le=3.0)] = 0.7
    """Scores are divided by length ** penalty; 0 ranks by plain log-probability."""
    no_repeat_ngram: Annotated[int, Field(ge=0, le=10)] = 0
    """Forbid any n-gram of this size from occurring twice in a caption; 0 allows repeats."""
    prefix: Annotated[str, Field(max_length=1000)] = ""
    """What every caption begins with, such as "a photo of"; its words must be known to the model."""
    prompt: Annotated[str, Field(max_length=1000)] = ""
    """What a chat model of transformers is asked about each picture; other models are asked nothing."""
    forbid: Annotated[str, Field(max_length=1000)] = ""
    """Words that no caption has after its prefix, separated by commas."""
    mbr_samples: Annotated[int, Field(ge=0, le=1000)] = 0
    """Minimum-Bayes-risk decoding: captions sampled per image, against which candidates are compared; 0: beam search
    alone."""
    mbr_temperature: Annotated[float, Field(ge=0.01, le=10.0)] = 0.8
    """Minimum-Bayes-risk decoding: what the logits are divided by before sampling. Below 1 rare words, mostly slips,
    get rarer."""
    mbr_candidates: Annotated[int, Field(ge=0, le=100)] = 5
    """Minimum-Bayes-risk decoding: samples that compete with the captions of the beams, those of highest expected
    utility; scoring them takes the whole ensemble."""
    mbr_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 8.0
    """Minimum-Bayes-risk decoding: candidates are ranked by their score plus so many times their expected utility, the
    mean square root of CIDEr-D (0 to 10) against the samples."""

    @model_validator(mode="after")
    def _captions_fit_beam(self) -> "DecodeConfig":
        _check_fit(self.num_captions, self.beam_size)
        return self

    @property
    def work(self) -> int:
        """What the search for one picture may take: words, of every beam for every caption and of every sample."""
        return self.max_length * (self.beam_size * self.num_captions + self.mbr_samples)


def optional(model: type[BaseModel], *names: str) -> Callable[[type[Model]], type[Model]]:
    """Class decorator: adds fields of ``model``, all or those named, with their limits and help; None is not given."""
    fields: dict[str, Any] = {
        name: (
            Annotated[field.annotation, *field.metadata] | None,
            Field(None, description=field.description, examples=[field.default]),
        )
        for name, field in model.model_fields.items()
        if not names or name in names
    }

    def add(cls: type[Model]) -> type[Model]:
        new = {name: field for name, field in fields.items() if name not in cls.model_fields}
        return create_model(
            cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **new
        )

    return add


@optional(DecodeConfig)
class DecodeOverrides(Config):
    """Search for the caption; what is left out is as the model was trained to be searched."""

    prompt: Annotated[str | None, Field(max_length=1000), tyro.conf.arg(aliases=["--prompt"])] = (
        None
    )
    """What a chat model of transformers is asked about each picture; other models are asked nothing."""

    if TYPE_CHECKING:

        def __init__(self, **settings: float | str | None) -> None: ...

    @model_validator(mode="after")
    def _captions_fit_beam(self) -> "DecodeOverrides":
        given = self.model_dump(exclude_none=True)
        if given.keys() >= {"num_captions", "beam_size"}:
            _check_fit(given["num_captions"], given["beam_size"])
        return self

    def over(self, own: DecodeConfig) -> DecodeConfig:
        """The search of a model whose own is ``own``. One of beam_size and num_captions given alone moves the other
        where it must."""
        given = self.model_dump(exclude_none=True)
        if given.get("beam_size") == 1:
            given.setdefault("mbr_samples", 0)  # whoever asks for one beam wants greedy search
        given.setdefault("beam_size", max(own.beam_size, given.get("num_captions", 1)))
        given.setdefault("num_captions", min(own.num_captions, given["beam_size"]))
        return DecodeConfig(**own.model_dump() | given)


def _check_fit(num_captions: int, beam_size: int) -> None:
    if num_captions > beam_size:
        raise ValueError(f"num_captions: {num_captions} must be at most beam_size {beam_size}")
