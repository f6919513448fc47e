"""Tiny captioning models of ``transformers`` with random weights, made on the spot with tokenizers and processors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

WORDS = (
    *("a", "photo", "of", "the", "dog", "cat", "runs", "jumps", "over", "on", "grass", "water"),
    *("red", "green", "blue", "small", "large", "two", "three", "man", "woman", "child", "ball"),
)
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %}<end_of_utterance> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_blip(root: Path, seed: int = 0) -> str:
    tokenizer = _bert_tokenizer()
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.02,
    }  # fmt: skip
    text = {
        **_special_ids(tokenizer), "vocab_size": len(tokenizer), "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "encoder_hidden_size": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    with _seeded(seed):
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    _decide(model)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    return _save(root, model, BlipProcessor(images, tokenizer))


def write_git(root: Path, seed: int = 0) -> str:
    tokenizer = _bert_tokenizer()
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = GitConfig(
        vision_config=vision, vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    with _seeded(seed):
        model = GitForCausalLM(config)
    _decide(model)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(root, model, GitProcessor(images, tokenizer))


def write_vit_gpt2(root: Path, seed: int = 0) -> str:
    tokenizer = _word_tokenizer(("<|endoftext|>",), eos="<|endoftext|>")
    end = tokenizer.eos_token_id
    vision = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    text = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision, text, decoder_start_token_id=end, eos_token_id=end, pad_token_id=end
    )
    with _seeded(seed):
        model = VisionEncoderDecoderModel(config=config)
    _decide(model)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root)
    return _save(root, model, tokenizer)


def write_chat(root: Path, seed: int = 0) -> str:
    """Its processor cuts pictures into tiles, as many as their size asks for: prompts differ in length."""
    image, around, whole, end = (
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
    )
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = _word_tokenizer(("<pad>", end, image, around, whole, *tiles), eos=end, pad="<pad>")
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=2, pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids(image),
    )  # fmt: skip
    with _seeded(seed):
        model = Idefics3ForConditionalGeneration(config)
    _decide(model)
    images = Idefics3ImageProcessor(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    return _save(
        root, model, Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=_CHAT)
    )


WRITERS: dict[str, Callable[[Path, int], str]] = {
    "blip": write_blip,
    "git": write_git,
    "vit_gpt2": write_vit_gpt2,
    "chat": write_chat,
}


def _seeded(seed: int) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def seeded() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield

    return seeded()


def _decide(model: PreTrainedModel) -> None:
    """Larger weights, so that pictures and words matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter *= 8 if "vision" not in name and "encoder." not in name else 16


def _save(root: Path, model: PreTrainedModel, processor: Any) -> str:
    model.save_pretrained(root)
    processor.save_pretrained(root)
    return str(root)


def _bert_tokenizer() -> BertTokenizerFast:
    tokens = (*_SPECIAL, *WORDS)
    return BertTokenizerFast(vocab={token: place for place, token in enumerate(tokens)})


def _special_ids(tokenizer: BertTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id, "sep_token_id": tokenizer.sep_token_id,
    }  # fmt: skip


def _word_tokenizer(
    special: tuple[str, ...], eos: str, pad: str | None = None
) -> PreTrainedTokenizerFast:
    words = (*special, "[UNK]", "user", "assistant", ":", "?", ".", "what", "is", "there", *WORDS)
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=eos, pad_token=pad, unk_token="[UNK]",
        additional_special_tokens=[one for one in special if one not in (eos, pad)],
    )  # fmt: skip
