"""A captioning model of ``transformers``: its folder, checked without loading it, and how it may be searched."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors

from captioner import storage
from captioner.artifacts import model_hub
from captioner.config import DecodeConfig, DecodeOverrides
from captioner.errors import ConfigError, ModelError, StoreError, one_line
from captioner.images.load import Fit

CONFIG, _WHOLE = "config.json", "model.safetensors"
EXTRA = "transformers"
"""The package's extra that brings it."""
# What is on this machine, and nothing but data.
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Of a repository of the hub: what describes a model and its processor, and what it knows. No code, no pickles.
_DESCRIPTIONS, _WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"], ["*.safetensors"]
# Those that are asked nothing. Whatever else turns pictures and text into text must be a chat model.
ASKED_NOTHING = ("blip", "git", "vision-encoder-decoder")
_PROMPT = "Describe this picture in one sentence."
# Enough for what their processors make of a picture, and little enough to wait in memory.
_FIT = Fit((768, 768), "within", filter="bicubic")


@dataclass(frozen=True)
class TransformersFolder:
    """A captioning model of ``transformers``, opened."""

    uri: str
    """What every machine knows it by."""
    root: str
    """Where its files are; of a model of the hub, in this machine's cache."""
    config: dict[str, Any]
    """Its ``config.json``."""
    fit = _FIT

    @cached_property
    def version(self) -> str:
        """SHA-256 over the names and contents of its files."""
        whole = hashlib.sha256()
        patterns = [*_DESCRIPTIONS, *_WEIGHTS]
        for path in sorted({file for one in patterns for file in Path(self.root).glob(one)}):
            with path.open("rb") as file:
                whole.update(
                    f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
                )
        return whole.hexdigest()

    @property
    def memory(self) -> int:
        """Bytes that a process with it takes on a CPU, at most: weights of two bytes become those of four."""
        return (
            2 * sum(path.stat().st_size for path in Path(self.root).glob("*.safetensors")) + 2**31
        )

    @property
    def kind(self) -> str:
        return str(self.config["model_type"])

    @cached_property
    def tokenizer(self) -> Any:
        """
        Raises:
            ModelError: it cannot be loaded.
        """
        # Here, for it takes a second.
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.root, **SAFE)
        except Exception as error:  # whatever damaged files make of it
            raise ModelError(
                f"{self.uri}: its tokenizer cannot be loaded: {one_line(error)}"
            ) from error

    def prefix(self, decode: DecodeConfig) -> list[int]:
        """Tokens of what every caption begins with."""
        ids = self.tokenizer(decode.prefix, add_special_tokens=False).input_ids
        return list(ids) if decode.prefix else []

    @cached_property
    def decode(self) -> DecodeConfig:
        """Its own search, as far as ``generation_config.json`` says.

        Raises:
            ModelError: that is damaged.
        """
        place = Path(self.root, "generation_config.json")
        said = _read(place) if place.exists() else {}
        chats = self.kind not in ASKED_NOTHING
        # Of a chat model the longest counts the question and the picture, too.
        length = said.get("max_new_tokens") or (100 if chats else said.get("max_length") or 30)
        penalty = said.get("length_penalty")
        try:
            beams = min(32, said.get("num_beams") or 1)
            return DecodeConfig(
                beam_size=beams,
                num_captions=min(beams, said.get("num_return_sequences") or 1),
                max_length=min(200, length),
                length_penalty=1.0 if penalty is None else min(3.0, max(0.0, penalty)),
                no_repeat_ngram=min(10, said.get("no_repeat_ngram_size") or 0),
                prompt=_PROMPT if chats else "",
            )
        except (TypeError, ValueError) as error:
            raise ModelError(f"{place} is damaged: {one_line(error)}") from error

    def search(self, asked: DecodeOverrides) -> DecodeConfig:
        """The model's own search, with what is asked for in its place.

        Raises:
            ConfigError: the model cannot be searched like that.
        """
        decode = asked.over(self.decode)
        self.check(decode)
        return decode

    def check(self, decode: DecodeConfig) -> None:
        """
        Raises:
            ConfigError: the model cannot be searched like that.
        """
        if decode.mbr_samples:
            raise ConfigError(f"decode.mbr_samples: {self.kind} has no n-grams to rank captions by")
        if decode.forbid:
            raise ConfigError(f"decode.forbid: {self.kind} writes parts of words, not words")
        if decode.prompt and self.kind in ASKED_NOTHING:
            raise ConfigError(
                f"decode.prompt: {self.kind} is asked nothing; decode.prefix is what its captions begin with"
            )
        for name in ("prompt", "prefix") if decode.prompt or decode.prefix else ():
            for token in self.tokenizer.added_tokens_decoder.values():
                if token.special and str(token) in getattr(decode, name):
                    raise ConfigError(f"decode.{name}: {str(token)!r} is no text to {self.kind}")
        if decode.prefix:
            prefix = self.prefix(decode)
            if self.tokenizer.unk_token_id in prefix:
                raise ConfigError(
                    f"decode.prefix: {decode.prefix!r:.60} has words unknown to the model"
                )
            if len(prefix) >= decode.max_length:
                raise ConfigError(
                    f"decode.prefix: {len(prefix)} tokens, which max_length {decode.max_length} must exceed"
                )


def is_transformers(root: str) -> bool:
    """Whether a directory looks like a model of ``transformers``."""
    place = storage.join(root, CONFIG)
    return storage.exists(place) and "model_type" in _object(storage.read_json(place))


def open_folder(uri: str) -> TransformersFolder:
    """
    Args:
        uri: an absolute path, or ``hf:org/name@commit``.

    Raises:
        ModelError: it is no captioning model, or one that has code or pickles for what it needs.
        OutOfReachError: the hub cannot be reached.
    """
    if find_spec("transformers") is None:
        raise ModelError(f"{uri} takes the extra: pip install 'captioner[{EXTRA}]'")
    remote = uri.startswith(model_hub.PREFIX)
    if not remote and not storage.is_local(uri):
        raise ModelError(f"{uri}: transformers reads local folders and the hub: copy it to either")
    root = model_hub.snapshot(uri, _DESCRIPTIONS) if remote else uri
    described = {path.name: _read(path) for path in sorted(Path(root).glob("*config*.json"))}
    config = described.get(CONFIG, {})
    _check_kind(uri, root, config)
    for name, said in described.items():
        if _has_code(said):
            raise ModelError(
                f"{uri}: {name} asks for code of its own (auto_map), which is never run"
            )
    if remote:
        model_hub.snapshot(uri, _WEIGHTS)
    _check_weights(uri, Path(root))
    return TransformersFolder(uri, root, config)


def _check_kind(uri: str, root: str, config: dict[str, Any]) -> None:
    # Here, for it takes a second.
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = str(config.get("model_type"))
    wanted = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    chats = any(Path(root).glob("chat_template*")) or any(
        "chat_template" in _read(path) for path in Path(root).glob("*_config.json")
    )
    if wanted is None or (kind not in ASKED_NOTHING and not chats):
        known = ", ".join(ASKED_NOTHING)
        raise ModelError(
            f"{uri}: {kind} is no captioning model that is supported: {known}, or chat models with a chat template "
            "that see pictures"
        )
    built = config.get("architectures") or [wanted]
    if built != [wanted]:
        raise ModelError(f"{uri} is a {built}, which captions nothing; a {wanted} does")


def _check_weights(uri: str, root: Path) -> None:
    index = root / f"{_WHOLE}.index.json"
    names = (
        {_WHOLE}
        if not index.exists()
        else set(map(str, _object(_read(index).get("weight_map")).values()))
    )
    there = {path.name for path in root.glob("*.safetensors")}
    if not there:
        raise ModelError(f"{uri}: its weights are no safetensors, and pickles are never loaded")
    if missing := sorted(names - there):
        raise ModelError(f"{uri}: {missing[0]} is missing")
    for name in sorted(names):
        try:
            with safetensors.safe_open(root / name, "np"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{uri}: {name} is damaged: {one_line(error)}") from error


def _has_code(said: Any) -> bool:
    if isinstance(said, dict):
        return "auto_map" in said or any(map(_has_code, said.values()))
    return isinstance(said, list) and any(map(_has_code, said))


def _read(path: Path) -> dict[str, Any]:
    try:
        return _object(storage.read_json(str(path)))
    except StoreError as error:
        raise ModelError(str(error)) from error


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
