"""Settings of the benchmarks."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from captioner.config.decoding import DecodeOverrides
from captioner.config.parts import (
    DECODER_KINDS,
    Compute,
    DecoderConfig,
    DecoderKind,
    EncoderConfig,
    JobConfig,
    Positive,
    Runtime,
    SourceConfig,
    TextConfig,
)

GpuPart = Literal["extraction", "training", "captioning", "service"]


class BenchmarkConfig(JobConfig):
    """What all benchmarks share."""

    json_file: Annotated[str | None, Field(alias="json")] = None
    """Also write the figures to this JSON file (path or URI)."""
    csv_file: Annotated[str | None, Field(alias="csv")] = None
    """Also append the figures to this CSV file (path or URI), a row a measurement, with date, commit, machine, versions
    and command."""


class BenchmarkExtractConfig(BenchmarkConfig):
    """Feature extraction: loading alone, the encoder alone, then the whole pipeline, in images per second."""

    source: str = "shapes"
    """Images, as for extract_features; repeated until there are enough."""
    source_options: SourceConfig = SourceConfig()
    encoder: EncoderConfig = EncoderConfig(weights="random")
    grid: bool = False
    """Also compute and store the grid."""
    mirrored: bool = False
    """Also the mirror image."""
    crops: Annotated[int, Field(ge=0)] = 0
    """Also so many random crops."""
    images: Annotated[int, Field(ge=100)] = 1200
    """Images through the pipeline."""
    seconds: Annotated[float, Field(gt=0.0)] = 5.0
    """Duration of each measurement of loading and of the encoder alone, in seconds."""
    batch_size: Positive | None = None
    """Images per forward pass of one encoder actor; default: as extract_features chooses."""
    runtime: Runtime = "eager"
    """As for extract_features."""
    num_encoders: Positive | None = None
    """Encoder actors; default: as extract_features chooses."""
    cpus_per_encoder: Positive | None = None
    """Threads of one encoder actor on CPU; default: as extract_features chooses."""
    scratch: str | None = None
    """Empty directory for the pipeline's output (path or URI); on several machines one that all reach. Default: a
    temporary one on this machine."""


class BenchmarkRuntimeConfig(BenchmarkConfig):
    """An encoder's network alone on this machine's CPU, eager and compiled, in images per second; it wants g++."""

    encoder: EncoderConfig = EncoderConfig(weights="random")
    computes: tuple[Compute, ...] = ("float32", "bfloat16")
    """Arithmetics."""
    threads: tuple[Positive, ...] = (1, 2)
    """Threads of the tensor library."""
    batches: tuple[Positive, ...] = (1, 8, 32)
    """Images per forward pass."""


class BenchmarkDriverConfig(BenchmarkConfig):
    """Memory of the driver in extraction, by step, in bytes an image; the images are a folder of empty files."""

    images: Annotated[int, Field(ge=1000)] = 1_000_000
    """Files in the folder."""
    path_length: Annotated[int, Field(ge=20, le=200)] = 55
    """Characters of each path below it."""
    captions: Annotated[int, Field(ge=0)] = 0
    """Captions of each image, in a file beside them; 0: no such file."""
    scratch: str | None = None
    """Directory for the files; default: the system's temporary one."""


class BenchmarkGpuConfig(BenchmarkConfig):
    """All that a GPU does: extraction and its limits, training, captioning, the service; a table and a page."""

    pictures: str | None = None
    """Pictures to extract and caption, as for extract_features; default: generated JPEGs of ImageNet's size."""
    parts: tuple[GpuPart, ...] = get_args(GpuPart)
    """What to measure; with extraction its limits."""
    page: str = "runs/gpu_report/report.md"
    """Markdown page of the figures (path or URI), written anew."""
    seconds: Annotated[float, Field(gt=0.0)] = 8.0
    """Duration of a measurement, in seconds."""
    smoke: bool = False
    """Only see that everything runs, on CPUs too: a small network, few pictures, figures that mean nothing."""


class BenchmarkKeptConfig(BenchmarkConfig):
    """What a kill costs, by number of CPUs and speed of the encoder: a stand-in extraction is killed and continued."""

    cpus: tuple[Positive, ...] = (1, 2, 3, 4, 16)
    """Logical CPUs of the Ray that each run starts; they need not be cores."""
    seconds_per_image: tuple[Annotated[float, Field(gt=0.0)], ...] = (0.01, 0.5, 5.0)
    """Of one encoder."""
    images: Annotated[int, Field(ge=100)] = 20_000
    """Images of the source."""
    kill_after: tuple[Annotated[float, Field(gt=0.0)], ...] = (45.0, 45.0)
    """Seconds between the first image that a run encodes and its kill; of the first run, then of continued ones."""
    side_by_side: Positive = 1
    """Runs at the same time: encoders that sleep need no cores."""


class BenchmarkSimulateConfig(BenchmarkConfig):
    """Extraction over many GPUs, simulated: nodes and GPUs are logical, loading and the network sleep."""

    gpus: tuple[Positive, ...] = (1, 2, 4, 8)
    """Numbers of GPUs, each in a node of its own."""
    loaders: Positive = 8
    """Logical CPUs of a node, which load."""
    images_per_second: Annotated[float, Field(gt=0.0)] = 100.0
    """Of one GPU's network."""
    seconds_to_load: Annotated[float, Field(gt=0.0)] = 0.04
    """Of one picture, on one CPU."""
    batch_size: Positive | None = None
    """Images per call of a network; default: as extract_features chooses."""
    seconds: Annotated[float, Field(gt=0.0)] = 60.0
    """Work of each run, in seconds of GPUs that never wait."""


class BenchmarkTrainConfig(BenchmarkConfig):
    """Training: captions per second by decoder, ingest and number of workers, and the time spent waiting for data."""

    features: str
    """Feature store (path or URI); decoders with attention over the image need its grid."""
    decoders: tuple[DecoderKind, ...] = DECODER_KINDS
    """Decoders to measure."""
    ingest: tuple[Literal["resident", "streaming"], ...] = ("resident", "streaming")
    """How features reach a worker: held in memory, or read from the store again in every epoch."""
    workers: tuple[Positive, ...] = (1, 2)
    """Numbers of data-parallel workers."""
    decoder: DecoderConfig = DecoderConfig()
    """Settings of every decoder but its kind."""
    text: TextConfig = TextConfig()
    global_batch: Positive = 64
    """Captions per optimizer step, over all workers together."""
    group_captions: bool = False
    """Keep the captions of an image in one batch."""
    steps: Annotated[int, Field(ge=5)] = 60
    """Optimizer steps measured, after five to warm up."""


class BenchmarkFinetuneConfig(BenchmarkConfig):
    """Finetuning by one worker: captions per second on pictures as they are loaded and on the same ones in memory, the
    time spent waiting for them, and memory."""

    model: str
    """Model directory (path or URI)."""
    source: str = "shapes"
    """Pictures, as for finetune."""
    source_options: SourceConfig = SourceConfig()
    stages: Positive = 1
    """Of the encoder, that learn."""
    global_batch: Positive = 160
    """Captions per optimizer step."""
    steps: Annotated[int, Field(ge=5)] = 20
    """Optimizer steps measured, after five to warm up."""


class BenchmarkScoresConfig(BenchmarkConfig):
    """A published report and the training behind it: scores, losses, captions per second."""

    report: str
    """Report directory, as evaluate publishes it (path or URI)."""
    name: str = ""
    """Name of the row, such as the preset's."""


class BenchmarkServeConfig(BenchmarkConfig):
    """The caption service on this machine: throughput and latency by number of concurrent clients."""

    model: str
    """Model directory (path or URI)."""
    images: str
    """Images to send: a folder or Parquet files (path or URI)."""
    source_options: SourceConfig = SourceConfig(limit=200)
    concurrency: tuple[Positive, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of concurrent clients; each sends its next image when the last one is answered."""
    seconds: Annotated[float, Field(gt=0.0)] = 15.0
    """Duration of each measurement, in seconds."""
    decode: DecodeOverrides = DecodeOverrides()
    max_batch_size: Positive = 32
    """Most images per forward pass, of the service and of the Captioner it is compared with."""
