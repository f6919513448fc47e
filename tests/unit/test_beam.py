"""Beam search against brute force, and what it promises about its results."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from captioner.config import DecodeConfig
from captioner.decoders.base import Features, State
from captioner.decoding.beam import search
from captioner.text import END, PAD, START, UNK
from tests.decoders import ATTENDING, KINDS, SHAPE, features, small_decoder


class Table(nn.Module):
    """A decoder whose next word depends on the image, the last word and the position, by a random table."""

    columns = ("pooled",)
    image_state = frozenset({"image"})

    def __init__(self, vocabulary: int, steps: int, images: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(images, steps, vocabulary, vocabulary, generator=generator) * 2

    def start(self, features: Features) -> State:
        image = features["pooled"][:, 0].long()
        return {"image": image, "position": torch.zeros_like(image)}

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        image = state["image"].repeat_interleave(len(tokens) // len(state["image"]))
        logits = self.table[image, state["position"], tokens]
        return logits, {"image": state["image"], "position": state["position"] + 1}, None

    def log_prob(self, image: int, words: tuple[int, ...]) -> float:
        total, last = 0.0, START
        for position, word in enumerate((*words, END)):
            total += torch.log_softmax(self.table[image, position, last], dim=-1)[word].item()
            last = word
        return total


def images(*numbers: int) -> Features:
    return {"pooled": torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)}


@pytest.mark.parametrize(("vocabulary", "longest"), [(7, 3), (6, 4)])
def test_a_wide_beam_finds_what_brute_force_finds(vocabulary: int, longest: int) -> None:
    decoder = Table(vocabulary, longest + 1, images=6)
    words = range(UNK + 1, vocabulary)
    config = DecodeConfig(beam_size=30, num_captions=5, max_length=longest, length_penalty=0.0)
    for image, found in enumerate(search(decoder, images(*range(6)), config)):
        everything = [
            (decoder.log_prob(image, caption), caption)
            for length in range(longest + 1)
            for caption in itertools.product(words, repeat=length)
        ]
        best = sorted(everything, reverse=True)[:5]
        assert [one.tokens for one in found] == [caption for _, caption in best]
        assert [one.log_prob for one in found] == pytest.approx(
            [value for value, _ in best], abs=1e-5
        )


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("wanted", [1, 5, 31])
def test_a_beam_that_holds_everything_ranks_all_captions(penalty: float, wanted: int) -> None:
    # Two words and at most four of them: 31 captions, and never more than 24 candidates for 32 beams.
    decoder, longest = Table(6, 5, images=20), 4
    config = DecodeConfig(
        beam_size=32, num_captions=wanted, max_length=longest, length_penalty=penalty
    )
    everything = [
        caption
        for length in range(longest + 1)
        for caption in itertools.product(range(UNK + 1, 6), repeat=length)
    ]
    for image, found in enumerate(search(decoder, images(*range(20)), config)):
        scores = {
            caption: decoder.log_prob(image, caption) / (len(caption) + 1) ** penalty
            for caption in everything
        }
        best = sorted(everything, key=lambda caption: -scores[caption])[:wanted]
        assert [one.tokens for one in found] == best
        assert [one.score for one in found] == pytest.approx(
            [scores[one] for one in best], abs=1e-5
        )


@pytest.mark.parametrize("beams", [1, 3, 8])
def test_equal_candidates_come_by_beam_and_word(beams: int) -> None:
    decoder = Table(5000, 3, images=1)
    decoder.table.zero_()
    decoder.table[..., END] = -1.0
    config = DecodeConfig(beam_size=beams, num_captions=beams, max_length=2)
    expected = [(UNK + 1, UNK + 1 + number) for number in range(beams)]
    for batch in (1, 7):
        for found in search(decoder, images(*[0] * batch), config):
            assert [one.tokens for one in found] == expected


def test_asking_for_more_captions_keeps_the_best() -> None:
    decoder, batch = Table(20, 13, images=20, seed=2), images(*range(20))
    one = search(decoder, batch, DecodeConfig(beam_size=4, num_captions=1, max_length=12))
    four = search(decoder, batch, DecodeConfig(beam_size=4, num_captions=4, max_length=12))
    assert [found[0].tokens for found in one] == [found[0].tokens for found in four]


def test_no_images_give_no_captions() -> None:
    assert search(Table(7, 5, images=1), images(), DecodeConfig()) == []


def test_beam_of_one_is_greedy() -> None:
    decoder = Table(30, 21, images=8)
    for image, found in enumerate(
        search(decoder, images(*range(8)), DecodeConfig(beam_size=1, max_length=20))
    ):
        words: list[int] = []
        while len(words) < 20:
            logits = decoder.table[image, len(words), words[-1] if words else START].clone()
            logits[[PAD, START, UNK]] = -torch.inf
            word = int(logits.argmax())
            if word == END:
                break
            words.append(word)
        assert list(found[0].tokens) == words


def test_best_captions_are_sorted_distinct_and_as_many_as_asked_for() -> None:
    config = DecodeConfig(beam_size=6, num_captions=4, max_length=8)
    for found in search(Table(20, 9, images=5), images(*range(5)), config):
        assert len(found) == 4
        assert len({one.tokens for one in found}) == 4
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        for one in found:
            assert one.score == pytest.approx(
                one.log_prob / (len(one.tokens) + 1) ** config.length_penalty
            )


def test_special_tokens_are_never_emitted_and_the_length_is_kept() -> None:
    for found in search(
        Table(9, 7, images=5, seed=3), images(*range(5)), DecodeConfig(beam_size=4, max_length=6)
    ):
        assert set(found[0].tokens).isdisjoint({PAD, START, END, UNK})
        assert len(found[0].tokens) <= 6


def test_length_penalty_lengthens() -> None:
    lengths = {}
    for penalty in (0.0, 2.0):
        config = DecodeConfig(beam_size=5, max_length=12, length_penalty=penalty)
        found = search(Table(12, 13, images=20, seed=1), images(*range(20)), config)
        lengths[penalty] = sum(len(one[0].tokens) for one in found)
    assert lengths[2.0] > lengths[0.0]


def test_no_ngram_is_repeated_where_that_is_forbidden() -> None:
    class Stutter(Table):
        def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
            logits, state, attention = super().step(tokens, state)
            return logits.index_fill(1, torch.tensor([END]), -20.0), state, attention

    decoder = Stutter(7, 17, images=4)
    free = search(decoder, images(*range(4)), DecodeConfig(beam_size=3, max_length=16))
    bound = search(
        decoder, images(*range(4)), DecodeConfig(beam_size=3, max_length=16, no_repeat_ngram=2)
    )

    def repeats(tokens: tuple[int, ...]) -> bool:
        pairs = list(itertools.pairwise(tokens))
        return len(pairs) != len(set(pairs))

    assert any(repeats(found[0].tokens) for found in free)
    assert not any(repeats(found[0].tokens) for found in bound)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_does_not_depend_on_its_batch(kind: str) -> None:
    decoder = small_decoder(kind, layers=2, seed=4)
    with torch.no_grad():
        # Sharper than fresh weights, which leave every word about equally likely.
        decoder.output.weight.mul_(20)
    batch, decode = features(6), DecodeConfig(beam_size=3, num_captions=2, max_length=12)
    together = search(decoder, batch, decode)
    for row in range(6):
        alone = search(decoder, {name: one[row : row + 1] for name, one in batch.items()}, decode)[
            0
        ]
        assert [one.tokens for one in alone] == [one.tokens for one in together[row]]
        assert [one.log_prob for one in alone] == pytest.approx(
            [one.log_prob for one in together[row]], abs=1e-4
        )
        for one in alone:
            if kind not in ATTENDING or not one.tokens:
                assert one.attention is None
            else:
                assert one.attention.shape == (len(one.tokens), SHAPE.cells)
                torch.testing.assert_close(one.attention.sum(dim=1), torch.ones(len(one.tokens)))


@pytest.mark.parametrize("kind", ATTENDING)
def test_the_map_of_a_word_is_that_of_the_step_that_chose_it(kind: str) -> None:
    decoder = small_decoder(kind, layers=2, seed=5)
    with torch.no_grad():
        decoder.output.weight.mul_(10)
        decoder.output.bias[END] = -5.0
    batch = features(4)
    for row, found in enumerate(search(decoder, batch, DecodeConfig(beam_size=4, max_length=6))):
        words = found[0].tokens
        assert words
        state = decoder.start({name: column[row : row + 1] for name, column in batch.items()})
        for position, word in enumerate((START, *words[:-1])):
            _, state, expected = decoder.step(torch.tensor([word]), state)
            torch.testing.assert_close(
                found[0].attention[position], expected[0], rtol=1e-3, atol=1e-5
            )


def test_captions_are_ended_by_force_at_the_greatest_length() -> None:
    decoder = Table(9, 5, images=3)
    decoder.table[..., END] = -50.0
    config = DecodeConfig(beam_size=3, num_captions=3, max_length=4)
    for image, found in enumerate(search(decoder, images(*range(3)), config)):
        assert [len(one.tokens) for one in found] == [4, 4, 4]
        for one in found:
            assert one.log_prob == pytest.approx(decoder.log_prob(image, one.tokens), rel=1e-5)
