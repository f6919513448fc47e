"""Pictures: what is drawn, where, and that no text can break them."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from captioner.plots import attention_maps, best_and_worst, caption_grid, plot_history
from captioner.plots.render import font, literal, text_width, wrap
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


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is put on a figure."""
    texts: list[str] = []
    draw = Figure.text

    def record(self: Figure, x: float, y: float, text: str, **options: object) -> object:
        texts.append(text)
        return draw(self, x, y, text, **options)

    monkeypatch.setattr(Figure, "text", record)
    return texts


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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures with learning curves, instead of their pictures."""
    drawn: list[Figure] = []
    monkeypatch.setattr("captioner.plots.curves.to_png", lambda figure: drawn.append(figure) or b"")
    return drawn


def test_history_marks_the_best_epoch(figures: list[Figure]) -> None:
    plot_history([epoch(1, 3.0), epoch(2, 2.5), epoch(3, None), epoch(4, 2.75)], 2)
    (loss, accuracy) = figures[0].axes
    labels = [
        [text.get_text() for text in axes.get_legend().get_texts()] for axes in figures[0].axes
    ]
    assert labels == [
        ["train", "validation", "best epoch 2: 2.500"],
        ["train", "validation", "best epoch 2: 10.0%"],
    ]
    assert list(loss.lines[0].get_ydata()) == [4.0, 2.0, 4.0 / 3, 1.0]
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3, 4]


def test_history_shows_scores_of_captions_where_there_are_any(figures: list[Figure]) -> None:
    # The epoch that is published is not the one of the lowest loss, nor of the highest CIDEr-D of all.
    ciders = [0.9, 0.5, 0.7]
    records = [
        epoch(number, 3.0 + number, validation_cider=cider)
        for number, cider in enumerate(ciders, 1)
    ]
    plot_history(records, 3)
    *_, scores = figures[0].axes
    assert scores.get_title(loc="left") == "CIDEr-D"
    labels = [text.get_text() for text in scores.get_legend().get_texts()]
    assert labels == ["validation, greedy"]
    marked = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
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


def test_grid_writes_title_captions_and_references(written: list[str]) -> None:
    caption_grid([photograph()], ["a dog runs"], [["A dog .", "One dog ."]], title="Test split")
    assert written == ["Test split", "a dog runs", "A dog .", "One dog ."]


@pytest.mark.parametrize("text", ["costs $5 and $6", "$\\frac{1}{", "100% _a_ {b} \\alpha", "$$"])
def test_text_is_literal(written: list[str], text: str) -> None:
    caption_grid([photograph()], [text], [[text]])
    assert written == [text, text]


def test_characters_without_a_glyph_become_replacement_marks(written: list[str]) -> None:
    # Warnings are errors in these tests, so a missing glyph would fail here by itself.
    caption_grid([photograph()], ["\u72ac dog \U0001f415 \ud800\n\tna\u00efve \x00"])
    assert written == ["\ufffd dog \ufffd \ufffd na\u00efve \ufffd"]
    assert literal("caf\u00e9 \u0436") == "caf\u00e9 \u0436"


def test_empty_caption_is_visible(written: list[str]) -> None:
    caption_grid([photograph()], [""])
    assert written == ["(empty)"]


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


def test_best_and_worst_are_ranked_and_disjoint(written: list[str]) -> None:
    captions = ["c0", "c1", "c2", "c3", "c4"]
    best_and_worst([photograph()] * 5, captions, None, [0.3, 0.9, 0.1, 0.5, 0.2], count=2)
    assert written == [
        *("Highest CIDEr-D", "c1", "CIDEr-D 0.900", "c3", "CIDEr-D 0.500"),
        *("Lowest CIDEr-D", "c2", "CIDEr-D 0.100", "c4", "CIDEr-D 0.200"),
    ]


def test_best_and_worst_of_few_images_show_each_once(written: list[str]) -> None:
    best_and_worst([photograph()] * 3, ["c0", "c1", "c2"], None, [1.0, 2.0, 3.0], "score")
    assert [text for text in written if text.startswith("c")] == ["c2", "c1", "c0"]
    written.clear()
    best_and_worst([photograph()], ["c0"], None, [1.0], "score")
    assert written == ["Highest score", "c0", "score 1.000"]


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


def test_attention_is_drawn_where_the_weight_is(written: list[str]) -> None:
    attention = np.zeros((2, 49))
    attention[0, 0 * 7 + 6] = 1.0  # upper right
    attention[1, 5 * 7 + 1] = 1.0  # lower left
    grey = photograph((120, 120, 120), 70, 70)
    png = attention_maps(grey, ["dog", "$snow"], attention)
    assert written == ["", "", "dog", "peak 100.0%", "$snow", "peak 100.0%"]
    assert colored_center(png, 1) == pytest.approx((0.5 / 7, 6.5 / 7), abs=0.05)
    assert colored_center(png, 2) == pytest.approx((5.5 / 7, 1.5 / 7), abs=0.05)


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
