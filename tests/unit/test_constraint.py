"""Captions that must begin with something and must not contain something, in every kind of search."""

import itertools
import math

import pytest
from pydantic import ValidationError

from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig
from captioner.decoding.beam import search
from captioner.decoding.constraint import Constraint
from captioner.errors import ConfigError
from captioner.text import Vocabulary
from tests.models import WORDS, write_model
from tests.pictures import picture
from tests.unit.test_beam import Table, images

VOCABULARY = Vocabulary.build([WORDS])
PICTURES = [picture(number) for number in range(4)]


def ids(*words: str) -> tuple[int, ...]:
    return tuple(VOCABULARY.encode(words)[1:-1])


def test_words_become_ids() -> None:
    decode = DecodeConfig(prefix="Two, RED", forbid=" Left,right,,unicorn, left ")
    found = Constraint.of(decode, VOCABULARY)
    assert found == Constraint(ids("two", "red"), tuple(sorted(ids("left", "right"))))
    assert Constraint.of(DecodeConfig(), VOCABULARY) == Constraint()


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (DecodeConfig(prefix="two pink circles"), "prefix: 'pink' is no word that the model knows"),
        (DecodeConfig(prefix=" !? "), "prefix: '!\\?' has no word"),
        (DecodeConfig(prefix="\0"), "has no word"),
        (DecodeConfig(prefix="two red", max_length=1), "prefix: 2 words, over max_length 1"),
        (DecodeConfig(forbid="two red,left"), "forbid: 'two red' is not one word"),
        (DecodeConfig(forbid="!"), "forbid: '!' is not one word"),
    ],
)
def test_what_the_model_cannot_follow_is_refused(decode: DecodeConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Constraint.of(decode, VOCABULARY)


@pytest.mark.parametrize("prefix", [(), (5,), (5, 5), (4, 6, 5)])
@pytest.mark.parametrize("forbidden", [(), (5,), (4, 6)])
def test_search_finds_what_brute_force_finds(
    prefix: tuple[int, ...], forbidden: tuple[int, ...]
) -> None:
    longest, allowed = 4, [word for word in range(4, 7) if word not in forbidden]
    decoder = Table(7, longest + 1, images=3)
    config = DecodeConfig(beam_size=32, num_captions=3, max_length=longest, length_penalty=0.0)
    for image, found in enumerate(search(decoder, images(0, 1, 2), config, Constraint(prefix, forbidden))):  # fmt: skip
        every = [
            (decoder.log_prob(image, (*prefix, *rest)), (*prefix, *rest))
            for length in range(longest - len(prefix) + 1)
            for rest in itertools.product(allowed, repeat=length)
        ]
        best = sorted(every, reverse=True)[:3]
        assert [one.tokens for one in found] == [caption for _, caption in best]
        for one, (log_prob, _) in zip(found, best, strict=True):
            assert one.log_prob == pytest.approx(log_prob, abs=1e-4)


@pytest.fixture(scope="module", params=["merge", "spatial_attention"])
def captioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captioner:  # fmt: skip
    root = tmp_path_factory.mktemp("models") / request.param
    return Captioner.load(write_model(root, request.param), "cpu")


@pytest.mark.parametrize(
    "search_",
    [{"beam_size": 1}, {"beam_size": 4, "num_captions": 4}, {"beam_size": 2, "num_captions": 2, "mbr_samples": 20}],
    ids=["greedy", "beam", "mbr"],
)  # fmt: skip
@pytest.mark.parametrize("repeats", [0, 1])
def test_every_caption_of_every_kind_of_search_keeps_to_it(
    captioner: Captioner, search_: dict[str, int], repeats: int
) -> None:
    free = DecodeConfig(max_length=8, no_repeat_ngram=repeats, **search_)
    common = [word for one in captioner.caption(PICTURES, free) for word in one.words]
    forbid = max(set(common), key=common.count)
    # It repeats a word, and has the one that is forbidden behind it.
    prefix = f"two two {forbid}"
    decode = free.model_copy(update={"prefix": prefix, "forbid": forbid})
    for one in captioner.caption(PICTURES, decode):
        assert len(one.candidates) == search_.get("num_captions", 1)
        for candidate in one.candidates:
            assert candidate.text.startswith(prefix)
            assert forbid not in candidate.words[3:]
            assert math.isfinite(candidate.log_prob)
            if candidate.attention is not None:
                assert len(candidate.attention) == len(candidate.words)


def test_coldest_samples_are_captions_still(captioner: Captioner) -> None:
    """What a request may ask for at all is searched: a temperature that divides by nothing would draw nothing."""
    with pytest.raises(ValidationError):
        DecodeConfig(mbr_temperature=5e-324)
    coldest = DecodeConfig(mbr_temperature=0.01, mbr_samples=4, beam_size=2, max_length=1)
    for one in captioner.caption(PICTURES, coldest):
        assert math.isfinite(one.log_prob)
