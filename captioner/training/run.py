"""One training run: a feature store in, a model directory out."""

import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import ModelManifest
from captioner.artifacts.model_directory import load_model, open_model
from captioner.artifacts.output import Output, publish_once
from captioner.config import TrainConfig
from captioner.decoders import build_decoder, decoder_class
from captioner.decoding.cider import NGramFrequencies
from captioner.errors import CaptionerError, ConfigError, StoreError, TrainingError
from captioner.runtime.cluster import num_gpus, start_ray, worker_slots
from captioner.runtime.progress import MessageLog, Ticker
from captioner.runtime.ray_private import start_autoscaling_coordinator
from captioner.text import Vocabulary, clean
from captioner.training.checkpoints import RUN, Learnt, last_checkpoint
from captioner.training.history import EpochRecord, best_epoch
from captioner.training.publish import published_history, write_model
from captioner.training.start import with_settings_of
from captioner.training.tracking import FOLLOW_SECONDS, Tracker
from captioner.training.worker import train_worker

logger = logging.getLogger(__name__)

# At most so many images tell how rare an n-gram is, so that the table in the model stays small.
NGRAM_IMAGES = 20_000
# Key of the run in MLflow.
_RUN = "run"
# Where things lie, how they reach a worker and how many share the work: a run may go on with others. (Streamed batches
# are others than resident ones, and each worker draws its own dropout, so the weights are not the same to the bit.)
_NO_MATTER = {
    "features",
    "output",
    "num_workers",
    "gpus_per_worker",
    "threads_per_worker",
    "ingest",
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
        start_autoscaling_coordinator()
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
        tracker = Tracker(config.track, output.work())
        tracker.begin(_RUN, output.root.rpartition("/")[2], config.model_dump(mode="json"))
        with (
            tracker.ended_with(_RUN),
            Ticker(lambda: tracker.follow(_RUN, output.root), FOLLOW_SECONDS),
        ):
            learnt = _fit(config, output, vocabulary, callbacks)
        files = write_model(config, output, store, vocabulary, ngrams, learnt)
        if tracker.follows:
            best = best_epoch(learnt.history).model_dump(exclude={"epoch"}, exclude_none=True)
            tracker.end(
                _RUN,
                scores={f"best_{name}": value for name, value in best.items()},
                tags={"model": output.root},
                pictures={"curves.png": storage.read_bytes(output.uri("curves.png"))},
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
    identity = _identity(config, store)
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
    settings = config.model_dump(mode="json", exclude=_NO_MATTER)
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


def _fit(
    config: TrainConfig,
    output: Output,
    vocabulary: Vocabulary,
    callbacks: Sequence[UserCallback],
) -> Learnt:
    gpu, slots = num_gpus() > 0, worker_slots(config.gpus_per_worker)
    if slots < config.worker_range[0]:
        raise ConfigError(
            f"num-workers: {config.worker_range[0]} need as many {'GPUs' if gpu else 'CPUs'}, "
            f"the cluster has {slots}"
        )
    last_checkpoint(output.root)  # a damaged list of them would refuse the run
    filesystem, path = storage.resolve(output.work())
    with MessageLog(logger) as messages:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "config": config.model_copy(
                    update={"features": storage.absolute(config.features)}
                ).model_dump_json(),
                "vocabulary": vocabulary.save_json(),
                "messages": messages.actor,
            },
            scaling_config=ScalingConfig(
                num_workers=config.num_workers,
                use_gpu=gpu,
                resources_per_worker={"GPU": config.gpus_per_worker, "CPU": 1}
                if gpu
                else {"CPU": 1},
            ),
            run_config=RunConfig(
                # A second fit() under the same name and path continues from the last checkpoint.
                name=RUN,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=config.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=list(callbacks),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            with _plain_interrupts():
                result = trainer.fit()
        except TrainingFailedError as failure:
            raise error_of_ours(failure) from failure
    if result.return_value is not None:
        kept = f"; the epoch before is kept in {output.work()}" if result.checkpoint else ""
        raise TrainingError(f"{result.return_value}{kept}")
    return Learnt.read(result.checkpoint)


@contextmanager
def _plain_interrupts() -> Iterator[None]:
    """Ctrl-C ends a training as a ``KeyboardInterrupt``.

    Ray Train's handler stops the workers and then exits with status 0, as if all were done; and it stays in place when
    the training is over.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def error_of_ours(failure: Exception) -> Exception:
    """The error of ours behind a failed run or search, if there is one."""
    # Only failures of workers carry them; a failed controller or a preempted node has none.
    for failed in [failure, *getattr(failure, "worker_failures", {}).values()]:
        error: BaseException | None = failed
        while error is not None:
            if isinstance(error, CaptionerError):
                return error
            error = error.__cause__ or error.__context__
    return failure
