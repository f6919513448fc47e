"""Cleaning rules, the vocabulary, and the notebook's figures on the real captions."""

import json
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.errors import ModelError
from captioner.notebook import clean_text
from captioner.text import END, PAD, START, UNK, Vocabulary, clean, join, spaced

FLICKR8K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "flickr8k"


@pytest.fixture(scope="module")
def flickr8k_captions() -> list[str]:
    """All 30,000 raw train captions."""
    files = sorted(FLICKR8K.glob("train-*.parquet"))
    if not files:
        pytest.skip("needs the Flickr8k Parquet files in ../shared/data")
    columns = [f"caption_{index}" for index in range(5)]
    tables = [pq.read_table(file, columns=columns) for file in files]
    return [text for table in tables for name in columns for text in table[name].to_pylist()]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A black dog is running .", ["a", "black", "dog", "is", "running"]),
        ("Two T-shirts, 3 men!", ["two", "t", "shirts", "3", "men"]),
        ("The dog's and the dog\u2019s ball", ["the", "dogs", "and", "the", "dogs", "ball"]),
        ("under_score\tand\nlines", ["under", "score", "and", "lines"]),
        ("\uff26\uff55\uff4c\uff4c width \u00b2", ["full", "width", "2"]),
        ("Cafe\u0301 FRAN\u00c7AIS", ["caf\u00e9", "fran\u00e7ais"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", ["\u0939\u093f\u0928\u094d\u0926\u0940"]),
        ("dog \u2764\ufe0f cat", ["dog", "cat"]),
        (" ... ", []),
        ("", []),
    ],
)
def test_standard_rules_keep_letters_and_digits(caption: str, words: list[str]) -> None:
    assert clean(caption) == words


@pytest.mark.parametrize(
    ("caption", "text", "words"),
    [
        ("A black Dog , runs .", "black dog runs", ["black", "dog", "runs"]),
        ("man's t-shirt", "man's t-shirt", ["man's", "t", "shirt"]),
        ("5 of 10 , ''", "of 10 ''", ["of", "10", "''"]),
        ("a . !", "", []),
        ("one\u00a0two", "one two", ["one", "two"]),
    ],
)
def test_seed_rules_do_what_the_notebook_did(caption: str, text: str, words: list[str]) -> None:
    assert clean_text(caption) == text
    assert clean(caption, "notebook") == words


# Captions, the text that a model writes of them, and their words where those are not set apart by spaces.
LANGUAGES = {
    "French": ("L\u2019homme n'a qu'un chien.", "l'homme n'a qu'un chien", "l' homme n' a qu' un chien"),
    "Italian": ("L'acqua dell'albero", "l'acqua dell'albero", "l' acqua dell' albero"),
    "Chinese": ("一只黑狗，在雪地里。", "一只黑狗在雪地里", "一 只 黑 狗 在 雪 地 里"),
    "Japanese": ("2人の男がＴシャツを", "2人の男がtシャツを", "2 人 の 男 が t シ ャ ツ を"),
    "Thai": ("ผู้ชายดื่มน้ำ 2 แก้ว", "ผู้ชายดื่มน้ำ 2 แก้ว", "ผู้ ช า ย ดื่ ม น้ำ 2 แ ก้ ว"),
    "Khmer": ("ក្មេងប្រុស", "ក្មេងប្រុស", "ក្មេ ង ប្រុ ស"),
    "Burmese": ("ခွေး တစ်ကောင်၊ စာ", "ခွေးတစ်ကောင်စာ", "ခွေး တ စ် ကော င် စာ"),
    "Tibetan": ("ཁྱི་ནག་པོ།", "ཁྱི་ནག་པོ", "ཁྱི ནག པོ"),
    "Korean": ("개가 눈 속을 달린다.", "개가 눈 속을 달린다", None),
    "Arabic": ("كَلْبٌ يَجْرِي، سريعًا", "كَلْبٌ يَجْرِي سريعًا", None),
    "Persian": ("سگ می\u200cدود", "سگ می\u200cدود", None),
    "Hindi": ("कुत्ता बर्फ़ में दौड़ता है।", "कुत्ता बर्फ़ में दौड़ता है", None),
    "Sinhala": ("ශ්\u200dරී ලංකා", "ශ්\u200dරී ලංකා", None),
    "Ukrainian": ("М'яч і п\u02bcять собак", "м'яч і п'ять собак", None),
    "Hebrew": ("ג'ירפה רצה", "ג'ירפה רצה", None),
    "German": ("Ein Fuß\u00adball", "ein fußball", None),
    "English": ("The dog's ball isn't John\u2019s", "the dogs ball isnt johns", None),
    "emoji": ("a dog \u2764\ufe0f 👩\u200d👧 1\ufe0f\u20e3", "a dog 1", None),
    "none": ("... 👍 — !", "", None),
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_of_any_script_are_written_as_they_were(language: str) -> None:
    caption, text, words = LANGUAGES[language]
    found = clean(caption)
    # Hindi's nukta is composed by some and not by others; NFKC is one of them.
    assert join(found) == unicodedata.normalize("NFC", text)
    assert found == unicodedata.normalize("NFC", words or text).split()
    vocabulary = Vocabulary.build([found])
    assert vocabulary.decode(vocabulary.encode(found)) == join(found)
    assert clean(join(found)) == found


def test_text_is_cut_into_graphemes_where_it_has_no_spaces() -> None:
    assert spaced("A dog's 1-2 run, é") == "A dog's 1-2 run, é"
    assert spaced("一只 dog在").split() == ["一", "只", "dog", "在"]


@given(st.text())
def test_standard_cleaning_twice_changes_nothing(caption: str) -> None:
    words = clean(caption)
    assert clean(join(words)) == words


@given(st.text())
def test_clean_words_survive_encoding_and_decoding(caption: str) -> None:
    words = clean(caption)
    vocabulary = Vocabulary.build([words])
    assert vocabulary.decode(vocabulary.encode(words)) == join(words)


def test_seed_figures_on_the_real_captions(flickr8k_captions: list[str]) -> None:
    texts = [clean_text(caption) for caption in flickr8k_captions]
    words = [clean(caption, "notebook") for caption in flickr8k_captions]
    vocabulary = Vocabulary.build(words, rules="notebook")

    assert len(flickr8k_captions) == 30_000
    assert len(set(flickr8k_captions)) == 29_837
    assert len(set(texts)) == 29_768
    assert max(len(text.split()) for text in texts) + len(("startseq", "endseq")) == 34
    # The notebook's 7368 entries are words, padding and both tags; <unk>, which it lacked, is one more.
    assert len(vocabulary) == 7368 + 1
    assert vocabulary.words[UNK] == "<unk>"
    # Every token but the first is a next-word target.
    assert sum(len(vocabulary.encode(one)) - 1 for one in words) == 307_572


def test_standard_rules_on_the_real_captions_leave_only_lower_case_letters_and_digits(
    flickr8k_captions: list[str],
) -> None:
    words = {word for caption in flickr8k_captions for word in clean(caption)}
    assert {word for word in words if not word.isalnum()} == {"o'"}  # five o'clock
    assert all(word.isascii() and word == word.lower() for word in words)


def test_ids_go_by_falling_count_then_alphabet() -> None:
    vocabulary = Vocabulary.build([["b", "c"], ["c", "a"], ["b", "c"]])
    assert vocabulary.words == ("<pad>", "<start>", "<end>", "<unk>", "c", "b", "a")
    assert (PAD, START, END, UNK) == (0, 1, 2, 3)
    tied = Vocabulary.build([["z", "y", "x"]])
    assert tied.words[4:] == ("x", "y", "z")


def test_rare_words_become_unknown() -> None:
    vocabulary = Vocabulary.build([["dog", "runs"], ["dog", "sits"]], min_count=2)
    assert vocabulary.words[4:] == ("dog",)
    assert vocabulary.encode(["dog", "runs"]) == [START, 4, UNK, END]


def test_unknown_words_vanish_under_the_seed_rules() -> None:
    vocabulary = Vocabulary.build([["dog", "runs"]], rules="notebook")
    assert vocabulary.encode(["big", "dog", "slowly", "runs"], max_length=4) == [START, 4, 5, END]


@pytest.mark.parametrize(
    ("max_length", "ids"), [(5, [4, 5, 6]), (4, [4, 5]), (3, [4]), (None, [4, 5, 6])]
)
def test_cutting_keeps_both_tags(max_length: int | None, ids: list[int]) -> None:
    vocabulary = Vocabulary.build([["a", "b", "c"]])
    assert vocabulary.encode(["a", "b", "c"], max_length) == [START, *ids, END]


def test_decoding_stops_at_end_and_leaves_out_special_tokens() -> None:
    vocabulary = Vocabulary.build([["a", "b"]])
    assert vocabulary.decode([START, 4, UNK, PAD, 5, END, 4]) == "a b"
    assert vocabulary.decode([]) == ""


@pytest.mark.parametrize("rules", ["standard", "notebook"])
def test_json_round_trip(rules: str) -> None:
    vocabulary = Vocabulary.build([["caf\u00e9", "dog's"]], rules=rules)  # type: ignore[arg-type]
    assert Vocabulary.from_json(vocabulary.save_json()) == vocabulary
    assert Vocabulary.from_json(vocabulary.save_json().encode()) == vocabulary


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"words": ["<pad>", "<start>", "<end>", "<unk>", "a", "a"]}, "'a' occurs twice"),
        ({"words": ["<pad>", "<start>", "<end>", "a"]}, "first entries must be"),
        ({"words": ["<pad>", "<start>", "<end>", "<unk>", "a b"]}, "'a b' is not one word"),
        ({"words": ["<pad>", "<start>", "<end>", "<unk>", ""]}, "'' is not one word"),
        ({"words": ["<pad>", "<start>", "<end>", "<unk>", 5]}, "list of strings"),
        ({"words": None}, "list of strings"),
        ({"version": 2}, "expected version 1"),
        ({"rules": "other"}, "unknown rules 'other'"),
        ({"rules": ["standard"]}, "unknown rules"),
    ],
)
def test_contradictory_vocabulary_is_refused(change: dict[str, object], reason: str) -> None:
    content = json.loads(Vocabulary.build([["a"]]).save_json())
    with pytest.raises(ModelError, match=reason):
        Vocabulary.from_json(json.dumps(content | change))


@pytest.mark.parametrize("text", ["", "[]", "{", b"\xff\xfe\x00", "[" * 100_000])
def test_anything_but_a_vocabulary_is_refused(text: str | bytes) -> None:
    with pytest.raises(ModelError, match="vocabulary"):
        Vocabulary.from_json(text)
