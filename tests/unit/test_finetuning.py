"""Finetuning without Ray: which parameters learn, which pictures a worker gets, and that workers make no difference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from captioner.artifacts.id_set import AllBut
from captioner.artifacts.model_directory import load_model
from captioner.config import EncoderConfig, FinetuneConfig, ShapesConfig, SourceConfig
from captioner.encoders.encoder import Encoder
from captioner.encoders.family import family_of
from captioner.encoders.learning import LearningEncoder
from captioner.errors import ConfigError
from captioner.features.picked import read_picked
from captioner.features.stage import PIXELS
from captioner.images.views import view_of_epoch
from captioner.sources import open_source
from captioner.training.data import CaptionData, Columns, Done
from captioner.training.finetune_worker import Network, OnPictures, build
from captioner.training.pictures import Pictures
from captioner.training.plan import Indices
from captioner.training.steps import train_step
from tests.finetuning import SIDE, write_fresh_model
from tests.pictures import picture
from tests.sources import IMAGE, write_shard
from tests.sources import read_all as read_source

SHAPES = ShapesConfig(train=12, validation=4, test=2)
CONFIG = FinetuneConfig(model="m", source="shapes", output="o", global_batch=6, ema_decay=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_fresh_model(tmp_path_factory.mktemp("models") / "model", SHAPES)


def test_a_view_depends_on_seed_epoch_and_id_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    keys = [(seed, epoch, name) for seed in (0, 1) for epoch in range(20) for name in ("a", "b")]

    def shown(crop: bool, mirror: bool) -> list[bytes]:
        return [
            view_of_epoch(pixels, name, seed=seed, epoch=epoch, crop=crop, mirror=mirror).tobytes()
            for seed, epoch, name in keys
        ]

    assert shown(True, True) == shown(True, True)
    assert len(set(shown(True, False))) == len(keys)
    either = [pixels.tobytes(), pixels[:, ::-1].tobytes()]
    mirrored = shown(False, True)
    assert set(mirrored) == set(either)
    assert 20 < mirrored.count(either[1]) < 60
    assert set(shown(False, False)) == {pixels.tobytes()}


def test_all_but_a_few_ids() -> None:
    done = AllBut(["a", "x/b"])
    assert done.holds(["a", "b", "x/b", ""]).tolist() == [False, True, False, True]
    assert done.behind("x/").holds(["a", "b"]).tolist() == [True, False]
    assert done.holds([]).tolist() == []


def sources(root: Path) -> Iterator[tuple[str, SourceConfig]]:
    """Small ones of every kind, of 30 pictures or so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [picture(number) for number in range(30)]
    (root / "folder" / "below").mkdir(parents=True)
    for number, data in enumerate(pictures):
        place = "below/" * (number % 2)
        (root / "folder" / f"{place}{number:02d}.jpg").write_bytes(data)
    rows = pa.array([{"bytes": data, "path": None} for data in pictures], IMAGE)
    (root / "tables").mkdir()
    pq.write_table(pa.table({"image": rows}), root / "tables/a.parquet", row_group_size=7)
    for shard in range(2):
        members = {f"{number:02d}.jpg": pictures[number] for number in range(shard, 30, 2)}
        write_shard(root / f"shards/{shard:05d}.tar", members)
    yield "shapes", SourceConfig(shapes=ShapesConfig(train=20, validation=10, test=2))
    for name in ("folder", "tables", "shards"):
        yield str(root / name), SourceConfig()
    yield str(root / "folder"), SourceConfig(id_prefix="mine/", limit=25)


def test_a_task_reads_its_pictures_in_its_order_from_sources_of_every_kind(tmp_path: Path) -> None:
    for spec, options in sources(tmp_path):
        source = open_source(spec, options)
        known = {row["image_id"]: row["bytes"] for row in read_source(source)}
        asked = np.random.default_rng(0).permutation(sorted(known))[:9].tolist()
        (table,) = read_picked(source, asked, 1.0)
        assert table["image_id"].to_pylist() == asked
        assert table["bytes"].to_pylist() == [known[name] for name in asked]


@pytest.mark.parametrize(
    ("name", "stages", "last"),
    [("resnet50", 1, "layer3"), ("timm:test_resnet", 2, ""), ("timm:test_vit", 3, "blocks.")],
)
def test_the_last_stages_learn_and_batch_norms_do_not(name: str, stages: int, last: str) -> None:
    layer: Any = "layer3" if name == "resnet50" else None
    config = EncoderConfig(name=name, weights="random", layer=layer, input_size=SIDE)
    family, _ = family_of(name)
    tensors, _ = family.weights(config)
    spec = family.spec(config, tensors, "float32")
    encoder = LearningEncoder(spec, tensors, ("pooled", "grid"), stages).train()
    pixels = torch.randint(256, (2, *spec.input_size, 3), dtype=torch.uint8)
    found = encoder(pixels)
    pooled, grid = Encoder(spec, tensors)(pixels.numpy(), grid=True)
    assert grid is not None
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["grid"], grid.float(), rtol=1e-2, atol=1e-2)
    learns = {key for key, one in encoder.network.named_parameters() if one.requires_grad}
    assert 0 < len(learns) < len(tensors)
    assert all(last in key or "norm" in key for key in learns)
    norms = [part for part in encoder.modules() if isinstance(part, _BatchNorm)]
    assert not any(part.training for part in norms)
    assert not any(one.requires_grad for part in norms for one in part.parameters())
    optimizer = torch.optim.SGD(encoder.learning(), 0.1)
    sum(column.square().mean() for column in found.values()).backward()
    optimizer.step()
    described, after = encoder.described()
    changed = {key for key in tensors if not torch.equal(tensors[key], after[key])}
    assert changed
    assert changed <= learns
    assert described.weights_sha256 != spec.weights_sha256
    Encoder(described, after)  # which checks that they belong together
    with pytest.raises(ConfigError, match="stages: 99 are more than the"):
        LearningEncoder(spec, tensors, ("pooled",), 99)


def test_what_no_column_needs_does_not_learn() -> None:
    """DDP would wait for its gradients."""
    config = EncoderConfig(name="timm:mobilenetv3_small_050", weights="random", input_size=SIDE)
    family, _ = family_of(config.name)
    tensors, _ = family.weights(config)
    spec = family.spec(config, tensors, "float32")
    heads = []
    for columns in (("pooled",), ("grid",)):
        encoder = LearningEncoder(spec, tensors, columns, 1)  # type: ignore[arg-type]
        learns = [key for key, one in encoder.network.named_parameters() if one.requires_grad]
        heads.append("model.conv_head.weight" in learns)
        assert learns
    assert heads == [True, False]


class InMemory(Pictures):
    """The same plan, with pictures that are there: each is its own number in every pixel."""

    def _read(self, images: list[Indices], epoch: int | None) -> Iterator[Columns]:
        for rows in images:
            values = torch.from_numpy(rows % 251).to(torch.uint8)
            yield {PIXELS: values[:, None, None, None].expand(-1, SIDE, SIDE, 3).contiguous()}


def pictures(model: str, rank: int, workers: int) -> InMemory:
    """Of 23 pictures with one to seven captions each."""
    words = load_model(model).vocabulary
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 8, 23)
    captions = [
        [1, *generator.integers(4, len(words), length).tolist(), 2]
        for length in generator.integers(2, 9, counts.sum())
    ]
    data = CaptionData(captions, np.repeat(np.arange(23), counts))
    names = [f"{number:02d}" for number in range(23)]
    spec = load_model(model).record.encoder.spec
    source = open_source("shapes", SourceConfig(shapes=SHAPES))
    return InMemory(data, names, source, spec, CONFIG, rank, workers)


def shown(model: str, workers: int, done: list[Done], steps: int | None = None) -> list[list[int]]:
    """The pictures of each step, over all workers."""
    found: list[list[int]] = []
    for rank in range(workers):
        for step, batch in enumerate(list(pictures(model, rank, workers).epoch(3, done))[:steps]):
            if rank == 0:
                found.append([])
            found[step] += [row for row in batch.images.tolist() if row >= 0]
    return [sorted(step) for step in found]


def test_every_picture_comes_once_an_epoch_whatever_the_number_of_workers(model: str) -> None:
    alone = shown(model, 1, [])
    assert sorted(row for step in alone for row in step) == list(range(23))
    assert len(alone) > 8
    for workers in (2, 3, 5):
        assert shown(model, workers, []) == alone
    # A run that continues, with other workers, has the rest.
    assert shown(model, 2, [], 3) + shown(model, 3, [Done(3, 2)]) == alone


def test_workers_gradients_are_those_of_one(model: str) -> None:
    def gradients(workers: int) -> list[torch.Tensor]:
        total: list[torch.Tensor] = []
        for rank in range(workers):
            network = build(load_model(model), 2)
            objective = OnPictures(network, 0.1).train()
            batch = next(iter(pictures(model, rank, workers).epoch(0)))
            optimizer = torch.optim.SGD(network.parameters(), 0.0)
            train_step(
                objective,
                optimizer,
                batch,
                seed=(0, rank),
                workers=workers,
                config=CONFIG.model_copy(update={"clip_norm": None}),
                compute="float32",
            )
            found = [part.grad for part in network.parameters() if part.grad is not None]
            # DDP's mean over the workers.
            total = [
                (before if before is not None else 0) + one / workers
                for before, one in zip(total or [None] * len(found), found, strict=True)
            ]
        return total

    alone = gradients(1)
    assert sum(float(one.abs().sum()) > 0 for one in alone) > 10
    for workers in (2, 3):
        for one, many in zip(alone, gradients(workers), strict=True):
            torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-6)


def test_encoder_and_decoder_learn_at_rates_of_their_own(model: str) -> None:
    from captioner.training.state import TrainingState

    config = CONFIG.model_copy(update={"warmup_steps": 10, "epochs": 2})
    network: Network = build(load_model(model), 1)
    groups: Any = [
        {"params": list(network.decoder.parameters()), "pace": 1.0, "weight_decay": 0.1},
        {"params": network.encoder.learning(), "pace": 0.2, "weight_decay": 0.0},
    ]
    state = TrainingState(network, config, 20, groups)
    for step, part in ((0, 0.1), (9, 1.0), (25, 0.5), (40, 0.0)):
        rate = state.before_step(step / 20)
        assert rate == pytest.approx(part * config.learning_rate)
        assert [group["lr"] for group in state.optimizer.param_groups] == pytest.approx(
            [rate, 0.2 * rate]
        )
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.1, 0.0]
    assert state.judged is not network  # the EMA, with an encoder of its own
    assert isinstance(state.judged, Network)
