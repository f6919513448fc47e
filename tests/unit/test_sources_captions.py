"""Caption file formats in their real schemas, and what is wrong with files people have."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.errors import SourceError
from captioner.sources.captions import (
    CaptionFile,
    looks_like_captions,
    merge_captions,
    parse_captions,
)

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
    assert found.splits == {coco_name: "train", "2.jpg": "validation"}


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


def test_coco_files_of_several_splits_are_merged_by_their_names() -> None:
    train = parse_captions("train", as_bytes(COCO))
    text = json.dumps(COCO).replace("COCO_train2014", "COCO_val2014").encode()
    val = parse_captions("val", text)
    found = merge_captions({"a/captions_train2014.json": train, "a/captions_val2014.json": val})
    assert len(found.captions) == 4
    assert found.splits["COCO_train2014_000000057870.jpg"] == "train"
    assert found.splits["COCO_val2014_000000057870.jpg"] == "validation"
    with pytest.raises(
        SourceError, match="captions_val2014.json: captions for image COCO_train2014"
    ):
        merge_captions({"captions_train2014.json": train, "captions_val2014.json": train})
    with pytest.raises(SourceError, match="choose one with source-options.captions"):
        merge_captions({"captions.txt": train, "captions_val2014.json": val})


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


def changed(value: dict[str, Any], key: str, entry: Any) -> bytes:
    return as_bytes(value | {key: [*value[key], entry]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe1", "f: not UTF-8 text"),
        (b"{", "f: not JSON"),
        (b'{"images": 3}', "f: no list 'images'"),
        (b'{"images": ["1.jpg"]}', "f: neither Karpathy's nor COCO's format"),
        (
            b'{"images": [{"filename": "1.jpg"}]}',
            "f: neither Karpathy's nor COCO's format: KeyError",
        ),
        (changed(KARPATHY, "images", KARPATHY["images"][1]), "f: image 2.jpg is given twice"),
        (
            changed(KARPATHY, "images", {"filename": "3.jpg", "split": "unseen", "sentences": []}),
            "f: image 3.jpg: unknown split 'unseen'",
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
        (b"name,text\n1.jpg,A cat\n", "f: not a captions file"),
        (b"", "f: not a captions file"),
        (b"image,caption\n1.jpg,A dog, running\n", "f, line 2: expected 2 columns"),
        (b"image,caption\n1.jpg\n", "f, line 2: expected 2 columns"),
        (b'image,caption\n1.jpg,"A dog\n2.jpg,A cat\n', "f, after line 1: unexpected end"),
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
