"""TensorBoard's event files, as part of a published directory."""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.output import Output


@contextmanager
def event_file(
    output: Output, name: str, files: list[FileEntry], *, run: str = ""
) -> Iterator[SummaryWriter]:
    """Write ``tensorboard/events.out.tfevents.NAME`` of ``output`` when the block ends without an error, and add it to
    ``files``.

    Args:
        run: the folder in ``tensorboard`` that it lies in, where there are several runs.

    torch names files by clock and host, so publishing again after a kill would add a second one with the same points.
    """
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            yield writer
        (file,) = Path(folder).iterdir()
        files.append(
            output.write(
                "/".join(filter(None, ("tensorboard", run, f"events.out.tfevents.{name}"))),
                file.read_bytes(),
            )
        )


def add_picture(writer: SummaryWriter, tag: str, png: bytes) -> None:
    """Add a PNG file to TensorBoard's images."""
    with Image.open(io.BytesIO(png)) as picture:
        writer.add_image(tag, np.asarray(picture.convert("RGB")), dataformats="HWC")
