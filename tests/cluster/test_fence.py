"""Pictures that end the process they are loaded in, in the middle of a run: rows with an error, and nothing else."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.artifacts.output import Output
from captioner.features.pipeline import run_pipeline
from captioner.features.stage import Stage, tensor
from captioner.runtime.cluster import PoolPlan
from captioner.sources import open_source

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(300)]

IMAGES = 500
ABORTS, GREEDY = 123, 321
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("double", pa.int64()),
        pa.field("error", pa.string()),
        pa.field("error_kind", pa.string()),
    ]
)


class Biting(Stage):
    """Its pictures are numbers in a tensor of one; two of them bite."""

    loaded = pa.schema([pa.field("number", pa.fixed_shape_tensor(pa.int64(), [1]))])

    def load(self, data: bytes) -> dict[str, Any]:
        number = int(data)
        if number == ABORTS:
            os.abort()
        if number == GREEDY:
            np.ones(20 * 2**30, np.uint8)
        return {"number": np.array([number])}

    def prepare(self) -> None:
        pass

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({"double": 2 * tensor(batch, "number")[:, 0]})


def test_pictures_that_end_their_process_are_set_aside_and_no_other(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(IMAGES):
        (photos / f"{number}.jpg").write_text(str(number))
    source = open_source(str(photos))
    pool = PoolPlan(1, 0, 1)
    with Output(str(tmp_path / "out"), {"job": "test"}) as output:
        run_pipeline(source, output, "features", SCHEMA, Biting(), batch_size=32, pool=pool)
    rows = pq.read_table(tmp_path / "out/features").to_pylist()
    found = {int(row["image_id"].partition(".")[0]): row for row in rows}
    assert len(rows) == len(found) == IMAGES
    errors = {number: row["error"] for number, row in found.items() if row["error"]}
    assert errors.keys() == {ABORTS, GREEDY}
    assert errors[ABORTS] == "loading it ends the process (SIGABRT)"
    assert errors[GREEDY].startswith("loading it takes more than ")
    assert {found[number]["error_kind"] for number in errors} == {"final"}
    assert all(row["double"] == 2 * number for number, row in found.items() if number not in errors)
