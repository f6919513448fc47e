"""Splits from names, lists and hashes."""

from collections import Counter

import pytest

from captioner.sources.splits import hashed_split, split_called, split_in_name, split_of_list

# Fixed for ever: what earlier runs made rests on them.
EXPECTED = {
    "a.jpg": "validation",
    "b.jpg": "validation",
    "c.jpg": "validation",
    "d.jpg": "test",
    "e.jpg": "train",
}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00003.parquet", "train"),
        ("data/validation-00000-of-00001-7025a2b596f14b7b.parquet", "validation"),
        ("val.parquet", "validation"),
        ("dev-0.parquet", "validation"),
        ("default/test/0000.parquet", "test"),
        ("test-set/train-00000-of-00001.parquet", "train"),
        ("captions_val2014.json", "validation"),
        ("contest.parquet", None),
        ("trainer/0000.parquet", None),
    ],
)
def test_a_name_says_its_split_in_a_whole_word(path: str, split: str | None) -> None:
    assert split_in_name(path) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("restval", "train"), ("Training", "train"), ("train_clean", "train"),
        ("trainval", "train"),
        ("val2017", "validation"), ("dev", "validation"), ("val_unseen", "validation"), ("mini_val", "validation"),
        ("testA", "test"), ("test-dev", "test"), ("testmini", "test"), ("holdout", "test"),
        ("unlabeled", None), ("1", None), ("full", None), ("", None),
    ],
)  # fmt: skip
def test_a_split_is_known_by_what_people_call_it(name: str, split: str | None) -> None:
    assert split_called(name) == split


def test_flickr_lists_are_known_by_their_names() -> None:
    assert split_of_list("text/Flickr_8k.trainImages.txt") == "train"
    assert split_of_list("Flickr_8k.devImages.txt") == "validation"
    assert split_of_list("Flickr_8k.testImages.txt") == "test"
    assert split_of_list("test.txt") is None


def test_hashed_splits_are_80_10_10_and_never_move() -> None:
    counts = Counter(hashed_split(f"photos/{number}.jpg") for number in range(10_000))
    assert abs(counts["train"] - 8000) < 200
    assert abs(counts["validation"] - 1000) < 120
    assert abs(counts["test"] - 1000) < 120
    assert [hashed_split(name) for name in EXPECTED] == list(EXPECTED.values())
