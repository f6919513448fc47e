"""Beam search over any decoder. It knows token ids alone, no words and no decoder.

Length normalisation as in Wu et al., "Google's Neural Machine Translation System" (2016), without their offset: the
log-probability is divided by ``length ** penalty``, the length counting the words and ``<end>``.

Shapes: B images, K beams, V vocabulary, P grid cells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.config import DecodeConfig
from captioner.decoders.base import Decoder, Features, State
from captioner.decoding.constraint import FREE, Constraint
from captioner.text import END, PAD, START, UNK


@dataclass(frozen=True)
class Hypothesis:
    """A finished caption."""

    tokens: tuple[int, ...]
    """Word ids, without ``<start>`` and ``<end>``."""
    log_prob: float
    """Natural logarithm of the probability, ``<end>`` included."""
    score: float
    """``log_prob`` normalised by length: what a search ranks captions by."""
    attention: Tensor | None
    """float32 [words, P], or None."""


@torch.inference_mode()
def search(
    decoder: Decoder, features: Features, config: DecodeConfig, constraint: Constraint = FREE
) -> list[list[Hypothesis]]:
    """The ``num_captions`` best captions of every image, best first.

    A beam that reaches ``<end>`` leaves the beam and is kept aside. An image is done, and leaves the batch, when
    nothing that its living beams can become is among its ``num_captions`` best. At ``max_length`` words the living
    beams are ended by force. ``beam_size`` 1 is greedy search, done at the first ``<end>``. Of equal candidates the
    one of the better beam comes first, then the smaller word id.

    Args:
        decoder: in evaluation mode.
        features: columns of B images, float32, on the decoder's device.
        constraint: that of ``config``.
    """
    column = next(iter(features.values()))
    if not len(column):
        return []
    state = decoder.start(features)
    beams = _Beams(len(column), config, constraint)
    tokens = torch.full((len(column),), START, device=column.device)
    for length in range(config.max_length + 1):
        logits, state, attention = decoder.step(tokens, state)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        last = length == config.max_length
        chosen = beams.advance(log_probs, attention, force_end=last)
        if chosen is None:
            break
        state, tokens = _select(state, decoder.image_state, chosen), chosen.tokens
    return beams.results()


def normalized(log_prob: float, words: int, penalty: float) -> float:
    """The score of a caption of so many words and ``<end>``."""
    return log_prob / float((words + 1) ** penalty)


@dataclass(frozen=True)
class _Chosen:
    """What lives on after a step."""

    rows: Tensor
    """Rows of the decoder's batch, with repeats."""
    tokens: Tensor
    """Their new words."""
    images: Tensor | None
    """Positions of the images still searched; None: all of them."""


def _select(state: State, image_state: frozenset[str], chosen: _Chosen) -> State:
    kept = {}
    for name, tensor in state.items():
        rows = chosen.images if name in image_state else chosen.rows
        kept[name] = tensor if rows is None else tensor.index_select(0, rows)
    return kept


class _Beams:
    """Living beams of the images that are not done, and the finished captions of all images."""

    def __init__(self, images: int, config: DecodeConfig, constraint: Constraint):
        self.config, self.constraint = config, constraint
        self.never = [PAD, START, UNK, *constraint.forbidden]
        self.place = 0  # words that the living beams have
        self.live = list(range(images))  # images still searched, in the order of the batch
        self.width = 1  # beams per image: one before the first word
        self.scores: Tensor | None = None  # log-probabilities [images, K]
        self.words: list[list[tuple[int, ...]]] = [[()] for _ in range(images)]
        self.maps: list[list[tuple[Tensor, ...]]] = [[()] for _ in range(images)]
        self.finished: list[list[Hypothesis]] = [[] for _ in range(images)]

    def advance(
        self, log_probs: Tensor, attention: Tensor | None, *, force_end: bool
    ) -> _Chosen | None:
        """Take the step that ``log_probs`` [images * K, V] offers; they are overwritten.

        Returns:
            what lives on; None when all images are done.
        """
        images, beams, vocabulary = len(self.live), self.config.beam_size, log_probs.shape[-1]
        only = END if force_end else self.constraint.forced(self.place)
        self.place += 1
        if only is None:
            log_probs[:, self.never] = -torch.inf
            self._forbid_repeats(log_probs)
        else:
            kept = log_probs[:, only].clone()
            log_probs[:] = -torch.inf
            log_probs[:, only] = kept
        if self.scores is None:
            self.scores = log_probs.new_zeros(images, 1)
        totals = log_probs.add_(self.scores.reshape(-1, 1)).reshape(images, -1)
        # Twice the beam: at most `beams` of the best candidates can be ends, so as many words remain.
        count = min(2 * beams, totals.shape[1])
        return self._take(_best(totals, count), vocabulary, attention, log_probs)

    def _take(
        self,
        candidates: list[list[tuple[float, int]]],
        vocabulary: int,
        attention: Tensor | None,
        like: Tensor,
    ) -> _Chosen | None:
        beams = self.config.beam_size
        rows, tokens, scores, live, kept, words, maps = [], [], [], [], [], [], []
        for position, image in enumerate(self.live):
            new_words: list[tuple[int, ...]] = []
            new_maps: list[tuple[Tensor, ...]] = []
            new_scores, new_rows = [], []
            for rank, (value, index) in enumerate(candidates[position]):
                source, token = divmod(index, vocabulary)
                row = position * self.width + source
                if value == -torch.inf or len(new_words) == beams:
                    continue
                if token == END:
                    # An end that would not have made the beam is no result of beam search.
                    if rank < beams:
                        self._finish(
                            image, self.words[position][source], value, self.maps[position][source]
                        )
                    continue
                new_words.append((*self.words[position][source], token))
                new_maps.append(
                    self.maps[position][source]
                    if attention is None
                    else (*self.maps[position][source], attention[row])
                )
                new_scores.append(value)
                new_rows.append(row)
            if not new_words or self._settled(image, new_scores[0]):
                continue
            padding = beams - len(new_words)  # a tiny vocabulary offers fewer candidates than beams
            live.append(image)
            kept.append(position)
            words.append(new_words + [new_words[0]] * padding)
            maps.append(new_maps + [new_maps[0]] * padding)
            scores.append(new_scores + [-torch.inf] * padding)
            rows += new_rows + [new_rows[0]] * padding
            tokens += [sequence[-1] for sequence in words[-1]]
        all_live = len(live) == len(self.live)
        self.live, self.words, self.maps, self.width = live, words, maps, beams
        if not live:
            return None
        self.scores = like.new_tensor(scores)
        return _Chosen(
            torch.tensor(rows, device=like.device),
            torch.tensor(tokens, device=like.device),
            None if all_live else torch.tensor(kept, device=like.device),
        )

    def _finish(
        self, image: int, words: tuple[int, ...], log_prob: float, maps: tuple[Tensor, ...]
    ) -> None:
        score = normalized(log_prob, len(words), self.config.length_penalty)
        self.finished[image].append(
            Hypothesis(words, log_prob, score, torch.stack(maps).float() if maps else None)
        )

    def _settled(self, image: int, best_living: float) -> bool:
        """Whether the living beams of an image are given up."""
        wanted = self.config.num_captions
        if len(self.finished[image]) < wanted:
            return False
        if self.config.beam_size == 1:
            return True
        worst_kept = sorted((one.score for one in self.finished[image]), reverse=True)[wanted - 1]
        # A word more costs probability but lengthens the divisor: nothing beats going on to the longest at no cost.
        bound = normalized(best_living, self.config.max_length, self.config.length_penalty)
        return worst_kept >= bound

    def _forbid_repeats(self, log_probs: Tensor) -> None:
        size = self.config.no_repeat_ngram
        if not size:
            return
        for position, sequences in enumerate(self.words):
            for source, words in enumerate(sequences):
                if len(words) + 1 < size:
                    continue
                start = words[len(words) - size + 1 :]
                seen = {
                    words[begin + size - 1]
                    for begin in range(len(words) - size + 1)
                    if words[begin : begin + size - 1] == start
                }
                if seen:
                    log_probs[position * self.width + source, list(seen)] = -torch.inf

    def results(self) -> list[list[Hypothesis]]:
        return [
            sorted(found, key=lambda one: (-one.score, one.tokens))[: self.config.num_captions]
            for found in self.finished
        ]


def _best(totals: Tensor, count: int) -> list[list[tuple[float, int]]]:
    """The ``count`` largest values of each row of ``totals`` [images, N] with their places, equal ones by place."""
    values, places = totals.topk(count, dim=1)
    # topk leaves open which of several equal values at its edge it takes. A sort does not, but costs more than the
    # decoder, so it is kept for the rare rows where that matters.
    edge = values[:, -1:]
    tied = ((totals >= edge).sum(dim=1, keepdim=True) > count) & (edge > -torch.inf)
    unsure = tied.squeeze(1).nonzero().squeeze(1)
    if len(unsure):
        sorted_values, order = totals[unsure].sort(dim=1, descending=True, stable=True)
        values[unsure], places[unsure] = sorted_values[:, :count], order[:, :count]
    return [
        sorted(zip(*row, strict=True), key=lambda one: (-one[0], one[1]))
        for row in zip(values.tolist(), places.tolist(), strict=True)
    ]
