"""Embeddings of a folder by PyTorch's DataLoader into one Parquet file, as one would write it in an afternoon.

torch 2.15.0, torchvision 0.29.2, pyarrow 26.0.1; 2026-11-28.

python -m benchmarks.peers.dataloader FOLDER OUTPUT
"""

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.network import SIDE, build, normalise
from captioner.runtime.device import num_cores

_BATCH = 32
_SCHEMA = pa.schema([pa.field("path", pa.string()), pa.field("pooled", pa.list_(pa.float32()))])


class Pictures(Dataset[tuple[str, torch.Tensor]]):
    """Files of a folder as pixels."""

    def __init__(self, folder: str):
        self.paths = sorted(str(path) for path in Path(folder).rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        with Image.open(self.paths[index]) as image:
            pixels = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return self.paths[index], torch.from_numpy(np.array(pixels))


def main() -> None:
    folder, output = sys.argv[1:]
    network = build()
    torch.set_num_threads(num_cores())
    loader = DataLoader(Pictures(folder), _BATCH, num_workers=num_cores())
    with pq.ParquetWriter(f"{output}.parquet", _SCHEMA) as writer, torch.inference_mode():
        for paths, pixels in loader:
            pooled = network(normalise(pixels))
            writer.write_table(pa.table([list(paths), list(pooled.numpy())], schema=_SCHEMA))
            print(f"{len(paths)} {time.time():.3f}", flush=True)


if __name__ == "__main__":
    main()
