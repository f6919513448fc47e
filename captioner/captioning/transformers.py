"""Captioning models of ``transformers`` behind the Captioner's protocol: their own processor, weights and search."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
)
from transformers.utils import logging

from captioner.artifacts.transformers_folder import ASKED_NOTHING, SAFE, TransformersFolder
from captioner.captioning.captioner import Candidate, Caption, Captioner
from captioner.config import DecodeConfig
from captioner.errors import ModelError, one_line
from captioner.images.load import Pixels

# Bytes of logits that a search may hold: all of every step, for they say how probable a caption is.
_LOGITS = 2**30
# A CPU gains nothing by more pictures at once, and who watches the steps of a search sees none while they are encoded.
_CPU_PICTURES = 8


class TransformersCaptioner(Captioner[list[Image.Image]]):
    """A captioning model of ``transformers``: its captions are parts of words, and it shows no attention."""

    opened: TransformersFolder

    def __init__(self, folder: TransformersFolder, device: str):
        """
        Raises:
            ModelError: it cannot be loaded.
        """
        self.opened, self.device = folder, torch.device(device)
        self.kind, self.chats = folder.kind, folder.kind not in ASKED_NOTHING
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            processor = AutoProcessor if self.chats else AutoImageProcessor
            self.processor = processor.from_pretrained(folder.root, **SAFE)
            self.model, found = AutoModelForImageTextToText.from_pretrained(
                folder.root,
                use_safetensors=True,
                output_loading_info=True,
                # As it was published for GPUs; CPUs are fast in few others.
                dtype="auto" if self.device.type == "cuda" else torch.float32,
                **SAFE,
            )
        except Exception as error:  # whatever damaged files make of it
            raise ModelError(f"{folder.uri} cannot be loaded: {one_line(error)}") from error
        if found["missing_keys"]:  # which it fills with random numbers
            raise ModelError(f"{folder.uri}: its weights have no {min(found['missing_keys'])}")
        self.tokenizer = folder.tokenizer
        self.words = self.model.config.get_text_config(decoder=True).vocab_size
        if 2 * len(self.tokenizer) < self.words:  # made up for want of a file
            raise ModelError(
                f"{folder.uri}: its tokenizer has {len(self.tokenizer)} of the model's {self.words} tokens"
            )
        self.model.eval().to(self.device)
        if self.chats:
            # Prompts with pictures differ in length: what fills them up is masked, and comes first.
            self.processor.tokenizer.padding_side = "left"
        self.steps = _Steps()

    def encode(self, images: Sequence[Pixels] | Pixels) -> list[Image.Image]:
        """Pictures, which the model's own processor and encoder read with every search."""
        return [Image.fromarray(picture) for picture in images]

    def choose(self, encoded: list[Image.Image], places: list[int]) -> list[Image.Image]:
        return [encoded[place] for place in places]

    def check(self, decode: DecodeConfig) -> None:
        self.opened.check(decode)

    def on_step(self, act: Callable[[], None]) -> None:
        self.steps.act = act

    @torch.inference_mode()
    def caption_features(
        self, encoded: list[Image.Image], decode: DecodeConfig | None = None
    ) -> list[Caption]:
        decode = decode or self.opened.decode
        self.check(decode)
        most = max(1, _LOGITS // (4 * self.words * decode.max_length * decode.beam_size))
        if self.device.type == "cpu":
            most = min(most, _CPU_PICTURES)
        captions = []
        for start in range(0, len(encoded), most):
            captions += self._search(encoded[start : start + most], decode)
        return captions

    def _search(self, pictures: list[Image.Image], decode: DecodeConfig) -> list[Caption]:
        prefix, each = self.opened.prefix(decode), decode.num_captions
        found = self.model.generate(
            **self._inputs(pictures, decode, prefix),
            do_sample=False,
            num_beams=decode.beam_size,
            num_return_sequences=each,
            max_new_tokens=decode.max_length - len(prefix),
            length_penalty=decode.length_penalty,
            no_repeat_ngram_size=decode.no_repeat_ngram,
            logits_processor=[self.steps],
            return_dict_in_generate=True,
            output_logits=True,
        )
        candidates = []
        for tokens, log_prob in zip(*self._written(found), strict=True):
            words = self.tokenizer.decode([*prefix, *tokens], skip_special_tokens=True).split()
            candidates.append(Candidate(" ".join(words), tuple(words), log_prob, None))
        images = range(0, len(candidates), each)
        return [Caption(tuple(candidates[first : first + each])) for first in images]

    def _inputs(
        self, pictures: list[Image.Image], decode: DecodeConfig, prefix: list[int]
    ) -> dict[str, Any]:
        """What ``generate`` takes: pictures, what is asked about them, and what captions begin with."""
        if self.chats:
            return self._conversations(pictures, decode)
        loaded = self.processor(images=pictures, return_tensors="pt")
        inputs = dict(loaded.to(self.device, self.model.dtype))
        if prefix:
            name, begin = "input_ids", self.tokenizer.cls_token_id
            if self.kind == "vision-encoder-decoder":
                name, begin = "decoder_input_ids", self.model.config.decoder_start_token_id
            # BLIP takes the end off again.
            end = [self.tokenizer.sep_token_id] * (self.kind == "blip")
            row = torch.tensor([[begin, *prefix, *end]], device=self.device)
            inputs[name] = row.repeat(len(pictures), 1)
        return inputs

    def _conversations(self, pictures: list[Image.Image], decode: DecodeConfig) -> dict[str, Any]:
        prompt = {"type": "text", "text": decode.prompt}
        begun = {"role": "assistant", "content": [{"type": "text", "text": decode.prefix}]}
        inputs = self.processor.apply_chat_template(
            [
                [
                    {"role": "user", "content": [{"type": "image", "image": picture}, prompt]},
                    *[begun] * bool(decode.prefix),
                ]
                for picture in pictures
            ],
            tokenize=True,
            add_generation_prompt=not decode.prefix,
            continue_final_message=bool(decode.prefix),
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return dict(inputs.to(self.device, self.model.dtype))

    def _written(self, found: Any) -> tuple[list[list[int]], list[float]]:
        """The new tokens of every caption up to its end, and their log-probabilities together, the end's included."""
        beams = getattr(found, "beam_indices", None)
        steps = len(found.logits) if beams is None else beams.shape[1]
        new = found.sequences[:, -steps:]
        rows = torch.arange(len(new), device=new.device)
        own = self.model.generation_config.eos_token_id
        own = self.model.config.text_config.sep_token_id if self.kind == "blip" else own
        ends = torch.tensor(-1 if own is None else own, device=new.device)
        log_probs = torch.zeros(len(new), device=new.device)
        going = torch.ones_like(rows, dtype=torch.bool)
        lengths = torch.zeros_like(rows)
        for step in range(steps):
            words = new[:, step]
            row = rows if beams is None else beams[:, step].clamp(min=0)
            each = torch.log_softmax(found.logits[step][row].float(), dim=-1)[rows, words]
            log_probs += torch.where(going, each, 0.0)
            lengths += going
            going = going & ~torch.isin(words, ends)
        tokens = [row[:size] for row, size in zip(new.tolist(), lengths.tolist(), strict=True)]
        return tokens, log_probs.tolist()


class _Steps(LogitsProcessor):
    """Says that a search advances."""

    act: Callable[[], None] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.act is not None:
            self.act()
        return scores
