"""Settings of the benchmarks."""

from typing import Annotated, Literal

import tyro
from pydantic import Field

from captioner.config.decoding import DecodeOverrides
from captioner.config.parts import (
    Config,
    DecoderConfig,
    DecoderKind,
    EncoderConfig,
    Positive,
    SourceConfig,
    TextConfig,
)


class BenchmarkExtractConfig(Config):
    """Measure extraction on this machine or cluster: each stage alone, then the pipeline."""

    source: str = "shapes"
    """As for extract_features; its images are repeated to reach the number wanted."""
    source_options: SourceConfig = SourceConfig()
    encoder: EncoderConfig = EncoderConfig(weights="random")
    grid: bool = False
    """Also compute and store the grid."""
    images: Annotated[int, Field(ge=100)] = 1200
    """Images through the pipeline."""
    seconds: Annotated[float, Field(gt=0.0)] = 5.0
    """How long each stage is measured alone."""
    batch_size: Positive = 32
    """Images per forward pass of one encoder actor."""
    num_encoders: Positive | None = None
    """Encoder actors; default: as extract_features chooses."""
    cpus_per_encoder: Positive | None = None
    """Threads of one encoder actor on CPU; default: as extract_features chooses."""
    scratch: str | None = None
    """Empty directory for the pipeline's output (path or URI); on several machines one that all reach. Default: a
    temporary one on this machine."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write the result to this file (path or URI)."""


class BenchmarkTrainConfig(Config):
    """Measure training on this machine or cluster: decoders, ways in and numbers of workers."""

    features: str
    """Feature store (path or URI); decoders that look at places need its grid."""
    decoders: tuple[DecoderKind, ...] = (
        "merge",
        "sequence_attention",
        "spatial_attention",
        "adaptive_attention",
        "transformer",
    )
    """Decoders to measure."""
    ingest: tuple[Literal["resident", "streaming"], ...] = ("resident", "streaming")
    """Ways for features to reach a worker."""
    workers: tuple[Positive, ...] = (1, 2)
    """Numbers of data-parallel workers."""
    decoder: DecoderConfig = DecoderConfig()
    """What the decoders share; its kind is not used."""
    text: TextConfig = TextConfig()
    global_batch: Positive = 64
    """Captions per optimizer step, over all workers together."""
    group_captions: bool = False
    """Keep the captions of an image in one batch."""
    steps: Annotated[int, Field(ge=5)] = 60
    """Optimizer steps measured, after five that are not."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write the result to this file (path or URI)."""


class BenchmarkServeConfig(Config):
    """Measure the caption service on this machine: throughput and latency at rising concurrency, against its limit."""

    model: str
    """Model directory (path or URI)."""
    images: str
    """Pictures to send: a folder, or Parquet files."""
    source_options: SourceConfig = SourceConfig(limit=200)
    concurrency: tuple[Positive, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Clients that each send one picture after another."""
    seconds: Annotated[float, Field(gt=0.0)] = 15.0
    """How long each is measured."""
    decode: DecodeOverrides = DecodeOverrides()
    max_batch_size: Positive = 32
    """Most images in one forward pass, of the service and of the Captioner it is compared with."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write the result to this file (path or URI)."""


class BenchmarkScaleConfig(Config):
    """Scaling on paper: time, cost and limits of known data sets, from measured rates and a store's sizes."""

    features: str
    """A feature store to take sizes from (path or URI)."""
    images_per_second: Annotated[float, Field(gt=0.0)]
    """Measured: images/s of the pipeline, as `benchmark extract` prints it."""
    loaded_per_second: Annotated[float, Field(gt=0.0)]
    """Measured: images/s of decoding alone, as `benchmark extract` prints it."""
    cpus: Positive
    """CPUs of the machine that was measured."""
    node_cpus: Positive = 16
    """CPUs of a CPU node."""
    gpu_node_cpus: Positive = 8
    """CPUs beside the GPU of a GPU node."""
    driver_memory_gib: Positive = 32
    """Memory of the head, where drivers run, in GiB."""
    assumed_gpu_images_per_second: Annotated[float, Field(gt=0.0)] = 2000.0
    """ASSUMED, not measured: images/s of the encoder on one GPU."""
    assumed_node_price: Annotated[float, Field(ge=0.0)] = 0.75
    """ASSUMED: price of a CPU node per hour, in dollars."""
    assumed_gpu_node_price: Annotated[float, Field(ge=0.0)] = 1.0
    """ASSUMED: price of a GPU node per hour, in dollars."""
    assumed_storage_price: Annotated[float, Field(ge=0.0)] = 0.023
    """ASSUMED: price of a GB in object storage per month, in dollars."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write the result to this file (path or URI)."""


class BenchmarkResumeConfig(Config):
    """Continue and publish a made-up killed extraction of many rows, with nothing decoded or encoded."""

    rows: Positive = 10_000_000
    """Rows of the store."""
    left: Positive = 20_000
    """Rows that the killed run had not done."""
    rows_per_file: Positive | None = None
    """Rows in each file of the killed run; default: as extraction chooses for so many."""
    scratch: str | None = None
    """Local directory for the made-up store; default: the system's for temporary files."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write the result to this file (path or URI)."""
