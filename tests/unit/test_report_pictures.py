"""The pictures of a report: which images they show, and where the decoder looked."""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from captioner.evaluation.pictures import choose_images, draw_report
from captioner.images.load import Fit

COLORS = [(220, 20, 20), (20, 200, 20), (20, 20, 220), (200, 200, 20), (200, 20, 200)]
CIDER = [0.1, 2.0, 1.0, 0.5, 0.2]
SQUASH, CROP = Fit((40, 40)), Fit((40, 40), "crop")
IDS = [f"{number}.jpg" for number in range(len(COLORS))]


def scored(attended: Sequence[int] = ()) -> pa.Table:
    """Five images, the decoder having looked at the upper right cell of a 2x3 grid in some of them."""
    looked = [[[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]] * 2 if n in attended else None for n in range(5)]
    return pa.table(
        {
            "image_id": IDS,
            "caption": ["a dog"] * 5,
            "references": [["A dog."]] * 5,
            "cider": pa.array(CIDER, pa.float32()),
            "words": pa.array([one and ["a", "dog"] for one in looked], pa.list_(pa.string())),
            "attention": pa.array(looked, pa.list_(pa.list_(pa.list_(pa.float32())))),
        }
    )


def thumbnails(image_ids: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for name in image_ids:
        file = io.BytesIO()
        Image.new("RGB", (60, 40), COLORS[IDS.index(name)]).save(file, "PNG")
        found[name] = file.getvalue()
    return found


def draw(
    table: pa.Table, chosen: list[str], missing: Sequence[str] = (), fit: Fit = SQUASH
) -> dict[str, bytes]:
    def those_left(image_ids: Sequence[str]) -> dict[str, bytes]:
        return thumbnails([name for name in image_ids if name not in missing])

    return dict(draw_report(table, chosen, those_left, fit=fit))


def places(png: bytes) -> dict[int, tuple[float, float]]:
    """Row and column of the middle of each image that is shown."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    found = {}
    for number, color in enumerate(COLORS):
        where = np.argwhere((np.abs(pixels - color) < 12).all(axis=-1))
        if len(where) > 1000:
            found[number] = (float(where[:, 0].mean()), float(where[:, 1].mean()))
    return found


def test_the_choice_is_drawn_by_seed() -> None:
    names = [str(number) for number in range(100)]
    chosen = choose_images(names, 0)
    assert chosen == choose_images(names, 0) != choose_images(names, 1)
    assert len(set(chosen)) == 16
    assert set(choose_images(names[:3], 0)) == set(names[:3])


def test_the_grid_shows_the_chosen_in_their_order() -> None:
    shown = places(draw(scored(), [IDS[4], IDS[0], IDS[2]])["grid.png"])
    assert sorted(shown, key=lambda number: shown[number][1]) == [4, 0, 2]


def test_best_and_worst_are_ranked_and_disjoint() -> None:
    shown = places(draw(scored(), IDS[:1])["best_and_worst.png"])
    rows = sorted({round(row) for row, _ in shown.values()})
    assert len(rows) == 2
    highest, lowest = (
        sorted((n for n in shown if round(shown[n][0]) == row), key=lambda n: shown[n][1])
        for row in rows
    )
    assert (highest, lowest) == ([1, 2, 3], [0, 4])


def test_a_single_image_is_the_best() -> None:
    assert list(places(draw(scored()[:1], IDS[:1])["best_and_worst.png"])) == [0]


def test_attention_is_drawn_of_images_that_have_it() -> None:
    drawn = draw(scored(attended=(1, 3)), [IDS[2], IDS[3], IDS[1]])
    assert set(drawn) == {"grid.png", "best_and_worst.png", "attention/1.png", "attention/2.png"}


def test_a_report_goes_without_thumbnails(caplog: pytest.LogCaptureFixture) -> None:
    drawn = draw(scored(attended=(0, 1)), IDS[:2], missing=IDS[1:])
    assert set(drawn) == {"grid.png", "best_and_worst.png", "attention/0.png"}
    assert list(places(drawn["grid.png"])) == [0]
    assert "4 of the report's 5 pictures are grey" in caplog.text


def test_attention_lies_over_the_part_that_the_encoder_saw() -> None:
    def right_of_the_middle(fit: Fit) -> float:
        png = draw(scored(attended=(3,)), [IDS[3]], fit=fit)["attention/0.png"]
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
        coloured = np.ptp(pixels, axis=-1)[:, pixels.shape[1] // 3 : pixels.shape[1] * 2 // 3]
        return float(coloured.sum(axis=0) @ np.linspace(-1, 1, coloured.shape[1]) / coloured.sum())

    # The last of three columns: of the whole picture, 60 pixels wide, or of its middle 40.
    whole, centre = right_of_the_middle(SQUASH), right_of_the_middle(CROP)
    assert centre / whole == pytest.approx(40 / 60, abs=0.08)
