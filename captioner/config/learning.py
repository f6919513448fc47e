"""Settings of the jobs that learn: a decoder on stored features, or decoder and encoder on pictures."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from captioner.config.decoding import DecodeConfig
from captioner.config.parts import (
    AcceptUnreadable,
    Compute,
    DecoderConfig,
    Fraction,
    ImageLimits,
    JobConfig,
    OptimizerConfig,
    Positive,
    Restart,
    RetrySeconds,
    Seed,
    SourceConfig,
    TextConfig,
    Track,
    check_gpu_share,
)


class LearningConfig(JobConfig):
    """What every training is told: how long, in which steps, and by how many workers."""

    output: str
    """Directory of the model (path or URI)."""
    epochs: Positive = 20
    """Most passes over the train captions."""
    global_batch: Positive = 64
    """Captions per optimizer step, over all workers together."""
    gradient_accumulation: Positive = 1
    """Passes that a worker makes for one optimizer step, each over its part of the worker's captions: less memory for
    the same gradient."""
    patience: Positive | None = 5
    """Stop after this many epochs without a better validation loss (self_critical: CIDEr-D); None trains all epochs."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability mass spread over the vocabulary in the training loss (validation never smooths)."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of the exponential moving average of the weights, per optimizer step; the averaged weights are validated
    and published. 0: none."""
    validation_cider: bool = False
    """Also caption the validation images greedily after every epoch, and keep the epoch of the highest CIDEr-D."""
    num_workers: Positive | tuple[Positive, Positive] = 1
    """Data-parallel workers (DDP), each with one GPU where the cluster has any. Two numbers: as many as the cluster has
    room for, at least the first, at most the second, adjusted while training."""
    gpus_per_worker: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a GPU for the worker, where the cluster has any; below 1 runs of one worker share GPUs."""
    threads_per_worker: Positive | None = None
    """Threads of one worker on CPU; default: the node's cores, shared between the run's workers on it."""
    compute: Literal["auto", Compute] = "auto"
    """Arithmetic of the forward and backward passes; weights stay float32. auto: bfloat16 where the
    processor multiplies it; on a CPU it wants AVX512."""
    seed: Seed = 0
    """Seed of weights, dropout and the order of captions."""
    checkpoint_minutes: Annotated[float, Field(gt=0.0)] = 10.0
    """Most minutes of an epoch between two checkpoints, from which a run continues; there is one after every epoch,
    too."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Worker failures survived by restarting from the last checkpoint."""
    track: Track = None
    restart: Restart = False

    @model_validator(mode="after")
    def _workers_fit(self) -> "LearningConfig":
        low, high = self.worker_range
        if low > high:
            raise ValueError(f"num_workers: the first of {low} {high} must not be the larger")
        check_gpu_share("gpus_per_worker", self.gpus_per_worker, high)
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        number = self.num_workers
        return number if isinstance(number, tuple) else (number, number)

    @property
    def rule(self) -> OptimizerConfig:
        """Optimizer and schedule."""
        raise NotImplementedError

    @property
    def scores_captions(self) -> bool:
        """Whether epochs are compared by the CIDEr-D of captions."""
        return self.validation_cider

    @property
    def waits_for_cider(self) -> bool:
        """Whether ``patience`` is for a better CIDEr-D, not for a better validation loss."""
        return False


# Fields of the second base come first in --help.
class _OnFeatures(JobConfig):
    features: str
    """Feature store (path or URI)."""
    init: str | None = None
    """Model that training starts from (path or URI, or hf:org/name[@revision]). Its decoder, text rules and search are
    taken over where none are given; words it knows keep their weights."""
    objective: Literal["cross_entropy", "self_critical"] = "cross_entropy"
    """cross_entropy: the next word of the references. self_critical: captions are drawn, and those made more probable
    that CIDEr-D finds better than the others of their image; starts from a model (init), at a learning rate of some
    2e-5. On Flickr8k an epoch of it brought three decoders .007 of CIDEr-D."""
    samples: Annotated[int, Field(ge=2, le=100)] = 5
    """self_critical: captions drawn of an image; global_batch counts them."""
    decoder: DecoderConfig = DecoderConfig()
    text: TextConfig = TextConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class TrainConfig(LearningConfig, _OnFeatures):
    """Train a decoder on a feature store."""

    group_captions: bool = False
    """Keep the captions of an image in one batch: its features are read and projected once for all of them."""
    mirrored: bool = False
    """Mirror images are views for training, too; needs features extracted with --mirrored. Each epoch samples one view
    per image uniformly: the image itself, its mirror image or one of its crops."""
    crops: Annotated[int, Field(ge=0, le=16)] = 0
    """Random crops per image that are views for training, too; needs features extracted with at least as many
    --crops."""
    decode: DecodeConfig = DecodeConfig()
    """The search stored with the model, for its captions where nothing else is asked for."""
    ingest: Literal["auto", "resident", "streaming"] = "auto"
    """How features reach a worker. resident: in memory, or in a local file mapped to it. streaming: read from the store
    again in every epoch, in other batches of the same captions. auto: resident where it fits."""

    @model_validator(mode="after")
    def _starts_somewhere(self) -> "TrainConfig":
        if self.decode.prompt:
            raise ValueError("decode.prompt: is for chat models, and none is trained here")
        if self.objective == "self_critical" and self.init is None:
            raise ValueError("objective: self_critical starts from a model; give init")
        return self

    @property
    def rule(self) -> OptimizerConfig:
        return self.optimizer

    @property
    def scores_captions(self) -> bool:
        return self.validation_cider or self.waits_for_cider

    @property
    def waits_for_cider(self) -> bool:
        return self.objective == "self_critical"


class _OnPictures(JobConfig):
    model: str
    """Trained model (path or URI, or hf:org/name[@revision]) whose decoder and encoder go on learning. Its vocabulary,
    text rules and search are the new one's."""
    source: str
    """Pictures with captions in splits train and validation: shapes, flickr8k, flickr30k, hf:org/name[@revision], or a
    path or URI, as for extract_features. Pictures are read in a random order: what lies in tar shards, or in Parquet
    files of large row groups, is read slowly."""
    source_options: SourceConfig = SourceConfig()
    stages: Positive = 1
    """How many of the encoder's last stages (of timm's transformers: blocks) learn; batch norms stay frozen."""
    encoder_learning_rate: Annotated[float, Field(gt=0.0)] = 2e-5
    """Peak learning rate of the encoder."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate of the decoder."""
    encoder_weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight decay of the encoder, decoupled (AdamW)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight decay of the decoder, decoupled (AdamW)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps of linear warm-up; from then on both rates fall by a cosine, to 0 at the end."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Largest global gradient norm; None switches clipping off."""
    crop: bool = True
    """Show a random part of each picture, another in every epoch (45 to 100 % of it, enlarged to the input)."""
    mirror: bool = True
    """Mirror every other picture, others in every epoch. For captions that know left from right: --no-mirror."""


class FinetuneConfig(LearningConfig, _OnPictures):
    """Finetune: decoder and encoder of a trained model go on learning, on the pictures themselves."""

    epochs: Positive = 5
    """Most passes over the train pictures."""
    global_batch: Positive = 160
    """Captions per optimizer step, over all workers together; those of a picture stay together."""
    limits: ImageLimits = ImageLimits()
    max_reject_fraction: Fraction = 0.01
    """Largest fraction of pictures that cannot be loaded; past it the job fails before it learns. rejects.csv in the
    output lists them."""
    retry_seconds: RetrySeconds = 60.0
    accept_unreadable: AcceptUnreadable = False

    @property
    def rule(self) -> OptimizerConfig:
        return OptimizerConfig(
            name="adamw",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            warmup_steps=self.warmup_steps,
            schedule="cosine",
        )
