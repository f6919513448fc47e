"""Captions ranked by how well they agree with captions drawn at random."""

import math

import pytest
import torch
from torch import Tensor, nn

from captioner.captioning import Captioner
from captioner.cider import NGramFrequencies, cider_d
from captioner.config import DecodeConfig, DecoderConfig
from captioner.model_store import LoadedModel
from captioner.models import DECODERS, build_decoder
from captioner.models.base import Features, State
from captioner.models.consensus import agreement, search_by_consensus
from captioner.models.ensemble import members_of
from captioner.models.sampling import sample
from captioner.models.search import Hypothesis, search
from captioner.text import END, START, UNK, Vocabulary

from .test_models import CHANNELS, VOCABULARY, features

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
    ranked = config.model_copy(update={"consensus": 64})
    [by_consensus] = search_by_consensus(decoder, one, ranked, RARE)
    assert by_consensus[-1].tokens == MODE
    assert {one.tokens for one in by_consensus} == {one.tokens for one in by_score}
    few = ranked.model_copy(update={"num_captions": 1})
    assert search_by_consensus(decoder, one, few, RARE) == [by_consensus[:1]]


@pytest.mark.parametrize("members", [1, 2])
def test_rank_is_score_plus_mean_cider_of_what_every_member_draws(members: int) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(width=16, output_width=16, members=members)
    decoder = build_decoder(config, VOCABULARY, CHANNELS).eval()
    # Of so small a score that the agreement decides.
    decode = DecodeConfig(
        beam_size=5, num_captions=5, max_length=8, consensus=9, length_penalty=3.0
    )
    column = features(30)
    found = search_by_consensus(decoder, column, decode, RARE)
    each = -(-9 // members)
    drawn = [
        sample(one, column, each, 8, temperature=0.8, noise=torch.Generator().manual_seed(seed))[0]
        for seed, one in enumerate(members_of(decoder))
    ]
    for image, hypotheses in enumerate(found):
        others = [
            RARE.vector([word for word in caption if word])
            for tokens in drawn
            for caption in tokens[image * each : (image + 1) * each, 1:].tolist()
        ]
        worth = [cider_d(RARE.vector((*h.tokens, END)), others) + h.score for h in hypotheses]
        assert worth == sorted(worth, reverse=True)


def test_a_caption_that_all_captions_drawn_repeat_agrees_wholly() -> None:
    one = Hypothesis((4, 5, 6, 7), -1.0, -0.2, None)
    others = [RARE.vector((4, 5, 6, 7, END))] * 3
    assert agreement(one, others, RARE) == pytest.approx(10.0)


def test_the_captioner_ranks_by_consensus_when_asked() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(width=16, output_width=16)
    decoder = build_decoder(config, VOCABULARY, CHANNELS).eval()
    vocabulary = Vocabulary.build([[f"w{number}" for number in range(VOCABULARY - UNK - 1)]])
    captioner = Captioner(LoadedModel("", None, vocabulary, decoder, RARE), "cpu")
    plain = DecodeConfig(beam_size=5, max_length=8)
    asked = plain.model_copy(update={"consensus": 30})
    column = features(30)

    def captions(decode: DecodeConfig) -> list[str]:
        return [caption.text for caption in captioner.caption_features(column, decode)]

    found = search_by_consensus(decoder, column, asked, RARE)
    assert captions(asked) == [vocabulary.decode(list(image[0].tokens)) for image in found]
    assert captions(asked) != captions(plain)
    greedy = {"beam_size": 1}
    assert captions(asked.model_copy(update=greedy)) == captions(plain.model_copy(update=greedy))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_caption_does_not_depend_on_its_batch(
    kind: str, members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    sizes = {"width": 16, "output_width": 16, "attention_width": 8, "heads": 4, "layers": 1}
    config = DecoderConfig(kind=kind, members=members, **sizes)
    decoder = build_decoder(config, VOCABULARY, CHANNELS).eval()
    decode = DecodeConfig(beam_size=4, num_captions=4, max_length=8, consensus=7)
    column = features(5)

    def caption(rows: slice) -> list[list[tuple[int, ...]]]:
        some = {name: tensor[rows] for name, tensor in column.items()}
        found = search_by_consensus(decoder, some, decode, RARE)
        return [[one.tokens for one in image] for image in found]

    together = caption(slice(None))
    assert caption(slice(None)) == together
    assert [caption(slice(row, row + 1))[0] for row in range(5)] == together
    monkeypatch.setattr("captioner.models.consensus._ROWS", 1)
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
    config = DecodeConfig(consensus=4)
    assert search_by_consensus(Opinions(), {"pooled": torch.zeros(0, 1)}, config, RARE) == []
