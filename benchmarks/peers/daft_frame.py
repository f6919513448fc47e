"""Embeddings of a folder by a Daft data frame into Parquet files, on its own (native) runner.

daft 0.7.26 (``pip install daft``; no dependency of the project), torch 2.15.0; 2026-11-28.

python -m benchmarks.peers.daft_frame FOLDER OUTPUT
"""

import sys
import time

import daft
import numpy as np
import torch
from daft import DataType, Series, col
from daft.functions import decode_image, download, resize

from benchmarks.peers.network import SIDE, build, normalise
from captioner.runtime.device import num_cores

_BATCH = 32


@daft.cls(max_concurrency=1)
class Encode:
    """A network that all batches go through."""

    def __init__(self) -> None:
        torch.set_num_threads(num_cores())
        self.network = build()

    @daft.method.batch(return_dtype=DataType.embedding(DataType.float32(), 2048), batch_size=_BATCH)
    def pooled(self, pictures: Series) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(pictures.to_pylist()))
        with torch.inference_mode():
            found: np.ndarray = self.network(normalise(pixels)).numpy()
        print(f"{len(found)} {time.time():.3f}", flush=True)
        return found


def main() -> None:
    folder, output = sys.argv[1:]
    daft.set_runner_native()
    frame = daft.from_glob_path(f"{folder}/**/*.jpg")
    picture = resize(decode_image(download(col("path")), mode="RGB"), SIDE, SIDE)
    frame = frame.select("path", picture.alias("picture"))
    frame = frame.select("path", Encode().pooled(col("picture")).alias("pooled"))
    frame.write_parquet(output)


if __name__ == "__main__":
    main()
