"""Pictures of a run: learning curves, captioned photographs, attention maps. Each is returned as the bytes of a PNG."""

from captioner.plots.attention import attention_maps
from captioner.plots.curves import plot_history
from captioner.plots.grids import Captioned, caption_grids
from captioner.plots.trials import plot_trials

__all__ = ["Captioned", "attention_maps", "caption_grids", "plot_history", "plot_trials"]
