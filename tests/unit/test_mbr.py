"""Captions ranked by how well they agree with captions drawn at random."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from captioner.artifacts.model_directory import LoadedModel
from captioner.captioning.captioner import Captioner
from captioner.config import DecodeConfig, DecodeOverrides, DecoderConfig
from captioner.decoders import DECODERS, build_decoder
from captioner.decoders.base import Features, State
from captioner.decoders.ensemble import members_of
from captioner.decoding.beam import search
from captioner.decoding.cider import NGramFrequencies, cider_d
from captioner.decoding.mbr import _contenders as contenders
from captioner.decoding.mbr import _score as score
from captioner.decoding.mbr import agreements, search_mbr
from captioner.decoding.sampling import sample
from captioner.text import END, START, UNK, Vocabulary

from .test_decoders import CHANNELS, VOCABULARY, features

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


def test_the_caption_that_most_agree_with_comes_first() -> None:
    config = DecodeConfig(beam_size=9, num_captions=9, max_length=6)
    one = {"pooled": torch.zeros(1, 1)}
    decoder = Opinions()
    [by_score] = search(decoder, one, config)
    assert by_score[0].tokens == MODE
    ranked = config.model_copy(update={"mbr_samples": 64})
    [by_consensus] = search_mbr(decoder, one, ranked, RARE)
    assert by_consensus[-1].tokens == MODE
    assert {one.tokens for one in by_consensus} == {one.tokens for one in by_score}
    few = ranked.model_copy(update={"num_captions": 1})
    assert search_mbr(decoder, one, few, RARE) == [by_consensus[:1]]


@pytest.mark.parametrize("members", [1, 2])
def test_rank_is_score_plus_weighted_mean_root_of_cider_of_what_every_member_draws(
    members: int,
) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(width=16, output_width=16, ensemble_size=members)
    decoder = build_decoder(config, VOCABULARY, CHANNELS).eval()
    decode = DecodeConfig(beam_size=5, num_captions=5, max_length=8, mbr_samples=9)
    column = features(30)
    found = search_mbr(decoder, column, decode, RARE)
    beams = search(decoder, column, decode)
    each = -(-9 // members)
    drawn = [
        sample(one, column, each, 8, temperature=0.8, noise=torch.Generator().manual_seed(seed))[0]
        for seed, one in enumerate(members_of(decoder))
    ]
    newcomers = 0
    for image, hypotheses in enumerate(found):
        captions = [
            tuple(word for word in caption if word)
            for tokens in drawn
            for caption in tokens[image * each : (image + 1) * each, 1:].tolist()
        ]

        def worth(
            words: tuple[int, ...], score: float, captions: list[tuple[int, ...]] = captions
        ) -> float:
            others = list(captions)
            if words in others:
                others.remove(words)
            vector = RARE.vector(words)
            gains = [math.sqrt(cider_d(vector, [RARE.vector(one)])) for one in others]
            return score + 8 * sum(gains) / len(gains)

        ranked = [worth((*one.tokens, END), one.score) for one in hypotheses]
        assert ranked == sorted(ranked, reverse=True)
        # Nothing that the search found is worth more than what came first.
        assert ranked[0] >= max(worth((*one.tokens, END), one.score) for one in beams[image]) - 1e-9
        searched = {one.tokens for one in beams[image]}
        newcomers += sum(one.tokens not in searched for one in hypotheses)
        assert {(*one.tokens, END) for one in hypotheses if one.tokens not in searched} <= set(
            captions
        )
    assert newcomers > 10


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_drawn_caption_is_scored_as_a_search_would_have(kind: str, members: int) -> None:
    torch.manual_seed(0)
    sizes = {"width": 16, "output_width": 16, "attention_width": 8, "heads": 4, "layers": 1}
    config = DecoderConfig(kind=kind, ensemble_size=members, **sizes)
    decoder = build_decoder(config, VOCABULARY, CHANNELS).eval()
    decode = DecodeConfig(beam_size=4, num_captions=4)
    column = features(4)
    short, long = (
        search(decoder, column, decode.model_copy(update={"max_length": words})) for words in (1, 4)
    )
    # Of each image another number of captions.
    expected = [
        [*one[:number], *other[:number]]
        for number, (one, other) in enumerate(zip(long, short, strict=True))
    ]
    captions = [[(*one.tokens, END) for one in image] for image in expected]
    scored = score(decoder, column, captions, decode)
    assert [[one.tokens for one in image] for image in scored] == [
        [one.tokens for one in image] for image in expected
    ]
    for got, one in zip(itertools.chain(*scored), itertools.chain(*expected), strict=True):
        assert got.log_prob == pytest.approx(one.log_prob, rel=1e-4)
        assert got.score == pytest.approx(one.score, rel=1e-4)
        assert (got.attention is None) == (one.attention is None)
        if one.attention is not None:
            torch.testing.assert_close(got.attention, one.attention, rtol=1e-4, atol=1e-5)


def test_those_that_agree_best_are_scored() -> None:
    worth = {(word, END): float(word % 7) for word in range(4, 18)}
    unfinished, repeating = (20, 21, 22), (23, 23, END)
    worth |= {unfinished: 9.0, repeating: 9.0, (END,): 9.5}
    beams = {(13, END)}  # the one that agrees second best
    assert contenders(worth, beams, 1) == [(6, END), (5, END), (12, END), (4, END), (11, END)]
    assert contenders(worth, beams, 0)[0] == repeating
    assert contenders({unfinished: 1.0}, set(), 0) == []


def test_what_was_drawn_with_repeats_or_not_to_its_end_is_not_chosen() -> None:
    torch.manual_seed(0)
    decoder = build_decoder(DecoderConfig(width=16, output_width=16), VOCABULARY, CHANNELS).eval()
    decode = DecodeConfig(
        beam_size=8, num_captions=8, max_length=6, mbr_samples=200, no_repeat_ngram=1
    )
    found = search_mbr(decoder, features(20), decode, RARE)
    assert all(len(set(one.tokens)) == len(one.tokens) for image in found for one in image)
    assert all(len(one.tokens) <= 6 for image in found for one in image)
    loose = decode.model_copy(update={"no_repeat_ngram": 0})
    found = search_mbr(decoder, features(20), loose, RARE)
    assert any(len(set(one.tokens)) < len(one.tokens) for image in found for one in image)


def test_a_caption_is_no_witness_for_itself() -> None:
    one, other = (4, 5, 6, 7, END), (8, 9, 10, 11, 12)
    worth = agreements([one], [one, one, other], RARE)
    assert worth[one] == pytest.approx(math.sqrt(10.0) / 2)
    assert worth[other] == pytest.approx(0.0)
    assert agreements([one], [other] * 3, RARE)[one] == pytest.approx(0.0)
    assert agreements([other], [one] * 3, RARE)[one] == pytest.approx(math.sqrt(10.0))
    assert agreements([one], [one], RARE)[one] == 0.0


def test_the_captioner_ranks_by_consensus_when_asked() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(width=16, output_width=16)
    decoder = build_decoder(config, VOCABULARY, CHANNELS).eval()
    vocabulary = Vocabulary.build([[f"w{number}" for number in range(VOCABULARY - UNK - 1)]])
    captioner = Captioner(LoadedModel("", None, vocabulary, decoder, RARE), "cpu")
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


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_caption_does_not_depend_on_its_batch(
    kind: str, members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    sizes = {"width": 16, "output_width": 16, "attention_width": 8, "heads": 4, "layers": 1}
    config = DecoderConfig(kind=kind, ensemble_size=members, **sizes)
    decoder = build_decoder(config, VOCABULARY, CHANNELS).eval()
    decode = DecodeConfig(beam_size=4, num_captions=4, max_length=8, mbr_samples=7)
    column = features(5)

    def caption(rows: slice) -> list[list[tuple[int, ...]]]:
        some = {name: tensor[rows] for name, tensor in column.items()}
        found = search_mbr(decoder, some, decode, RARE)
        return [[one.tokens for one in image] for image in found]

    together = caption(slice(None))
    assert caption(slice(None)) == together
    assert [caption(slice(row, row + 1))[0] for row in range(5)] == together
    monkeypatch.setattr("captioner.decoding.mbr._ROWS", 1)
    assert caption(slice(None)) == together


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
