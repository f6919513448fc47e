"""One training run: a feature store in, a model directory out."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray.train import UserCallback

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import ModelManifest
from captioner.artifacts.model_directory import load_model, open_model
from captioner.artifacts.output import Output, publish_once
from captioner.config import LearningConfig, TrainConfig
from captioner.decoders import build_decoder, decoder_class
from captioner.decoding.cider import NGramFrequencies
from captioner.errors import StoreError
from captioner.runtime.cluster import start_ray
from captioner.text import Vocabulary, clean
from captioner.training.checkpoints import Learnt, last_checkpoint
from captioner.training.decoder_worker import train_worker
from captioner.training.fit import Work, learn
from captioner.training.history import EpochRecord, best_epoch
from captioner.training.publish import published_history, write_model
from captioner.training.start import with_settings_of

logger = logging.getLogger(__name__)

# At most so many images tell how rare an n-gram is, so that the table in the model stays small.
NGRAM_IMAGES = 20_000
# Where things lie, how they reach a worker and how many share the work: a run may go on with others. (Streamed batches
# are others than resident ones, and each worker draws its own dropout, so the weights are not the same to the bit.)
NO_MATTER = {
    "output",
    "num_workers",
    "gpus_per_worker",
    "threads_per_worker",
    "checkpoint_minutes",
    "max_failures",
    "track",
    "restart",
}


@dataclass(frozen=True)
class TrainResult:
    """A finished training run."""

    uri: str
    history: list[EpochRecord]

    @property
    def best(self) -> EpochRecord:
        return best_epoch(self.history)


def run_training(config: TrainConfig, callbacks: Sequence[UserCallback] = ()) -> TrainResult:
    """Train ``config.decoder`` on a feature store; publish the weights of its best epoch (``best_epoch``) and, beside
    them, those after the last step.

    Continues a killed run from its last epoch; leaves a complete model of the same settings alone.

    Raises:
        StoreError: the features are missing something, or the output belongs to another run.
        ModelError: the model to start from cannot be read, or does not fit the features.
        ConfigError: the cluster is too small for ``num_workers``, or settings do not fit each other.
        TrainingError: the loss stopped being finite.
    """
    store = FeatureStore.open(config.features)
    if config.init is not None:
        config = with_settings_of(config, load_model(config.init), store.manifest)
    with torch.device("meta"):
        # Settings that do not fit each other are refused before the directory is claimed.
        build_decoder(config.decoder, 1, store.manifest.encoder.spec.shape)
    columns = decoder_class(config.decoder.kind).columns
    store.require("train", columns, captions=True, mirrored=config.mirrored, crops=config.crops)
    store.require("validation", columns, captions=True)

    def fill(output: Output) -> ModelManifest:
        vocabulary, ngrams = _read_captions(config, store)
        start_ray()
        name = config.decoder.kind
        logger.info(
            "training %s on %s captions, %s words, %s worker%s",
            name
            if config.decoder.ensemble_size == 1
            else f"{config.decoder.ensemble_size} x {name}",
            f"{store.manifest.splits['train'].captions:,}",
            f"{len(vocabulary):,}",
            "-".join(str(number) for number in sorted(set(config.worker_range))),
            "s" if config.worker_range[1] > 1 else "",
        )
        absolute = config.model_copy(update={"features": storage.absolute(config.features)})
        work = Work(
            train_worker,
            {"config": absolute.model_dump_json(), "vocabulary": vocabulary.save_json()},
        )
        files = learn(
            config,
            output,
            work,
            lambda learnt: write_model(config, output, store, vocabulary, ngrams, learnt),
            callbacks,
        )
        return ModelManifest(files=files)

    return _publish(config, store, fill)


def publish_as_it_stands(config: TrainConfig) -> TrainResult:
    """Publish what a run that has ended an epoch, but not the last, has learnt so far.

    Raises:
        StoreError: it has not ended an epoch, or its directory cannot be read or written.
    """
    store = FeatureStore.open(config.features)

    def fill(output: Output) -> ModelManifest:
        checkpoint = last_checkpoint(output.root)
        if checkpoint is None:
            raise StoreError(f"{output.root} has no checkpoint")
        vocabulary, ngrams = _read_captions(config, store)
        learnt = Learnt.read(checkpoint)
        return ModelManifest(files=write_model(config, output, store, vocabulary, ngrams, learnt))

    return _publish(config, store, fill)


def _publish(
    config: TrainConfig, store: FeatureStore, fill: Callable[[Output], ModelManifest]
) -> TrainResult:
    return publish_trained(config, _identity(config, store), fill)


def publish_trained(
    config: LearningConfig, identity: dict[str, Any], fill: Callable[[Output], ModelManifest]
) -> TrainResult:
    """Publish a model, and say what its best epoch is."""
    publish_once(config.output, identity, ModelManifest, fill, restart=config.restart)
    root = storage.absolute(config.output)
    result = TrainResult(root, published_history(root))
    logger.info(
        "%s: best epoch %d of %d, validation loss %.4f, accuracy %.4f",
        root,
        result.best.epoch,
        len(result.history),
        result.best.validation_loss,
        result.best.validation_accuracy,
    )
    return result


def _identity(config: TrainConfig, store: FeatureStore) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={*NO_MATTER, "features", "ingest"})
    if config.init is not None:
        # Wherever it lies.
        settings["init"] = open_model(config.init).version
    return {"job": "train", "features": store.identity(), "training": settings}


def _read_captions(
    config: TrainConfig, store: FeatureStore
) -> tuple[Vocabulary, NGramFrequencies | None]:
    """The train split's vocabulary, and where the search ranks by them the n-grams of a sample of its images."""
    images = list(store.captions("train").values())
    rules, longest = config.text.rules, config.text.max_length
    most = min(longest - 2, config.decode.max_length)
    lengths: Counter[bool] = Counter()

    def words() -> Iterator[list[str]]:
        for captions in images:
            for caption in captions:
                found = clean(caption, rules)
                lengths[len(found) > most] += 1
                yield found

    vocabulary = Vocabulary.build(words(), config.text.min_count, rules)
    if lengths[True] > 0.05 * lengths.total():
        # Graphemes are many: a Thai caption has twice the tokens of an English one.
        logger.warning(
            "%d %% of the captions have more words than the %d of text.max-length and decode.max-length",
            round(100 * lengths[True] / lengths.total()),
            most,
        )
    if not config.decode.mbr_samples:
        return vocabulary, None
    # From all over the split: its order is that of folders and files.
    sample = images[:: -(-len(images) // NGRAM_IMAGES)]
    tokens = (
        [vocabulary.encode(clean(caption, rules), longest)[1:] for caption in captions]
        for captions in sample
    )
    return vocabulary, NGramFrequencies.count(tokens)
