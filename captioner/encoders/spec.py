"""What decides a feature, in one object: ``EncoderSpec``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from captioner.config import Compute, Config
from captioner.images.load import Filter, Fit

Column = Literal["pooled", "grid"]


@dataclass(frozen=True)
class FeatureShape:
    """Sizes of one picture's features: ``pooled`` [pooled_channels], ``grid`` [rows * columns, grid_channels]."""

    pooled_channels: int
    grid_channels: int
    rows: int
    columns: int

    @property
    def cells(self) -> int:
        """Cells of the grid, in row-major order."""
        return self.rows * self.columns

    def of(self, column: str) -> tuple[int, ...]:
        """Shape of a feature column."""
        if column == "pooled":
            return (self.pooled_channels,)
        return (self.cells, self.grid_channels)


class EncoderSpec(Config):
    """Everything that decides the value of a feature: features may be mixed if and only if their specs are equal.

    How the network is run (eager or compiled, on which device) does not belong to it.
    """

    family: str
    """Module of ``captioner.encoders`` that builds it."""
    name: str
    """Name of the network within its family."""
    layer: str
    """Last stage that is run."""
    input_size: tuple[int, int]
    """Rows and columns of pixels it sees."""
    resize: Literal["squash", "crop"]
    """squash: proportions not kept. crop: kept, the longer side cut."""
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of what is left that the input shows, around its centre."""
    filter: Filter
    """Pillow's filter for the resize; all of them widen with the reduction (antialiasing)."""
    mean: tuple[float, float, float]
    """Subtracted from R, G, B in 0..255."""
    deviation: tuple[float, float, float]
    """What the difference is divided by."""
    pooled_channels: int
    grid_channels: int
    grid: tuple[int, int]
    """Rows and columns of the grid's cells."""
    precision: Compute
    """Arithmetic of the network."""
    weights_sha256: str
    """SHA-256 over names and values of the float32 tensors."""

    @property
    def title(self) -> str:
        """For people: network and stage."""
        return f"{self.name} ({self.layer})"

    @property
    def fit(self) -> Fit:
        """How a picture becomes its input."""
        return Fit(self.input_size, self.resize, self.crop_fraction, self.filter)

    @property
    def shape(self) -> FeatureShape:
        """Sizes of the features."""
        return FeatureShape(self.pooled_channels, self.grid_channels, *self.grid)
