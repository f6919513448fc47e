"""Pictures: what is drawn, where, and that no text can break them."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from captioner.plots import attention_maps, best_and_worst, caption_grid, plot_history
from captioner.plots.curves import draw_history
from captioner.plots.render import DPI, font, literal, text_width, wrap
from captioner.plots.trials import spread

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)


def photograph(
    color: tuple[int, int, int] = RED, height: int = 60, width: int = 80
) -> NDArray[np.uint8]:
    return np.full((height, width, 3), color, dtype=np.uint8)


def pixels(png: bytes) -> NDArray[np.uint8]:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def covered(png: bytes, color: tuple[int, int, int]) -> NDArray[np.bool_]:
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


def epoch(number: int, validation_loss: float | None, **more: float | None) -> SimpleNamespace:
    record = {
        "epoch": number,
        "train_loss": 4.0 / number,
        "validation_loss": validation_loss,
        "train_accuracy": 0.1 * number,
        "validation_accuracy": 0.05 * number,
        "validation_cider": None,
    }
    return SimpleNamespace(**record | more)


def test_history_marks_the_best_epoch() -> None:
    figure = draw_history([epoch(1, 3.0), epoch(2, 2.5), epoch(3, None), epoch(4, 2.75)], 2)
    (loss, accuracy) = figure.axes
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert labels == [
        ["train", "validation", "best epoch 2: 2.500"],
        ["train", "validation", "best epoch 2: 10.0%"],
    ]
    assert list(loss.lines[0].get_ydata()) == [4.0, 2.0, 4.0 / 3, 1.0]
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3, 4]


def test_history_shows_scores_of_captions_where_there_are_any() -> None:
    # The epoch that is published is not the one of the lowest loss, nor of the highest CIDEr-D of all.
    ciders = [0.9, 0.5, 0.7]
    records = [
        epoch(number, 3.0 + number, validation_cider=cider)
        for number, cider in enumerate(ciders, 1)
    ]
    figure = draw_history(records, 3)
    *_, scores = figure.axes
    assert scores.get_title(loc="left") == "CIDEr-D"
    labels = [text.get_text() for text in scores.get_legend().get_texts()]
    assert labels == ["validation, greedy"]
    marked = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert marked[-1] == "best epoch 3: 6.000"


def test_history_of_one_epoch_without_validation_is_drawn() -> None:
    assert pixels(plot_history([epoch(1, None, validation_accuracy=None)])).std() > 0


def test_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        plot_history([])


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (5, 2), (16, 4), (20, 5)])
def test_grid_of_any_number_of_images_draws_each_in_rows_of_four(count: int, rows: int) -> None:
    where = covered(caption_grid([photograph()] * count, ["a dog"] * count), RED)
    # A photograph starts wherever a covered row of pixels follows an uncovered one.
    assert np.count_nonzero(np.diff(where.any(axis=1).astype(int)) == 1) == rows
    assert np.count_nonzero(np.diff(where.any(axis=0).astype(int)) == 1) == min(count, 4)
    one = np.count_nonzero(covered(caption_grid([photograph()], ["a dog"]), RED))
    assert np.count_nonzero(where) == pytest.approx(count * one, rel=0.03)


def test_grid_shows_images_in_reading_order() -> None:
    png = caption_grid([photograph(c) for c in (RED, GREEN, BLUE)], ["a", "b", "c"], columns=2)
    red, green, blue = (np.argwhere(covered(png, c)).mean(axis=0) for c in (RED, GREEN, BLUE))
    assert red[0] == pytest.approx(green[0], abs=1)
    assert red[1] < green[1]
    assert blue[0] > red[0]
    assert blue[1] == pytest.approx(red[1], abs=1)


@pytest.mark.parametrize(("height", "width"), [(40, 120), (120, 40), (50, 50)])
def test_grid_keeps_proportions(height: int, width: int) -> None:
    where = np.argwhere(covered(caption_grid([photograph(RED, height, width)], ["a"]), RED))
    tall, wide = np.ptp(where, axis=0) + 1
    assert tall / wide == pytest.approx(height / width, rel=0.05)


def test_title_photograph_caption_and_references_come_below_each_other() -> None:
    def grid(title: str = "Test", caption: str = "a dog", *references: str) -> bytes:
        return caption_grid(
            [photograph()], [caption], [references or ("A dog .", "One")], title=title
        )

    others = grid("Best"), grid("Test", "a cat"), grid("Test", "a dog", "A cat .", "One")
    last = grid("Test", "a dog", "A dog .", "Two")
    title, caption, first, second = (middle(changed(grid(), one))[0] for one in (*others, last))
    assert title < middle(covered(grid(), RED))[0] < caption < first < second


@pytest.mark.parametrize("text", ["costs $5 and $6", "100% _a_ {b} \\alpha", "$$ and $\\frac{1}{$"])
def test_text_is_literal(text: str) -> None:
    png = caption_grid([photograph()], [text])
    below = pixels(png)[np.flatnonzero(covered(png, RED).any(axis=1)).max() + 4 :]
    columns = np.flatnonzero((below < 128).all(axis=-1).any(axis=0))
    assert np.ptp(columns) == pytest.approx(DPI * text_width(text, font(10, "bold")), rel=0.06)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        # Warnings are errors in these tests, so a missing glyph would fail here by itself.
        (
            "\u72ac dog \U0001f415 \ud800\n\tna\u00efve \x00",
            "\ufffd dog \ufffd \ufffd na\u00efve \ufffd",
        ),
        ("", "(empty)"),
    ],
)
def test_what_cannot_be_drawn_is_visible(text: str, shown: str) -> None:
    assert caption_grid([photograph()], [text]) == caption_grid([photograph()], [shown])
    assert literal("caf\u00e9 \u0436") == "caf\u00e9 \u0436"


@pytest.mark.parametrize("text", ["a dog " * 60, "w" * 300, "iiii WWWW " * 30])
def test_wrapped_lines_fit_their_width(text: str) -> None:
    lines = wrap(text, 2.0, font(10), max_lines=4)
    assert len(lines) == 4
    assert lines[-1].endswith("\u2026")
    assert max(text_width(line, font(10)) for line in lines) <= 2.0


def test_wrapping_loses_no_word() -> None:
    text = "two brown dogs run through the snow beside a very small red shed"
    lines = wrap(text, 1.5, font(10), max_lines=20)
    assert len(lines) > 2
    assert " ".join(lines) == text


@pytest.mark.parametrize(
    ("captions", "references", "complaint"),
    [(["a"], None, "as many captions"), (["a", "b"], [["a"]], "as many references")],
)
def test_unequal_lists_are_refused(
    captions: list[str], references: list[list[str]] | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        caption_grid([photograph()] * 2, captions, references)


def test_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        caption_grid([], [])


COLORS = (RED, GREEN, BLUE, (220, 200, 20), (200, 20, 200))


def ranked(scores: list[float], **options: object) -> bytes:
    """Photographs of as many colours."""
    images = [photograph(color) for color, _ in zip(COLORS, scores, strict=False)]
    return best_and_worst(images, ["a"] * len(scores), None, scores, **options)  # type: ignore[arg-type]


def rows_of_colors(png: bytes) -> list[list[tuple[int, int, int]]]:
    """The photographs of a picture by their colours, in reading order."""
    places = [(middle(found), color) for color in COLORS if (found := covered(png, color)).any()]
    rows: dict[int, list[tuple[float, tuple[int, int, int]]]] = {}
    for (row, column), color in places:
        rows.setdefault(round(row / 10), []).append((column, color))
    return [[color for _, color in sorted(rows[row])] for row in sorted(rows)]


def test_best_and_worst_are_ranked_and_disjoint() -> None:
    scores = [0.3, 0.9, 0.1, 0.5, 0.2]
    png = ranked(scores, count=2)
    assert rows_of_colors(png) == [[COLORS[1], COLORS[3]], [COLORS[2], COLORS[4]]]
    # A score is written under its photograph, with three decimals.
    worse = changed(png, ranked([0.3, 0.9, 0.1, 0.499, 0.2], count=2))
    row, column = middle(covered(png, COLORS[3]))
    left = np.flatnonzero(covered(png, COLORS[3]).any(axis=0)).min()
    assert middle(worse)[0] > row
    assert left < middle(worse)[1] < column
    # What the scores are is said over both parts, and by every photograph.
    named = changed(png, ranked(scores, count=2, score_name="Meteor!"))
    assert named[: int(row)].any()
    assert np.count_nonzero(np.diff(named.any(axis=1).astype(int)) == 1) >= 4


def test_best_and_worst_of_few_images_show_each_once() -> None:
    assert rows_of_colors(ranked([1.0, 2.0, 3.0])) == [[COLORS[2], COLORS[1]], [COLORS[0]]]
    assert rows_of_colors(ranked([1.0])) == [[COLORS[0]]]


def test_best_and_worst_refuse_a_score_that_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="nan"):
        best_and_worst([photograph()], ["c0"], None, [float("nan")])


def colored_center(png: bytes, panel: int) -> tuple[float, float]:
    """Centre of the coloured part of a panel of a grey photograph, in panel coordinates 0..1."""
    picture = pixels(png).astype(float)
    width = picture.shape[1]
    inches = width / 110
    left = (0.2 + panel * 2.15) / inches * width
    panel_pixels = picture[-int(2.2 * 110) : -int(0.2 * 110), round(left) : round(left) + 220]
    color = np.ptp(panel_pixels, axis=-1)
    rows, columns = np.mgrid[: color.shape[0], : color.shape[1]]
    total = color.sum()
    return float((rows * color).sum() / total / 220), float((columns * color).sum() / total / 220)


def test_attention_is_drawn_where_the_weight_is() -> None:
    attention = np.zeros((2, 49))
    attention[0, 0 * 7 + 6] = 1.0  # upper right
    attention[1, 5 * 7 + 1] = 1.0  # lower left
    grey = photograph((120, 120, 120), 70, 70)
    png = attention_maps(grey, ["dog", "$snow"], attention)
    assert colored_center(png, 1) == pytest.approx((0.5 / 7, 6.5 / 7), abs=0.05)
    assert colored_center(png, 2) == pytest.approx((5.5 / 7, 1.5 / 7), abs=0.05)
    # Words and the largest weights are written over the panels that they are of, and nothing else changes with them.
    places = [
        middle(changed(png, attention_maps(grey, words, attention * weight)))
        for words, weight in (
            (["cat", "$snow"], [[1], [1]]),
            (["dog", "$wind"], [[1], [1]]),
            (["dog", "$snow"], [[0.5], [1]]),
            (["dog", "$snow"], [[1], [0.5]]),
        )
    ]
    panels = [sum(place[1] > 110 * (0.2 + 2.15 * panel) for panel in range(3)) for place in places]
    assert panels == [2, 3, 2, 3]
    assert all(place[0] < 110 * 0.7 for place in places)


@pytest.mark.parametrize("shape", [(2, 48), (1, 49), (2, 7, 7), (2, 0)])
def test_attention_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one square grid each"):
        attention_maps(photograph(), ["a", "dog"], np.ones(shape))


def test_attention_of_many_words_and_no_weight_is_drawn() -> None:
    assert pixels(attention_maps(photograph(), ["w"] * 15, np.zeros((15, 49)))).std() > 0


def test_labels_too_close_are_spread_around_their_mean() -> None:
    assert spread([], 8) == []
    assert spread([0, 20, 40], 8) == [0, 20, 40]
    assert spread([10, 10, 30], 8) == [6, 14, 30]
    assert spread([0, 7, 14], 8) == [-1, 7, 15]
    # Two that move apart come too close to a third.
    assert spread([0, 9, 9], 8) == pytest.approx([-2, 6, 14])
