"""Pictures: what is drawn, where, and that no text can break them."""

from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from numpy.typing import NDArray
from PIL import Image

from captioner.plots import (
    Captioned,
    attention_maps,
    caption_grids,
    plot_history,
    plot_trials,
)
from captioner.plots.curves import draw_history
from captioner.plots.render import DPI, GREY, INK, fit, font

Color = tuple[int, int, int]
RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)
TRAIN, VALIDATION = (0x3B, 0x6F, 0xB6), (0xD1, 0x60, 0x3D)


def photograph(color: Color = RED, height: int = 60, width: int = 80) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def cell(
    caption: str = "a dog", color: Color = RED, references: tuple[str, ...] = (), note: str = ""
) -> Captioned:
    return Captioned("1.jpg", photograph(color), caption, references, note)


def pixels(png: bytes) -> NDArray[np.uint8]:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def covered(png: bytes, color: Color) -> NDArray[np.bool_]:
    """Where the picture shows a colour."""
    return (np.abs(pixels(png).astype(int) - color) < 12).all(axis=-1)


def changed(one: bytes, other: bytes) -> NDArray[np.bool_]:
    """Where two pictures of one size differ."""
    return (pixels(one) != pixels(other)).any(axis=-1)


def middle(where: NDArray[np.bool_]) -> tuple[float, float]:
    """Row and column around which something is."""
    assert where.any()
    row, column = np.argwhere(where).mean(axis=0)
    return float(row), float(column)


def amount(png: bytes, color: str) -> int:
    """Pixels of a colour of text."""
    red, green, blue = bytes.fromhex(color[1:])
    return int(np.count_nonzero(covered(png, (red, green, blue))))


@dataclass(frozen=True)
class Epoch:
    epoch: int
    validation_loss: float
    validation_cider: float | None = None
    train_loss: float | None = 2.3
    train_accuracy: float | None = 0.3
    train_cider: float | None = None
    validation_accuracy: float = 0.2


HISTORY = [
    Epoch(number, loss, cider)
    for number, (loss, cider) in enumerate([(3.0, 0.9), (2.5, 0.5), (2.75, 0.7)], 1)
]


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def test_history_marks_the_best_epoch() -> None:
    # The epoch that is published need not be that of the lowest loss, nor of the highest CIDEr-D of all.
    loss, accuracy, cider = draw_history(HISTORY, 3).axes
    assert legend(loss) == ["train", "validation", "best epoch 3: 2.750"]
    assert legend(accuracy) == ["train", "validation", "best epoch 3: 0.200"]
    assert legend(cider) == ["validation, greedy", "best epoch 3: 0.700"]
    assert [axes.get_title(loc="left") for axes in (loss, cider)] == [
        "Loss (nats per token)",
        "CIDEr-D",
    ]
    assert list(loss.lines[1].get_xdata()) == [1, 2, 3]
    assert list(loss.lines[1].get_ydata()) == [3.0, 2.5, 2.75]
    png = plot_history(HISTORY, 3)
    assert covered(png, TRAIN).sum() > 100
    assert covered(png, VALIDATION).sum() > 100


def test_history_has_no_cider_where_captions_were_not_scored() -> None:
    history = [replace(record, validation_cider=None) for record in HISTORY]
    assert len(draw_history(history, 1).axes) == 2
    narrow, wide = pixels(plot_history(history, 1)), pixels(plot_history(HISTORY, 1))
    assert 1.5 * narrow.shape[1] == pytest.approx(wide.shape[1], abs=1)


def test_history_of_drawn_captions_has_their_cider_and_no_train_loss() -> None:
    history = [
        replace(record, train_loss=None, train_accuracy=None, train_cider=0.4) for record in HISTORY
    ]
    panels = [legend(axes) for axes in draw_history(history, 1).axes]
    assert [[name for name in names if not name.startswith("best")] for names in panels] == [
        ["validation"], ["validation"], ["train, drawn", "validation, greedy"]
    ]  # fmt: skip


def test_history_of_one_epoch_is_drawn() -> None:
    assert pixels(plot_history([Epoch(1, 3.0)], 1)).std() > 0


def test_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        plot_history([], 1)


@dataclass(frozen=True)
class Trial:
    number: int
    hyperparameters: dict[str, str | int | float]
    status: str
    curve: list[tuple[int, float]]


def test_trials_of_every_status_are_drawn() -> None:
    trials = [
        Trial(0, {"width": 8, "optimizer": "adam"}, "finished", [(1, 3.0), (2, 2.5)]),
        Trial(1, {"width": 16, "optimizer": "adamw"}, "stopped", [(1, 3.5)]),
        Trial(2, {"width": 16, "optimizer": "adam"}, "failed", []),
        Trial(3, {"width": 8, "optimizer": "adamw"}, "failed", [(1, float("nan"))]),
    ]
    png = plot_trials(trials, 0, "validation_loss", largest=False)
    assert png == plot_trials(trials, 0, "validation_loss", largest=False)
    assert min(pixels(png).shape[:2]) > 500
    best = covered(png, VALIDATION)
    # Among the curves, and in the diagram of each hyperparameter.
    assert best[: len(best) // 2].sum() > 100
    assert best[len(best) // 2 :].sum() > 100


def test_trials_that_differ_in_nothing_have_curves_alone() -> None:
    trials = [Trial(n, {"width": 8}, "finished", [(1, 3.0), (2, 2.0 + n)]) for n in range(2)]
    small = pixels(plot_trials(trials, 0, "validation_cider", largest=True))
    ranges = [
        Trial(n, {"width": 8, "rate": 1e-4 * (n + 1), "decay": n / 10}, "finished", [(1, 1.0 + n)])
        for n in range(12)
    ]
    assert len(small) < len(pixels(plot_trials(ranges, 0, "validation_cider", largest=True)))


def test_a_search_without_trials_is_refused() -> None:
    with pytest.raises(ValueError, match="no trials"):
        plot_trials([], 0, "validation_loss", largest=False)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (5, 2), (16, 4), (20, 5)])
def test_grid_of_any_number_of_images_draws_each_in_rows_of_four(count: int, rows: int) -> None:
    where = covered(caption_grids({"": [cell()] * count}), RED)
    # A photograph starts wherever a covered row of pixels follows an uncovered one.
    assert np.count_nonzero(np.diff(where.any(axis=1).astype(int)) == 1) == rows
    assert np.count_nonzero(np.diff(where.any(axis=0).astype(int)) == 1) == min(count, 4)
    one = np.count_nonzero(covered(caption_grids({"": [cell()]}), RED))
    assert np.count_nonzero(where) == pytest.approx(count * one, rel=0.03)


def test_grid_shows_images_in_reading_order() -> None:
    png = caption_grids({"": [cell(color=color) for color in (RED, GREEN, BLUE)]}, columns=2)
    red, green, blue = (np.argwhere(covered(png, c)).mean(axis=0) for c in (RED, GREEN, BLUE))
    assert red[0] == pytest.approx(green[0], abs=1)
    assert red[1] < green[1]
    assert blue[0] > red[0]
    assert blue[1] == pytest.approx(red[1], abs=1)


def test_sections_stand_below_each_other_under_their_headings() -> None:
    sections = {"Highest": [cell(color=RED)], "Lowest": [cell(color=BLUE)]}
    png = caption_grids(sections)
    first, second = (np.argwhere(covered(png, color))[:, 0] for color in (RED, BLUE))
    assert first.max() < second.min()
    bare = caption_grids({"": [cell(color=RED), cell(color=BLUE)]}, columns=1)
    assert amount(png, INK) > amount(bare, INK)
    assert len(pixels(caption_grids({**sections, "Others": []}))) == len(pixels(png))


@pytest.mark.parametrize(("height", "width"), [(40, 120), (120, 40), (50, 50)])
def test_grid_keeps_proportions(height: int, width: int) -> None:
    one = Captioned("1.jpg", photograph(RED, height, width), "a")
    where = np.argwhere(covered(caption_grids({"": [one]}), RED))
    tall, wide = np.ptp(where, axis=0) + 1
    assert tall / wide == pytest.approx(height / width, rel=0.05)


def test_captions_are_dark_and_references_grey() -> None:
    bare = caption_grids({"": [cell()]})
    noted = caption_grids({"": [cell(note="CIDEr-D 1.000")]})
    full = caption_grids({"": [cell(references=("A dog runs on the beach .",) * 5)]})
    assert amount(bare, INK) > 20
    assert amount(noted, INK) > amount(bare, INK)
    assert amount(full, GREY) > 3 * amount(bare, GREY)
    assert amount(full, INK) == pytest.approx(amount(bare, INK), rel=0.1)
    assert len(pixels(full)) > len(pixels(noted)) > len(pixels(bare))


def test_heading_photograph_caption_note_and_references_come_below_each_other() -> None:
    def grid(heading: str, caption: str, note: str, first: str, second: str) -> bytes:
        return caption_grids({heading: [cell(caption, RED, (first, second), note)]})

    texts = ["Best", "a dog", "CIDEr-D 1", "A dog .", "One"]
    png = grid(*texts)
    rows = [
        middle(changed(png, grid(*texts[:place], "Other", *texts[place + 1 :])))[0]
        for place in range(len(texts))
    ]
    rows.insert(1, middle(covered(png, RED))[0])
    assert rows == sorted(rows)


def test_a_picture_that_is_missing_is_a_grey_field_with_its_id() -> None:
    png = caption_grids({"": [Captioned("1.jpg", None, "a dog")]})
    assert covered(png, (0xD9, 0xD9, 0xD9)).sum() > 10_000
    assert amount(png, GREY) > 20


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "\u72ac dog \U0001f415 \ud800\n\tna\u00efve \x00",
            "\ufffd dog \ufffd \ufffd na\u00efve \ufffd",
        ),
        ("", "(empty)"),
    ],
)
def test_what_cannot_be_drawn_is_visible(text: str, shown: str) -> None:
    assert caption_grids({"": [cell(text)]}) == caption_grids({"": [cell(shown)]})
    assert fit(text, 9.0, font(10), 1) in (shown, "")
    assert fit("caf\u00e9 \u0436", 9.0, font(10), 1) == "caf\u00e9 \u0436"


def test_equal_pictures_are_equal_bytes() -> None:
    once, again = (caption_grids({"a": [cell(references=("A dog .",))]}) for _ in range(2))
    assert once == again
    assert once != caption_grids({"a": [cell(references=("A cat .",))]})


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 and $6",
        "$\\frac{1}{",
        "100% _a_ {b} \\alpha",
        "$$",
        "\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a\u5954\u8dd1" * 20,
        "\u0e2a\u0e38\u0e19\u0e31\u0e02\u0e27\u0e34\u0e48\u0e07" * 20,
        "\u0643\u0644\u0628 \u064a\u062c\u0631\u064a",
        "\U0001f415 \ud800\n\tna\u00efve \x00",
        "a dog " * 500,
        "w" * 3000,
    ],
)
def test_any_text_is_drawn_without_a_warning(text: str) -> None:
    # Warnings are errors in these tests, so a missing glyph fails by itself.
    one = Captioned(text, None, text, [text] * 7, text)
    assert max(pixels(caption_grids({"": [one, one]})).shape) < 1200
    attention_maps(photograph(), [text[:200]], np.ones((1, 7, 7)) / 49)


def text_width(line: str, properties: FontProperties) -> float:
    width, _, _ = TextToPath().get_text_width_height_descent(line, properties, ismath=False)
    return float(width) / 72


@pytest.mark.parametrize("text", ["costs $5 and $6", "100% _a_ {b} \\alpha", "$$ and $\\frac{1}{$"])
def test_text_is_literal(text: str) -> None:
    png = caption_grids({"": [cell(text)]})
    below = pixels(png)[np.flatnonzero(covered(png, RED).any(axis=1)).max() + 4 :]
    columns = np.flatnonzero((below < 128).all(axis=-1).any(axis=0))
    assert np.ptp(columns) == pytest.approx(DPI * text_width(text, font(10, "bold")), rel=0.06)


@pytest.mark.parametrize("text", ["a dog " * 60, "w" * 300, "iiii WWWW " * 30])
@pytest.mark.parametrize("lines", [1, 4])
def test_lines_fit_their_width_and_end_in_an_ellipsis(text: str, lines: int) -> None:
    found = fit(text, 2.0, font(10), lines).split("\n")
    assert len(found) == lines
    assert len(found[-1]) > 8
    assert found[-1].endswith("\u2026")
    assert max(text_width(line, font(10)) for line in found) <= 2.0


def test_wrapping_loses_no_word() -> None:
    text = "two brown dogs run through the snow beside a very small red shed"
    lines = fit(text, 1.5, font(10), 20).split("\n")
    assert len(lines) > 2
    assert " ".join(lines) == text


@pytest.mark.parametrize("sections", [{}, {"": []}])
def test_grid_of_nothing_is_refused(sections: dict[str, list[Captioned]]) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        caption_grids(sections)


def colored_center(png: bytes, panel: int, panels: int) -> tuple[float, float]:
    """Centre of the coloured part of a panel: fractions of the height and width of its grey photograph."""
    picture = pixels(png).astype(int)
    width = picture.shape[1] / panels
    part = picture[:, round(panel * width) : round((panel + 1) * width)]
    color = np.ptp(part, axis=-1)
    grey = np.argwhere((color > 0) | (np.abs(part[..., 0] - 128) < 4))
    (top, left), (bottom, right) = grey.min(axis=0), grey.max(axis=0)
    color = color[top : bottom + 1, left : right + 1]
    rows, columns = np.mgrid[: color.shape[0], : color.shape[1]]
    total = color.sum()
    return (
        float((rows * color).sum() / total / color.shape[0]),
        float((columns * color).sum() / total / color.shape[1]),
    )


GRAY = (120, 120, 120)


@pytest.mark.parametrize("grid", [(7, 7), (4, 8), (16, 16)])
def test_attention_is_drawn_where_the_weight_is(grid: tuple[int, int]) -> None:
    rows, columns = grid
    attention = np.zeros((2, rows, columns))
    attention[0, 0, columns - 1] = 1.0
    attention[1, rows - 2, 1] = 1.0
    png = attention_maps(photograph(GRAY, 70, 70), ["dog", "$snow"], attention)
    upper, lower = 0.5 / rows, (rows - 1.5) / rows
    right, left = (columns - 0.5) / columns, 1.5 / columns
    assert colored_center(png, 1, 3) == pytest.approx((upper, right), abs=0.06)
    assert colored_center(png, 2, 3) == pytest.approx((lower, left), abs=0.06)


def test_words_and_weights_are_written_at_the_panels_that_they_are_of() -> None:
    attention = np.zeros((2, 7, 7))
    attention[:, 3, 3] = 1.0
    photo = photograph(GRAY, 70, 70)
    png = attention_maps(photo, ["dog", "$snow"], attention)
    rows, width = pixels(png).shape[:2]
    for words, weights, panel, above in (
        (["cat", "$snow"], (1.0, 1.0), 1, True),
        (["dog", "$wind"], (1.0, 1.0), 2, True),
        (["dog", "$snow"], (0.5, 1.0), 1, False),
        (["dog", "$snow"], (1.0, 0.5), 2, False),
    ):
        other = attention_maps(photo, words, attention * np.reshape(weights, (2, 1, 1)))
        row, column = middle(changed(png, other))
        assert column * 3 // width == panel
        assert (row < rows / 4) if above else (row > rows * 3 / 4)


def test_attention_lies_over_the_part_that_the_encoder_saw() -> None:
    attention = np.zeros((1, 7, 7))
    attention[0, 3, 6] = 1.0
    # The centre of a picture twice as wide as it is high.
    png = attention_maps(photograph(GRAY, 50, 100), ["dog"], attention, (25, 0, 75, 50))
    assert colored_center(png, 1, 2) == pytest.approx((0.5, 0.25 + 6.5 / 14), abs=0.05)


@pytest.mark.parametrize("shape", [(2, 49), (1, 7, 7), (2, 7, 0), (2, 0, 7)])
def test_attention_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one grid each"):
        attention_maps(photograph(), ["a", "dog"], np.ones(shape))


def test_attention_of_many_words_and_no_weight_is_drawn() -> None:
    assert pixels(attention_maps(photograph(), ["w"] * 15, np.zeros((15, 7, 7)))).std() > 0
