"""Caption file formats in their real schemas, and what is wrong with files people have."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources.captions import CaptionFile, parse_captions
from captioner.sources.nearby import looks_like_captions

TOKENS = (
    "1000268201_693b08cb0e.jpg#0\tA child in a pink dress is climbing up a set of stairs .\n"
    "1000268201_693b08cb0e.jpg#1\tA girl going into a wooden building .\n"
    "1001773457_577c3a7d70.jpg#0\tA black dog and a spotted dog are fighting\n"
)
KARPATHY: dict[str, Any] = {
    "images": [
        {
            "filepath": "val2014",
            "sentids": [0, 1],
            "filename": "COCO_val2014_000000391895.jpg",
            "imgid": 0,
            "split": split,
            "sentences": [
                {
                    "tokens": ["a", "man"],
                    "raw": "A man with a red helmet. ",
                    "imgid": 0,
                    "sentid": 0,
                },
                {
                    "tokens": ["a", "man"],
                    "raw": "A man rides a motor bike.",
                    "imgid": 0,
                    "sentid": 1,
                },
            ],
            "cocoid": 391895,
        }
        for split in ["restval"]
    ]
    + [
        {
            "sentids": [2],
            "imgid": 1,
            "sentences": [{"tokens": ["dog"], "raw": "A dog.", "imgid": 1, "sentid": 2}],
            "split": "val",
            "filename": "2.jpg",
        }
    ],
    "dataset": "coco",
}
COCO: dict[str, Any] = {
    "info": {"year": 2014},
    "licenses": [],
    "images": [
        {"license": 5, "file_name": "COCO_train2014_000000057870.jpg", "height": 480, "id": 57870},
        {"license": 5, "file_name": "COCO_train2014_000000384029.jpg", "height": 429, "id": 384029},
    ],
    "annotations": [
        {"image_id": 57870, "id": 787980, "caption": "A restaurant has modern wooden tables.\n"},
        {"image_id": 57870, "id": 789366, "caption": "A long restaurant table."},
    ],
}


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_flickr_tokens_are_read_in_index_order() -> None:
    lines = TOKENS.splitlines()
    shuffled = "\r\n".join([lines[1], lines[2], lines[0]]).encode()
    for data in (TOKENS.encode(), shuffled, b"\xef\xbb\xbf" + TOKENS.encode()):
        found = parse_captions("Flickr8k.token.txt", data)
        assert found.captions == {
            "1000268201_693b08cb0e.jpg": [
                "A child in a pink dress is climbing up a set of stairs .",
                "A girl going into a wooden building .",
            ],
            "1001773457_577c3a7d70.jpg": ["A black dog and a spotted dog are fighting"],
        }
        assert found.splits == {}


def test_unicode_separators_inside_a_caption_do_not_end_its_line() -> None:
    found = parse_captions("results.token", "1.jpg#0\ta dog\u2028runs\x85fast\n".encode())
    assert found.captions == {"1.jpg": ["a dog\u2028runs\x85fast"]}


def test_karpathy_json_gives_splits_and_joins_the_file_path() -> None:
    found = parse_captions("dataset_coco.json", as_bytes(KARPATHY))
    coco_name = "val2014/COCO_val2014_000000391895.jpg"
    assert found.captions == {
        coco_name: ["A man with a red helmet.", "A man rides a motor bike."],
        "2.jpg": ["A dog."],
    }
    assert found.splits == {coco_name: "restval", "2.jpg": "val"}


def test_coco_json_keeps_images_without_captions() -> None:
    found = parse_captions("captions_train2014.json", as_bytes(COCO))
    assert found.captions == {
        "COCO_train2014_000000057870.jpg": [
            "A restaurant has modern wooden tables.",
            "A long restaurant table.",
        ],
        "COCO_train2014_000000384029.jpg": [],
    }
    assert found.splits == {}


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\n1.jpg,"A black dog , and a cat ."\n1.jpg,Two dogs\n2.jpg,A "small" cat\n',
        'filename\tcaption\n1.jpg\tA black dog , and a cat .\n1.jpg\tTwo dogs\n2.jpg\tA "small" cat\n',
        "image_name| comment_number| comment\n1.jpg| 0| A black dog , and a cat .\n"
        '1.jpg| 1| Two dogs\n2.jpg| 0| A "small" cat\n',
        '\ufeffFile_Name;Caption\r\n1.jpg;A black dog , and a cat .\r\n1.jpg;Two dogs\r\n2.jpg;A "small" cat',
    ],
    ids=["comma", "tab", "bar", "semicolon"],
)
def test_tables_are_read_whatever_their_delimiter(text: str) -> None:
    assert parse_captions("captions.csv", text.encode()).captions == {
        "1.jpg": ["A black dog , and a cat .", "Two dogs"],
        "2.jpg": ['A "small" cat'],
    }


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        # What keeps to the rules of CSV is read by them, lines inside of quotation marks too.
        ('image,caption\n1.jpg,"A ""big"" dog,\nruns"\n', ['A "big" dog,\nruns']),
        # What does not keeps its marks, and no mark swallows the lines after it.
        ('image,caption\n1.jpg,"A dog\n1.jpg,A cat"\n', ['"A dog', 'A cat"']),
        ('image\tcaption\n1.jpg\t"Two" dogs\n1.jpg\t"Two dogs"\n', ['"Two" dogs', "Two dogs"]),
        ("image,caption\n1.jpg,A man, a dog, and a cat\n", ["A man, a dog, and a cat"]),
        ("caption,image\nA man, a dog, and a cat,1.jpg\n", ["A man, a dog, and a cat"]),
        ('\timage\tcaption\n0\t1.jpg\tA dog\n1\t1.jpg\tA cat\n', ["A dog", "A cat"]),
        (",image,caption\n0,1.jpg,A dog\n", ["A dog"]),
        ("sep=;\nimage;caption\n1.jpg;A dog, running\n", ["A dog, running"]),
        ("image,caption\r1.jpg,A dog\r1.jpg,A cat", ["A dog", "A cat"]),
        ("image,caption_1,caption_0,other\n1.jpg,B,A,C\n", ["A", "B"]),
        ("img_path,caption1,caption2\nx/1.jpg,A,\n", ["A"]),
        ('filename,raw\n1.jpg,"[""A dog"", ""A cat""]"\n', ["A dog", "A cat"]),
        ("filename,sentences_raw\n1.jpg,['A dog' \"A cat's\"]\n", ["A dog", "A cat's"]),
        ("image_id,path,Caption\n7,1.jpg,A dog\n", ["A dog"]),
        ("strange,text\n1.jpg,A dog\n", ["A dog"]),
        ('{"image": "1.jpg", "text": "A dog"}\n{"image": "1.jpg", "text": "A cat"}\n', ["A dog", "A cat"]),
        ('[{"image": "1.jpg", "caption": ["A dog", "A cat"], "image_id": 3}]', ["A dog", "A cat"]),
        ('{"1.jpg": ["A dog"]}', ["A dog"]),
        ('{"1.jpg": {"caption": "A dog"}}', ["A dog"]),
        ('{"image": {"0": "1.jpg", "1": "1.jpg"}, "text": {"0": "A dog", "1": "A cat"}}', ["A dog", "A cat"]),
        ('{"data": [{"file_name": "1.jpg", "caption_en": "A dog"}], "n": 1}', ["A dog"]),
    ],
)  # fmt: skip
def test_tables_and_records_as_people_write_them(text: str, captions: list[str]) -> None:
    (found,) = parse_captions("f", text.encode()).captions.values()
    assert found == captions


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides_the_encoding(encoding: str) -> None:
    data = "image\tcaption\n1.jpg\tun caf\u00e9\n".encode(encoding)
    assert parse_captions("f", data).captions == {"1.jpg": ["un caf\u00e9"]}


@pytest.mark.parametrize(
    ("encoding", "asked"),
    [("latin-1", "latin-1"), ("utf-8", "latin-1"), ("utf-16-le", "utf-16-le"), ("shift-jis", "cp932"), ("hz", "hz")],
)  # fmt: skip
def test_an_encoding_is_asked_for(encoding: str, asked: str) -> None:
    caption = {"shift-jis": "犬が走る", "hz": "一只狗"}.get(encoding, "un café")
    data = f"image,caption\n1.jpg,{caption}\n".encode(encoding)
    found = parse_captions("f", data, SourceConfig(encoding=asked))
    assert found.captions == {"1.jpg": [caption]}


def test_columns_are_named_by_flags() -> None:
    data = "who,what,qui,when,no\n1.jpg,A dog,Un chien,dev,17\n".encode("latin-1")
    options = SourceConfig(
        image_column="Who", caption_columns=("qui", "what"), split_column="when", id_column="no"
    )
    found = parse_captions("f", data, options)
    assert found == CaptionFile({"1.jpg": ["Un chien", "A dog"]}, {"1.jpg": "dev"}, {"1.jpg": "17"})
    numbers = SourceConfig(image_column="1", caption_columns=("2",))
    found = parse_captions("f", b"1.jpg,A dog, too\n2.jpg,A cat\n", numbers)
    assert found.captions == {"1.jpg": ["A dog, too"], "2.jpg": ["A cat"]}
    for flag in ("image_column", "split_column", "id_column"):
        wrong = options.model_copy(update={flag: "x"})
        told = (
            f"no column 'x', which source-options.{flag.replace('_', '-')} names; its columns are"
        )
        with pytest.raises(SourceError, match=told):
            parse_captions("f", data, wrong.model_copy(update={"encoding": "latin-1"}))
    with pytest.raises(SourceError, match="captions in columns caption_de, caption_en: choose"):
        parse_captions("f", b"image,caption_en,caption_de\n1.jpg,A,B\n")
    with pytest.raises(SourceError, match="'latin-99' is no encoding of text"):
        parse_captions("f", data, SourceConfig(encoding="latin-99"))


def changed(value: dict[str, Any], key: str, entry: Any) -> bytes:
    return as_bytes(value | {key: [*value[key], entry]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe1", "f: not utf-16 text"),
        (
            b"image,caption\n1.jpg,un caf\xe9\n",
            "f: not utf-8 text (invalid continuation byte at byte 26)",
        ),
        (b"{", "f: not JSON"),
        (b'{"images": 3}', "f: not captions"),
        (b'{"images": ["1.jpg"], "info": 1}', "f: not captions"),
        (
            b'{"images": [{"filename": "1.jpg"}]}',
            "f: not captions: no field of an image's name or none of captions among filename",
        ),
        (
            changed(COCO, "annotations", {"image_id": 7, "id": 1, "caption": "A cat."}),
            "f: a caption for image id 7, which is not there",
        ),
        (
            changed(COCO, "images", {"file_name": "x.jpg", "id": 57870}),
            "f: image id 57870 is given twice",
        ),
        (
            changed(COCO, "images", {"file_name": "COCO_train2014_000000057870.jpg", "id": 8}),
            "f: image COCO_train2014_000000057870.jpg is given twice",
        ),
        ((TOKENS + "1.jpg A cat\n").encode(), "f, line 4: expected"),
        ((TOKENS + TOKENS[:40]).encode(), "f, line 4: 1000268201_693b08cb0e.jpg#0 is given twice"),
        (b"label,score\n1,2\n", "f: not a captions file"),
        (b"a.jpg,a dog\n", "f: not a captions file"),
        (b"a.jpg,a dog\nb.jpg,a cat\n", "f: not a captions file"),
        (b"", "f: not a captions file"),
        (b"image,caption\n1.jpg\n", "f, line 2: expected 2 columns"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_place(data: bytes, message: str) -> None:
    with pytest.raises(SourceError) as raised:
        parse_captions("f", data)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_captions_files_are_known_by_their_names() -> None:
    names = (
        "Flickr8k.token.txt",
        "text/results_20130124.token",
        "dataset_flickr8k.json",
        "annotations/captions_train2014.json",
        "captions.txt",
        "captions.csv",
        "results.csv",
    )
    others = (
        "Flickr8k.lemma.token.txt",
        "Flickr_8k.trainImages.txt",
        "CrowdFlowerAnnotations.txt",
        "readme.txt",
        "instances_train2014.json",
        "captions.jpg",
    )
    assert [name for name in names if not looks_like_captions(name)] == []
    assert [name for name in others if looks_like_captions(name)] == []


# Values of any kind where the schemas want a certain one.
ANYTHING = st.recursive(
    st.none() | st.integers(0, 2) | st.text(max_size=3) | st.sampled_from(["val", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["raw", "id"]), inner)
    ),
    max_leaves=4,
)
JSON_FILES = st.fixed_dictionaries(
    {
        "images": ANYTHING
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={key: ANYTHING for key in ("id", "file_name", "filename", "filepath")}
                | {"split": st.just("val") | ANYTHING}
                | {"sentences": st.just([{"raw": "A."}]) | st.lists(ANYTHING, max_size=2)},
            ),
            max_size=2,
        )
    },
    optional={
        "annotations": ANYTHING
        | st.lists(st.fixed_dictionaries({"image_id": ANYTHING, "caption": ANYTHING}), max_size=2)
    },
)
TABLES = st.text('ab01.jpg#,\t"|\n\r\x00\u2028', max_size=40).map(
    lambda text: "image,caption\n" + text
)


@given(JSON_FILES.map(as_bytes) | TABLES.map(str.encode) | st.text("a.#0\t\n{}").map(str.encode))
def test_any_file_is_read_or_refused(data: bytes) -> None:
    try:
        found = parse_captions("f", data)
    except SourceError:
        return
    assert isinstance(found, CaptionFile)
    for name, captions in found.captions.items():
        assert all(text.encode().decode() == text for text in [name, *captions])
    assert found.splits.keys() <= found.captions.keys()


@pytest.mark.parametrize(
    "record",
    [
        {"file_name": "a.jpg", "text": "a dog"},
        {"image_id": "a.jpg", "captions": ["a dog"]},
        {"image": "a.jpg", "sentences": [{"raw": "a dog"}], "split": "train"},
    ],
)
def test_json_lines_may_be_one(record: dict[str, Any]) -> None:
    found = parse_captions("metadata.jsonl", json.dumps(record).encode() + b"\n")
    assert found.captions == {"a.jpg": ["a dog"]}


def test_an_object_of_captions_by_image_is_no_record() -> None:
    by_image = {"image.jpg": "a dog", "text.jpg": ["a cat"], "caption": "a hen"}
    found = parse_captions("captions.json", json.dumps(by_image).encode())
    assert found.captions == {"image.jpg": ["a dog"], "text.jpg": ["a cat"], "caption": ["a hen"]}
    about = {"name": "my set", "description": "dogs", "data": [{"image": "a.jpg", "text": "a dog"}]}
    found = parse_captions("captions.json", json.dumps(about).encode())
    assert found.captions == {"a.jpg": ["a dog"]}


@pytest.mark.parametrize(
    "text",
    [
        "image,caption\na.jpg,a dog,\nb.jpg,a cat,\n",
        "image,caption,\na.jpg,a dog,\nb.jpg,a cat,\n",
        '"sep=;"\nimage;caption\na.jpg;a dog\nb.jpg;a cat\n',
        "sep=;\nimage;caption\na.jpg;a dog;\nb.jpg;a cat;\n",
    ],
)
def test_delimiters_that_spreadsheets_add_are_no_text(text: str) -> None:
    found = parse_captions("captions.csv", text.encode())
    assert found.captions == {"a.jpg": ["a dog"], "b.jpg": ["a cat"]}
