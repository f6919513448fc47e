"""The worker that trains a decoder on stored features."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from captioner.artifacts.feature_store import FeatureStore
from captioner.config import TrainConfig
from captioner.decoders import build_decoder
from captioner.decoders.base import Decoder, Features
from captioner.runtime.device import memory_bytes
from captioner.text import Vocabulary
from captioner.training.data import Batch, units_to_learn
from captioner.training.ingest import fit_standardize, open_split
from captioner.training.references import References
from captioner.training.self_critical import SelfCritical
from captioner.training.start import load_weights
from captioner.training.steps import TeacherForcing, require_finite
from captioner.training.worker import Learner, Worker, run_worker


def train_worker(arguments: dict[str, Any]) -> str | None:
    """Ray Train's per-worker function.

    Args:
        arguments: ``config`` (TrainConfig as JSON), ``vocabulary`` (its JSON), and ``messages``, an actor for progress
            lines or None.

    Returns:
        as ``run_worker``.
    """
    return run_worker(
        lambda: DecoderWorker(
            TrainConfig.model_validate_json(arguments["config"]),
            Vocabulary.from_json(arguments["vocabulary"]),
            arguments["messages"],
        )
    )


class DecoderWorker(Worker):
    """Trains a decoder; its encoder is that of the store."""

    config: TrainConfig

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, messages: Any):
        self.vocabulary = vocabulary
        super().__init__(config, messages)

    def prepare(self) -> Learner:
        config, vocabulary = self.config, self.vocabulary
        store = FeatureStore.open(config.features)
        shape = store.manifest.encoder.spec.shape
        decoder = build_decoder(config.decoder, len(vocabulary), shape)
        train, validation = (
            open_split(
                store,
                split,
                decoder.columns,
                vocabulary,
                config,
                rank=self.rank,
                workers=self.workers,
                memory=memory_bytes(),
            )
            for split in ("train", "validation")
        )
        if config.init is None:
            fit_standardize(decoder, train, whole=config.decoder.standardize == "whole")
        else:
            load_weights(decoder, config.init, vocabulary, shape)
        objective: nn.Module = TeacherForcing(decoder, config.label_smoothing)
        if config.objective == "self_critical":
            objective = SelfCritical(
                decoder, References(train.data), config.samples, config.decode.max_length
            )
        units, batch = units_to_learn(train.data, config)
        steps = -(-int((units >= 0).sum()) // batch)
        return Learner(decoder, objective, train, validation, steps, config.decode.max_length)

    def judge(self) -> tuple[Decoder, Callable[[Batch], Features]]:
        return cast(Decoder, self.state.judged), lambda batch: batch.features

    def figures(self, sums: Tensor, epoch: int, seconds: float) -> dict[str, Any]:
        if self.config.objective == "cross_entropy":
            return super().figures(sums, epoch, seconds)
        loss, reward = sums.tolist()
        require_finite(loss, epoch, "training")
        images = len(units_to_learn(self.train.data, self.config)[0])
        return {
            "train_loss": None,
            "train_accuracy": None,
            "train_cider": reward / images,
            "captions_per_second": images * self.config.samples / seconds,
        }
