"""What the package offers to who imports it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import captioner
from captioner import Captioner, FeatureStore
from captioner.errors import ImageError, StoreError
from tests.models import write_model
from tests.pictures import picture
from tests.stores import write_store


def test_public_names_are_there_and_come_late() -> None:
    assert all(hasattr(captioner, name) for name in captioner.__all__)
    assert {*captioner.__all__} <= {*dir(captioner)}
    assert {*captioner.__all__} == {*captioner._HOMES}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        captioner.nothing  # noqa: B018
    program = "import sys, captioner; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "False False\n"


def test_pictures_are_captioned_from_bytes_paths_and_uris(tmp_path: Path) -> None:
    loaded = Captioner.load(write_model(tmp_path / "model"), device="cpu")
    file = tmp_path / "a dög #1.jpg"
    file.write_bytes(picture(1))
    captions = loaded.caption([picture(1), file, str(file), file.as_uri()])
    assert len({str(caption) for caption in captions}) == 1
    with pytest.raises(StoreError, match="cannot read"):
        loaded.caption([tmp_path / "absent.jpg"])
    with pytest.raises(ImageError, match="image 2 of 2"):
        loaded.caption([picture(1), b"rubbish"])


@pytest.mark.parametrize(("kind", "shown"), [("merge", "jpeg"), ("adaptive_attention", "png")])
def test_a_notebook_shows_picture_caption_and_attention(
    tmp_path: Path, kind: str, shown: str
) -> None:
    loaded = Captioner.load(write_model(tmp_path / "model", kind), device="cpu")  # type: ignore[arg-type]
    (caption,) = loaded.caption([picture(1)])
    page = caption._repr_html_()
    assert f'<img src="data:image/{shown};base64,' in page
    assert caption.text in page
    (bare,) = loaded.caption_pixels(np.zeros((1, 224, 224, 3), np.uint8))
    assert "<img" not in bare._repr_html_()


def test_a_store_opens_in_other_libraries(tmp_path: Path) -> None:
    images = {"train": 4, "validation": 2}
    store = FeatureStore.open(write_store(tmp_path / "store", images, grid=True))
    table = store.to_arrow()
    assert len(table) == 8  # one of each split is rejected
    assert {"image_id", "uri", "pooled", "grid", "error"} <= set(table.column_names)
    assert isinstance(table.schema.field("pooled").type, pa.FixedShapeTensorType)
    frame = store.to_pandas(["pooled", "image_id", "grid"])
    assert list(frame.columns) == ["pooled", "image_id", "grid"]
    tensors = store.to_torch("train", ("pooled", "grid"))
    by_id = frame.set_index("image_id")
    for row, name in enumerate(store.image_ids("train")):
        for column in ("pooled", "grid"):
            np.testing.assert_array_equal(tensors[column][row].numpy(), by_id.loc[name, column])
    with pytest.raises(StoreError, match="has no nothing; it has image_id"):
        store.to_arrow(["nothing"])
