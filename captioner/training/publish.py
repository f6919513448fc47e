"""What a training publishes, from its last checkpoint, and what can be read of it before and after."""

import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.tensorboard import SummaryWriter

from captioner import storage
from captioner.artifacts.feature_store import FeatureStore
from captioner.artifacts.manifests import MANIFEST, FileEntry
from captioner.artifacts.model_directory import save_model
from captioner.artifacts.output import Output
from captioner.artifacts.tensorboard import event_file
from captioner.config import TrainConfig
from captioner.decoding.cider import NGramFrequencies
from captioner.errors import StoreError
from captioner.plots import plot_history
from captioner.text import Vocabulary
from captioner.training.checkpoints import Learnt, last_checkpoint, read
from captioner.training.history import EpochRecord, best_epoch, read_history
from captioner.training.state import HISTORY, LAST

HISTORY_ROWS = pa.schema(
    [
        ("epoch", pa.int64()),
        *((name, pa.float64()) for name in EpochRecord.model_fields if name != "epoch"),
    ]
)


def write_model(
    config: TrainConfig,
    output: Output,
    store: FeatureStore,
    vocabulary: Vocabulary,
    ngrams: NGramFrequencies | None,
    learnt: Learnt,
) -> list[FileEntry]:
    """Write a model directory, all but its manifest."""
    files = save_model(
        output,
        weights=learnt.best,
        vocabulary=vocabulary,
        ngrams=ngrams,
        decoder=config.decoder,
        text=config.text,
        decode=config.decode,
        encoder=store.manifest.encoder,
        encoder_weights=store.read_encoder_weights(),
        training=config.model_dump(mode="json"),
    )
    return [*files, output.write(LAST, learnt.last), *write_history(output, learnt.history)]


def write_history(output: Output, history: Sequence[EpochRecord]) -> list[FileEntry]:
    """Write the epochs of a model: as a table, as curves, for TensorBoard, and the figures of the best one."""
    best = best_epoch(history)
    rows = pa.Table.from_pylist([epoch.model_dump() for epoch in history], HISTORY_ROWS)
    table = io.BytesIO()
    pq.write_table(rows, table)
    files = [
        output.write("metrics.json", best.model_dump_json(indent=1).encode()),
        output.write("history.parquet", table.getvalue()),
        output.write("curves.png", plot_history(history, best.epoch)),
    ]
    with event_file(output, "training", files) as writer:
        add_epochs(writer, history)
    return files


def add_epochs(writer: SummaryWriter, history: Sequence[EpochRecord]) -> None:
    """Add the figures of epochs to TensorBoard's scalars."""
    for record in history:
        figures = record.model_dump(exclude={"epoch"}, exclude_none=True)
        for name, value in figures.items():
            head, _, tail = name.partition("_")
            tag = f"{tail}/{head}" if head in ("train", "validation") else f"speed/{name}"
            writer.add_scalar(
                tag.replace("speed/learning_rate", "learning_rate"), value, record.epoch
            )


def history_so_far(root: str) -> list[EpochRecord]:
    """The epochs that a run has ended, published or not; none of a directory where none has begun.

    Args:
        root: the model's directory.

    Raises:
        StoreError: it cannot be read.
    """
    if storage.exists(storage.join(root, MANIFEST)):
        return published_history(root)
    checkpoint = last_checkpoint(root)
    return [] if checkpoint is None else read_history(read(checkpoint, HISTORY).decode())


def published_history(root: str) -> list[EpochRecord]:
    """The epochs of a published model.

    Raises:
        StoreError: they cannot be read.
    """
    uri = storage.join(root, "history.parquet")
    with storage.reading(uri), storage.open_input(uri) as file:
        rows = pq.read_table(file).to_pylist()
    if not rows:
        raise StoreError(f"{uri} is empty")
    return read_history(json.dumps(rows))
