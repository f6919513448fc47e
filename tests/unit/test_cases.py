"""Pictures and captions as people have them: what becomes of each kind."""

import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from captioner.config import SourceConfig
from captioner.errors import ImageError, ImageTooLargeError, SourceError
from captioner.images.load import Fit, load_image
from captioner.sources import open_source
from captioner.text import Vocabulary, clean
from tests.cases import make_cases
from tests.conftest import SHARED
from tests.sources import captions_of, read_all


@pytest.fixture(scope="module", params=["made here", "made by others"])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    program = SHARED / "cases/make_cases.py"
    if request.param == "made here":
        make_cases(folder)
    elif program.is_file():
        subprocess.run([sys.executable, program, folder], check=True, capture_output=True)
    else:
        pytest.skip(f"needs {program.name} in the folder {SHARED.name} beside the checkout")
    return folder


def captions(folder: Path, **options: object) -> dict[str, list[str]]:
    """Captions of each image; every image has some."""
    source = open_source(str(folder), SourceConfig.model_validate(options))
    found = captions_of(source)
    assert found.keys() == {row["image_id"] for row in read_all(source)}
    return found


def test_kaggles_flickr30k(cases: Path) -> None:
    assert captions(cases / "kaggle_flickr30k") == {
        "100.jpg": ['"Two" tall women , in hats , wait for a bus .', "Women at a bus stop ."],
        "200.jpg": ["A brown dog shakes itself .", "A wet dog beside a pond ."],
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("csv", {"a": ["one dog", "a dog stands"], "b": ["two cats", "cats sit"]}),
        ("jsonl", {"a": ["one dog"], "b": ["two cats"]}),
    ],
)
def test_image_folder(cases: Path, kind: str, expected: dict[str, list[str]]) -> None:
    folder = cases / f"imagefolder_{kind}"
    assert captions(folder) == {f"train/{name}.jpg": texts for name, texts in expected.items()}
    assert {row["split"] for row in read_all(open_source(str(folder)))} == {"train"}


def test_a_text_file_beside_each_image(cases: Path) -> None:
    assert captions(cases / "sidecars") == {
        "a.jpg": ["one dog", "a dog stands"],
        "b.png": ["two cats"],
    }
    assert open_source(str(cases / "sidecars")).left_out() == {"captions file": 2}


def test_encodings(cases: Path) -> None:
    expected = {"a.jpg": ["un café"]}
    assert captions(cases / "excel_utf16") == expected
    with pytest.raises(SourceError, match="source-options.encoding names another") as raised:
        open_source(str(cases / "latin1"))
    assert "\n" not in str(raised.value)
    assert captions(cases / "latin1", encoding="latin-1") == expected


def test_commas_without_quotation(cases: Path) -> None:
    assert captions(cases / "unquoted_commas") == {"a.jpg": ["a man, a dog, and a cat"]}


def test_no_header(cases: Path) -> None:
    with pytest.raises(SourceError, match="source-options.image-column and source-options.caption"):
        open_source(str(cases / "no_header"))
    found = captions(cases / "no_header", image_column="1", caption_columns=["2"])
    assert found == {"a.jpg": ["a dog"]}
    assert open_source(str(cases / "no_header"), SourceConfig(captions="none")).num_images() == 1


def test_images_that_are_not_there(cases: Path) -> None:
    told = r"2 of 3 captioned pictures are not there \(b.jpg, c.jpg\): source-options.missing skip"
    with pytest.raises(SourceError, match=told):
        open_source(str(cases / "absent_images"))
    assert captions(cases / "absent_images", missing="skip") == {"a.jpg": ["a dog"]}
    source = open_source(str(cases / "absent_images"), SourceConfig(missing="skip"))
    assert source.left_out() == {"missing picture": 2, "captions file": 1}


def test_names_are_compared_composed(cases: Path) -> None:
    name = unicodedata.normalize("NFD", "é.jpg")
    assert captions(cases / "decomposed_names") == {name: ["a dog"]}


def test_clutter(cases: Path) -> None:
    source = open_source(str(cases / "clutter"))
    assert [row["image_id"] for row in read_all(source)] == ["0.jpg", "1.jpg", "2.jpg"]
    assert source.left_out() == {
        "._ file": 2,
        ".nomedia file": 2,
        "@eaDir file": 1,
        "Thumbs.db": 1,
    }


def test_links(cases: Path) -> None:
    source = open_source(str(cases / "links"))
    assert [row["image_id"] for row in read_all(source)] == ["a.jpg", "b.jpg"]
    assert source.left_out() == {"broken link": 1, "circular link": 1}


def test_suffixes(cases: Path) -> None:
    source = open_source(str(cases / "suffixes"))
    named = ["a.jpg", "b.jfif", "c.jpe", "d.JPG", "f.avif"]
    assert [row["image_id"] for row in read_all(source)] == named
    assert source.left_out() == {"no suffix": 1, ".pdf": 1}
    source = open_source(str(cases / "suffixes"), SourceConfig(sniff=True))
    rows = read_all(source)
    assert [row["image_id"] for row in rows] == [*named[:4], "e", "f.avif"]
    assert source.left_out() == {".pdf": 1}
    for row in rows:
        assert load_image(row["bytes"], Fit((8, 8))).pixels.shape == (8, 8, 3)


def test_pictures_that_browsers_show(cases: Path) -> None:
    for path in (cases / "pictures").iterdir():
        if path.suffix == ".webp":
            with pytest.raises(ImageTooLargeError, match="8000x8000 pixels of WEBP take"):
                load_image(path.read_bytes(), Fit((8, 8)))
        else:
            assert load_image(path.read_bytes(), Fit((8, 8))).pixels.shape == (8, 8, 3)


def test_a_tiff_whose_numbers_overflow(shared: Path) -> None:
    with pytest.raises(ImageError):
        load_image((shared / "cases/tiff_overflow.tif").read_bytes(), Fit((8, 8)))


def test_chinese(cases: Path) -> None:
    (texts,) = captions(cases / "chinese").values()
    assert len(texts) == 2
    vocabulary = Vocabulary.build(map(clean, texts))
    assert set(vocabulary.words[4:]) == set("".join(texts))
    for text in texts:
        assert vocabulary.decode(vocabulary.encode(clean(text))) == text


def test_a_shard(cases: Path) -> None:
    found = captions(cases / "shard.tar")
    assert found == {f"shard/00000000{number}": ["a dog"] for number in range(3)}
    rows = read_all(open_source(str(cases / "shard.tar")))
    assert [row["error"] for row in rows] == [None] * 3
    assert load_image(rows[0]["bytes"], Fit((8, 8))).pixels.shape == (8, 8, 3)
    # A row with an error, as soon as it is loaded.
    with pytest.raises(ImageError):
        load_image(rows[2]["bytes"], Fit((8, 8)))
