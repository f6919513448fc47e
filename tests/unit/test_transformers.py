"""Captioning models of ``transformers`` behind the Captioner: tiny ones with random weights, made on the spot."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from captioner.artifacts import transformers_folder
from captioner.artifacts.model_directory import check_search
from captioner.artifacts.models import open_any
from captioner.artifacts.transformers_folder import TransformersFolder
from captioner.captioning import collection
from captioner.captioning.captioner import Captioner
from captioner.captioning.collection import caption_collection
from captioner.captioning.transformers import TransformersCaptioner
from captioner.config import (
    CaptionConfig,
    DecodeConfig,
    DecodeOverrides,
    EvaluateConfig,
    ReplicaSettings,
)
from captioner.errors import CaptionerError, ConfigError, ModelError
from captioner.evaluation.evaluate import evaluate
from captioner.images.load import load_image
from captioner.serving.replica import CaptionModel
from captioner.text import Vocabulary
from tests.hub import serve_hub
from tests.pictures import picture
from tests.transformers_models import WRITERS, write_blip

ROOT = Path(__file__).resolve().parents[2]
# Of several proportions, which chat models cut into different numbers of tiles.
PICTURES = [
    picture(number, "PNG", size)
    for number, size in enumerate(
        [(300, 90), (64, 64), (90, 300), (500, 400), (800, 600), (40, 33)]
    )
]
SEARCHES = [
    DecodeConfig(beam_size=1, max_length=9),
    DecodeConfig(beam_size=3, num_captions=2, max_length=9, length_penalty=1.0),
    DecodeConfig(beam_size=2, max_length=9, prefix="a photo of", no_repeat_ngram=2),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("transformers")
    return {kind: write(root / kind, 0) for kind, write in WRITERS.items()}


@pytest.fixture(scope="module")
def captioners(folders: dict[str, str]) -> dict[str, Captioner[Any]]:
    return {kind: Captioner.load(folder, "cpu") for kind, folder in folders.items()}


@pytest.fixture(params=WRITERS)
def captioner(
    captioners: dict[str, Captioner[Any]], request: pytest.FixtureRequest
) -> Captioner[Any]:
    return captioners[request.param]


@pytest.fixture
def blip(folders: dict[str, str], tmp_path: Path) -> Path:
    """One to spoil."""
    shutil.copytree(folders["blip"], tmp_path / "blip")
    return tmp_path / "blip"


@pytest.mark.parametrize("decode", SEARCHES, ids=["greedy", "beams", "prefix"])
def test_a_caption_does_not_depend_on_its_batch(
    captioner: Captioner[Any], decode: DecodeConfig
) -> None:
    together = captioner.caption(PICTURES, decode)
    assert len({caption.text for caption in together}) > 2  # or nothing would be compared
    for order in ([3, 0], [5, 4, 3, 2, 1]):
        for place, other in zip(
            order, captioner.caption([PICTURES[place] for place in order], decode), strict=True
        ):
            assert [one.text for one in other.candidates] == [
                one.text for one in together[place].candidates
            ]
    for data, caption in zip(PICTURES, together, strict=True):
        (alone,) = captioner.caption([data], decode)
        assert len(alone.candidates) == decode.num_captions
        for one, other in zip(alone.candidates, caption.candidates, strict=True):
            assert one.text == other.text
            assert one.log_prob == pytest.approx(other.log_prob, abs=1e-3)
        assert caption.text.startswith(decode.prefix)


@pytest.mark.parametrize("kind", ["blip", "git", "vit_gpt2"])
@pytest.mark.parametrize("decode", SEARCHES[:2], ids=["greedy", "beams"])
def test_the_log_probability_is_that_of_the_models_next_words(
    captioners: dict[str, Captioner[Any]],
    kind: str,
    decode: DecodeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed again in one pass, the caption's tokens given, of which a text does not show all."""
    captioner = captioners[kind]
    assert isinstance(captioner, TransformersCaptioner)
    tokens: list[list[int]] = []

    def note(found: Any) -> Any:
        written = TransformersCaptioner._written(captioner, found)
        tokens.extend(written[0])
        return written

    monkeypatch.setattr(captioner, "_written", note)
    end = (
        captioner.tokenizer.eos_token_id if kind == "vit_gpt2" else captioner.tokenizer.sep_token_id
    )
    start = end if kind == "vit_gpt2" else captioner.tokenizer.cls_token_id
    name = "decoder_input_ids" if kind == "vit_gpt2" else "input_ids"
    for data in PICTURES:
        tokens.clear()
        (caption,) = captioner.caption([data], decode)
        shown = captioner.encode(_pixels(captioner, data))
        pixels = captioner.processor(images=shown, return_tensors="pt").pixel_values
        for one, words in zip(caption.candidates, tokens, strict=True):
            assert words[-1] == end or len(words) == decode.max_length
            assert end not in words[:-1]
            with torch.inference_mode():
                found = captioner.model(
                    pixel_values=pixels, **{name: torch.tensor([[start, *words[:-1]]])}
                )
            log_probs = torch.log_softmax(found.logits[0, -len(words) :], dim=-1)
            expected = log_probs[range(len(words)), words].sum().item()
            assert one.log_prob == pytest.approx(expected, abs=1e-3)


def _pixels(captioner: Captioner[Any], data: bytes) -> list[np.ndarray[Any, Any]]:
    return [load_image(data, captioner.opened.fit).pixels]


def test_a_prompt_is_what_a_chat_model_is_asked(captioners: dict[str, Captioner[Any]]) -> None:
    chat = captioners["chat"]
    assert chat.opened.decode.prompt  # where none is given

    def answers(prompt: str) -> list[str]:
        decode = DecodeConfig(beam_size=1, max_length=9, prompt=prompt)
        return [caption.text for caption in chat.caption(PICTURES, decode)]

    assert answers("what is there ?") == answers("what is there ?") != answers("two ?")


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [
        ("blip", "mbr_samples", 5),
        ("git", "forbid", "dog"),
        ("vit_gpt2", "prompt", "what is there ?"),
        ("chat", "prompt", "what is <image> there ?"),
        ("blip", "prefix", "a zebra"),
        ("git", "prefix", "[CLS] a"),
        ("vit_gpt2", "prefix", "a " * 30),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_its_flag(
    folders: dict[str, str],
    kind: str,
    flag: str,
    value: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Before Ray starts."""
    monkeypatch.setattr(collection, "start_ray", lambda: pytest.fail("Ray was started"))
    (tmp_path / "photo.png").write_bytes(PICTURES[0])
    config = CaptionConfig(
        images=str(tmp_path),
        model=folders[kind],
        output=str(tmp_path / "captions"),
        decode=DecodeOverrides(**{flag: value, "max_length": 20}),
    )
    with pytest.raises(ConfigError, match=rf"^decode\.{flag}: [^\n]+$"):
        caption_collection(config)
    assert not (tmp_path / "captions").exists()


def test_our_own_models_are_asked_nothing() -> None:
    with pytest.raises(ConfigError, match="decode.prompt"):
        check_search(DecodeConfig(prompt="what?"), Vocabulary.build([["dog"]]), ngrams=False)


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _say(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | changes))

    return change


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 3000)


def _drop_a_tensor(folder: Path) -> None:
    place = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(place)
    del tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]
    safetensors.torch.save_file(tensors, place, {"format": "pt"})


def _index(folder: Path) -> None:
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_pickle_only, "no safetensors"),
        (_say("config.json", auto_map={"AutoModel": "code.Model"}), r"config\.json .*auto_map"),
        (
            _say("config.json", vision_config={"auto_map": {"AutoModel": "x.Y"}}),
            r"config\.json .*auto_map",
        ),
        (
            _say("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}),
            "tokenizer_config.*auto_map",
        ),
        (_say("config.json", model_type="bert"), "bert is no captioning model"),
        (_say("config.json", model_type="llava"), "llava is no captioning model"),
        (_say("config.json", model_type="blip-2"), "blip-2 is no captioning model"),
        (_say("config.json", model_type=["blip"]), "no captioning model"),
        (
            _say("config.json", architectures=["BlipForQuestionAnswering"]),
            "BlipForQuestionAnswering",
        ),
        (_index, "model-00002-of-00002.safetensors is missing"),
        (_say("generation_config.json", num_beams="four"), "generation_config.json is damaged"),
        (_say("generation_config.json", max_length=-4), "generation_config.json is damaged"),
        (_truncate, "model.safetensors is damaged"),
        (_drop_a_tensor, "have no vision_model.encoder.layers.0.mlp.fc1.weight"),
        (_remove("tokenizer.json"), "its tokenizer has 5 of the model's 28 tokens"),
        (_remove("processor_config.json"), "cannot be loaded"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line_before_ray(
    blip: Path,
    spoil: Callable[[Path], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(collection, "start_ray", lambda: pytest.fail("Ray was started"))
    spoil(blip)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.png").write_bytes(PICTURES[0])
    config = CaptionConfig(
        images=str(tmp_path / "photos"), model=str(blip), output=str(tmp_path / "captions")
    )
    with pytest.raises(CaptionerError, match=said) as error:
        caption_collection(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "captions").exists()


def test_without_the_extra_its_name_is_said(blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_folder, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"captioner\[transformers\]"):
        open_any(str(blip))


def test_features_are_nothing_to_it(blip: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        features=str(tmp_path), model=str(blip), output=str(tmp_path / "report")
    )
    with pytest.raises(ConfigError, match="give source"):
        evaluate(config)


def test_the_version_is_that_of_its_files(blip: Path, tmp_path: Path) -> None:
    first = open_any(str(blip))
    copy = tmp_path / "elsewhere"
    shutil.copytree(blip, copy)
    (copy / "notes.md").write_text("says nothing to the model")
    assert open_any(str(copy)).version == first.version
    _say("generation_config.json", num_beams=4, max_length=16, length_penalty=0.5)(copy)
    changed = open_any(str(copy))
    assert changed.version != first.version
    assert changed.decode == DecodeConfig(beam_size=4, max_length=16, length_penalty=0.5)
    assert open_any(write_blip(tmp_path / "other", 1)).version != first.version


def test_a_search_says_at_every_step_that_it_advances(captioner: Captioner[Any]) -> None:
    steps: list[None] = []
    captioner.on_step(lambda: steps.append(None))
    try:
        captioner.caption(PICTURES[:1], DecodeConfig(beam_size=1, max_length=4))
        assert 1 <= len(steps) <= 4
        captioner.on_step(lambda: pytest.fail("ended"))
        with pytest.raises(pytest.fail.Exception):
            captioner.caption(PICTURES[:1])
    finally:
        captioner.on_step(lambda: None)


def test_a_replica_answers_with_its_captions(
    folders: dict[str, str], captioners: dict[str, Captioner[Any]]
) -> None:
    replica = CaptionModel("blip", folders["blip"], ReplicaSettings(threads=1), 2**24)

    async def answer(decode: DecodeConfig) -> Any:
        pictures, names = PICTURES[:2], [None, None]
        found = replica.caption(pictures, names, decode, attention=True, seconds=60.0)
        return [one async for one in found][-1]

    async def ask() -> list[Any]:
        answers = [await answer(SEARCHES[1]), await answer(DecodeConfig(mbr_samples=5))]
        return [*answers, await replica.health()]

    given, refused, health = asyncio.run(ask())
    assert health == "ok"
    assert "mbr_samples" in str(refused)
    expected = captioners["blip"].caption(PICTURES[:2], SEARCHES[1])
    for one, caption in zip(given.captions, expected, strict=True):
        texts = [one.caption, *(other.caption for other in one.alternatives)]
        assert texts == [candidate.text for candidate in caption.candidates]
        assert one.attention is None


def test_of_the_hub_comes_what_is_data_and_no_more(folders: dict[str, str], tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in Path(folders["blip"]).iterdir()}
    more = dict.fromkeys(("pytorch_model.bin", "code.py", "onnx/model.safetensors"), b"never")
    script = """
import sys
from captioner.artifacts.models import open_any
from captioner.errors import ModelError
for name in sys.argv[1:]:
    try:
        model = open_any(name)
        print(model.uri, model.version)
    except ModelError as error:
        print(error)
"""

    def opened(environment: dict[str, str], *names: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *names],
            cwd=ROOT,
            env=os.environ | {"HF_HOME": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with serve_hub() as hub:
        hub.commits |= {"org/blip": {}, "org/code": {}}
        commit = hub.commit("org/blip", files | more)
        said = json.loads(files["config.json"]) | {"auto_map": {}}
        hub.commit("org/code", files | more | {"config.json": json.dumps(said).encode()})
        found, refused = opened(hub.environment, "hf:org/blip", "hf:org/code")
        assert found == f"hf:org/blip@{commit} {open_any(folders['blip']).version}"
        assert "auto_map" in refused
        fetched = [one for one in hub.requests if one.startswith("GET") and "/resolve/" in one]
        names = {one.rpartition("/")[2] for one in fetched if "/org/blip/" in one}
        assert names == set(files)
        assert not any("safetensors" in one for one in fetched if "/org/code/" in one)
    assert opened(hub.environment | {"HF_HUB_OFFLINE": "1"}, "hf:org/blip") == [found]


def test_is_a_folder_of_transformers(folders: dict[str, str]) -> None:
    opened = open_any(folders["chat"])
    assert isinstance(opened, TransformersFolder)
    assert opened.kind == "idefics3"
