"""Minimum-Bayes-risk decoding: captions ranked by their expected utility and their score."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from captioner.artifacts.model_directory import LoadedModel
from captioner.captioning.captioner import DecoderCaptioner
from captioner.config import DecodeConfig, DecodeOverrides
from captioner.decoders.base import Features, State
from captioner.decoders.ensemble import members_of
from captioner.decoding.beam import Hypothesis, search
from captioner.decoding.cider import NGramFrequencies, cider_d
from captioner.decoding.mbr import expected_utilities, search_mbr
from captioner.decoding.sampling import sample
from captioner.text import END, START, UNK, Vocabulary
from tests.decoders import ATTENDING, KINDS, VOCABULARY, features, small_decoder

RARE = NGramFrequencies(images=100, counts={})
MODE = (4, 5, 6, 7)


class Opinions(nn.Module):
    """Says MODE in a quarter of all cases; else ``8 9 10`` and one of eight last words."""

    columns = ("pooled",)
    image_state = frozenset({"image"})

    def start(self, features: Features) -> State:
        return {"image": features["pooled"]}

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
        chances = torch.zeros(19, 19)
        chances[START, [4, 8]] = torch.tensor([0.25, 0.75])
        chances[[4, 5, 6, 8, 9], [5, 6, 7, 9, 10]] = 1.0
        chances[10, 11:19] = 1 / 8
        chances[[7, *range(11, 19)], END] = 1.0
        chances[END, END] = 1.0
        return chances[tokens].log(), state, None


def test_the_caption_of_highest_expected_utility_comes_first() -> None:
    config = DecodeConfig(beam_size=9, num_captions=9, max_length=6)
    one = {"pooled": torch.zeros(1, 1)}
    decoder = Opinions()
    [by_score] = search(decoder, one, config)
    assert by_score[0].tokens == MODE
    ranked = config.model_copy(update={"mbr_samples": 64})
    [by_utility] = search_mbr(decoder, one, ranked, RARE)
    assert by_utility[-1].tokens == MODE
    assert {one.tokens for one in by_utility} == {one.tokens for one in by_score}
    few = ranked.model_copy(update={"num_captions": 1})
    assert search_mbr(decoder, one, few, RARE) == [by_utility[:1]]


@pytest.mark.parametrize(
    ("members", "temperature", "candidates", "weight"),
    [(1, 0.8, 5, 8.0), (2, 0.8, 5, 8.0), (1, 1.3, 2, 3.0)],
)
def test_rank_is_score_plus_weighted_mean_root_of_cider_against_what_every_member_samples(
    members: int, temperature: float, candidates: int, weight: float
) -> None:
    decoder = small_decoder(ensemble_size=members)
    decode = DecodeConfig(
        beam_size=5, num_captions=5, max_length=8, mbr_samples=9,
        mbr_temperature=temperature, mbr_candidates=candidates, mbr_weight=weight,
    )  # fmt: skip
    column = features(30)
    found = search_mbr(decoder, column, decode, RARE)
    beams = search(decoder, column, decode)
    each = -(-9 // members)
    drawn = [
        sample(
            one, column, each, 8, temperature=temperature, noise=torch.Generator().manual_seed(seed)
        )[0]
        for seed, one in enumerate(members_of(decoder))
    ]
    newcomers = 0
    for image, hypotheses in enumerate(found):
        captions = [
            tuple(word for word in caption if word)
            for tokens in drawn
            for caption in tokens[image * each : (image + 1) * each, 1:].tolist()
        ]

        def utility(words: tuple[int, ...], captions: list[tuple[int, ...]] = captions) -> float:
            others = list(captions)
            if words in others:
                others.remove(words)
            vector = RARE.vector(words)
            return sum(math.sqrt(cider_d(vector, [RARE.vector(one)])) for one in others) / len(
                others
            )

        def worth(one: Hypothesis) -> float:
            return one.score + weight * utility((*one.tokens, END))

        ranked = [worth(one) for one in hypotheses]
        assert ranked == sorted(ranked, reverse=True)
        # Nothing that the search found is worth more than what came first.
        assert ranked[0] >= max(map(worth, beams[image])) - 1e-9
        searched = {(*one.tokens, END) for one in beams[image]}
        new = {(*one.tokens, END) for one in hypotheses} - searched
        newcomers += len(new)
        # Of those drawn to their end that no beam has found, the best candidates compete.
        finished = {one for one in captions if len(one) > 1 and one[-1] == END} - searched
        least = sorted(map(utility, finished), reverse=True)[:candidates]
        assert new <= finished
        assert all(utility(one) >= least[-1] - 1e-9 for one in new)
    assert newcomers > 10


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_caption_that_was_drawn_is_described_as_one_that_was_searched(
    kind: str, members: int
) -> None:
    decoder = small_decoder(kind, ensemble_size=members, seed=1)
    column = features(6)
    decode = DecodeConfig(beam_size=4, num_captions=4, max_length=5, mbr_samples=40)
    found = search_mbr(decoder, column, decode, RARE)
    beams = search(decoder, column, decode)
    drawn = [
        (image, one)
        for image, hypotheses in enumerate(found)
        for one in hypotheses
        if one.tokens not in {other.tokens for other in beams[image]}
    ]
    assert len({len(one.tokens) for _, one in drawn}) > 1
    for image, one in drawn:
        state = decoder.start({name: rows[image : image + 1] for name, rows in column.items()})
        log_prob, maps = 0.0, []
        for last, word in itertools.pairwise((START, *one.tokens, END)):
            logits, state, attention = decoder.step(torch.tensor([last]), state)
            log_prob += float(torch.log_softmax(logits[0], dim=-1)[word])
            maps.append(attention)
        assert one.log_prob == pytest.approx(log_prob, rel=1e-4)
        penalty = (len(one.tokens) + 1) ** decode.length_penalty
        assert one.score == pytest.approx(one.log_prob / penalty, rel=1e-5)
        if kind in ATTENDING:
            torch.testing.assert_close(one.attention, torch.cat(maps[:-1]), rtol=1e-4, atol=1e-5)
        else:
            assert one.attention is None


def test_what_was_drawn_with_repeats_or_not_to_its_end_is_not_chosen() -> None:
    decoder = small_decoder()
    decode = DecodeConfig(
        beam_size=8, num_captions=8, max_length=6, mbr_samples=200, no_repeat_ngram=1
    )
    found = search_mbr(decoder, features(20), decode, RARE)
    assert all(len(set(one.tokens)) == len(one.tokens) for image in found for one in image)
    assert all(len(one.tokens) <= 6 for image in found for one in image)
    loose = decode.model_copy(update={"no_repeat_ngram": 0})
    found = search_mbr(decoder, features(20), loose, RARE)
    assert any(len(set(one.tokens)) < len(one.tokens) for image in found for one in image)


def test_a_sample_is_not_compared_with_itself() -> None:
    one, other = (4, 5, 6, 7, END), (8, 9, 10, 11, 12)
    worth = expected_utilities([one], [one, one, other], RARE)
    assert worth[one] == pytest.approx(math.sqrt(10.0) / 2)
    assert worth[other] == pytest.approx(0.0)
    assert expected_utilities([one], [other] * 3, RARE)[one] == pytest.approx(0.0)
    assert expected_utilities([other], [one] * 3, RARE)[one] == pytest.approx(math.sqrt(10.0))
    assert expected_utilities([one], [one], RARE)[one] == 0.0


def test_the_captioner_ranks_by_utility_when_asked() -> None:
    decoder = small_decoder()
    vocabulary = Vocabulary.build([[f"w{number}" for number in range(VOCABULARY - UNK - 1)]])
    captioner = DecoderCaptioner(LoadedModel(None, vocabulary, decoder, RARE), "cpu")
    plain = DecodeConfig(beam_size=5, max_length=8)
    asked = plain.model_copy(update={"mbr_samples": 30})
    column = features(30)

    def captions(decode: DecodeConfig) -> list[str]:
        return [caption.text for caption in captioner.caption_features(column, decode)]

    found = search_mbr(decoder, column, asked, RARE)
    assert captions(asked) == [vocabulary.decode(list(image[0].tokens)) for image in found]
    assert captions(asked) != captions(plain)
    greedy = DecodeOverrides(beam_size=1).over(asked)
    assert captions(greedy) == captions(plain.model_copy(update={"beam_size": 1}))


def captioned(decoder: nn.Module, decode: DecodeConfig, rows: slice) -> list[list[tuple[int, ...]]]:
    """Captions of some of five images."""
    some = {name: tensor[rows] for name, tensor in features(5).items()}
    return [[one.tokens for one in image] for image in search_mbr(decoder, some, decode, RARE)]


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_does_not_depend_on_its_batch(kind: str, members: int) -> None:
    decoder = small_decoder(kind, ensemble_size=members, seed=1)
    decode = DecodeConfig(beam_size=4, num_captions=4, max_length=8, mbr_samples=7)
    together = captioned(decoder, decode, slice(None))
    assert captioned(decoder, decode, slice(None)) == together
    assert [captioned(decoder, decode, slice(row, row + 1))[0] for row in range(5)] == together


def test_more_captions_than_are_drawn_at_once_are_drawn_in_several_goes() -> None:
    decoder = small_decoder(seed=1)
    decode = DecodeConfig(beam_size=4, num_captions=4, max_length=4, mbr_samples=260)
    together = captioned(decoder, decode, slice(None))
    assert [captioned(decoder, decode, slice(row, row + 1))[0] for row in range(5)] == together


def test_shared_numbers_draw_from_the_tempered_distribution() -> None:
    class Coin(Opinions):
        def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor | None]:
            logits = torch.full((len(tokens), 8), -math.inf)
            logits[tokens == START, 4:] = torch.tensor([0.6, 0.3, 0.1, 0.0]).log()
            logits[tokens != START, END] = 0.0
            return logits, state, None

    noise = torch.Generator().manual_seed(3)
    drawn, log_probs = sample(
        Coin(), {"pooled": torch.zeros(2, 1)}, 20_000, 3, temperature=0.5, noise=noise
    )
    first, second = drawn[:, 1].reshape(2, -1)
    assert torch.equal(first, second)
    chances = torch.tensor([0.36, 0.09, 0.01, 0.0]) / 0.46
    shares = torch.bincount(first, minlength=8)[4:] / len(first)
    torch.testing.assert_close(shares, chances, atol=0.01, rtol=0)
    assert log_probs[drawn[:, 1] == 5, 0].exp().unique().item() == pytest.approx(chances[1].item())


def test_no_images_have_no_captions() -> None:
    config = DecodeConfig(mbr_samples=4)
    assert search_mbr(Opinions(), {"pooled": torch.zeros(0, 1)}, config, RARE) == []
