"""The worker that trains decoder and encoder on pictures."""

import io
import logging
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor, nn

from captioner import storage
from captioner.artifacts.model_directory import LoadedModel, load_model
from captioner.config import FinetuneConfig
from captioner.decoders.base import Decoder, Features
from captioner.encoders.encoder import Encoder
from captioner.encoders.learning import LearningEncoder
from captioner.encoders.weights import read_weights
from captioner.features.stage import PIXELS
from captioner.training.data import Batch, CaptionData, Columns
from captioner.training.pictures import Pictures
from captioner.training.steps import TeacherForcing
from captioner.training.worker import Learner, Worker, run_worker


class Network(nn.Module):
    """An encoder, the last stages of which learn, and a decoder."""

    def __init__(self, encoder: LearningEncoder, decoder: Decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


class OnPictures(nn.Module):
    """A network with its loss: what DDP wraps."""

    def __init__(self, network: Network, label_smoothing: float):
        super().__init__()
        self.network = network
        self.forcing = TeacherForcing(network.decoder, label_smoothing)

    def forward(
        self, columns: Columns, tokens: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``TeacherForcing``, of pixels."""
        sums: tuple[Tensor, Tensor] = self.forcing(self.network.encoder(columns[PIXELS]), tokens)
        return sums


def build(model: LoadedModel, stages: int) -> Network:
    """The network of a trained model.

    Raises:
        ModelError: the encoder's weights are not the model's.
        ConfigError: it has fewer stages.
    """
    directory = model.directory
    encoder = LearningEncoder(
        directory.record.encoder.spec,
        read_weights(directory.encoder_weights_uri),
        model.decoder.columns,
        stages,
    )
    return Network(encoder, model.decoder)


def finetune_worker(arguments: dict[str, Any]) -> str | None:
    """Ray Train's per-worker function.

    Args:
        arguments: ``config`` (FinetuneConfig as JSON), ``captions`` (URI of a table with split, image_id and captions
            of the good images, in the order of ids), ``source``, a reference to it, and ``messages``, an actor for
            progress lines or None.

    Returns:
        as ``run_worker``.
    """
    return run_worker(lambda: FinetuneWorker(arguments))


class FinetuneWorker(Worker):
    """Trains a network on pictures."""

    config: FinetuneConfig

    def __init__(self, arguments: dict[str, Any]):
        # What each pass of Ray Data's says of itself; what goes wrong is raised as well.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        self._captions, self._source = arguments["captions"], arguments["source"]
        config = FinetuneConfig.model_validate_json(arguments["config"])
        super().__init__(config, arguments["messages"])

    def prepare(self) -> Learner:
        config, model = self.config, load_model(self.config.model)
        network = build(model, config.stages)
        train, validation = (self._pictures(split, model) for split in ("train", "validation"))
        return Learner(
            network,
            OnPictures(network, config.label_smoothing),
            train,
            validation,
            steps=-(-len(train.data) // config.global_batch),
            longest=model.record.decode.max_length,
            groups=[
                {
                    "params": [one for one in network.decoder.parameters() if one.requires_grad],
                    "pace": 1.0,
                    "weight_decay": config.weight_decay,
                },
                {
                    "params": network.encoder.learning(),
                    "pace": config.encoder_learning_rate / config.learning_rate,
                    "weight_decay": config.encoder_weight_decay,
                },
            ],
        )

    def run(self) -> None:
        if not self.state.history and not self.state.epoch.steps:
            loss, accuracy = self.validate()
            self.tell(f"before | validation loss {loss:.4f} | validation accuracy {accuracy:.4f}")
        super().run()

    def judge(self) -> tuple[Decoder, Callable[[Batch], Features]]:
        # By the encoder that is published, in its arithmetic, so that these figures are those that evaluation finds.
        judged = cast(Network, self.state.judged)
        spec, tensors = judged.encoder.described()
        encoder, columns = Encoder(spec, tensors, str(self.device)), judged.decoder.columns

        def seen(batch: Batch) -> Features:
            pooled, grid = encoder(batch.features[PIXELS], grid="grid" in columns)
            found = {"pooled": pooled, "grid": grid}
            return {name: cast(Tensor, found[name]).float() for name in columns}

        return judged.decoder, seen

    def _pictures(self, split: str, model: LoadedModel) -> Pictures:
        table = pq.read_table(
            io.BytesIO(storage.read_bytes(self._captions)), filters=[("split", "==", split)]
        )
        texts = table["captions"].combine_chunks()
        counts = texts.value_lengths().to_numpy()
        rows = np.repeat(np.arange(len(table)), counts)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        record = model.record
        data = CaptionData.encode(
            [(rows, places, texts.flatten().to_pylist())], model.vocabulary, record.text
        )
        return Pictures(
            data,
            table["image_id"].to_pylist(),
            self._source,
            record.encoder.spec,
            self.config,
            self.rank,
            self.workers,
        )
