"""An LSTM for every processor."""

import torch
from torch import Tensor, nn


class LSTM(nn.LSTM):
    """``nn.LSTM`` that stays in float32 under bfloat16 autocasting on CPUs without AVX512.

    oneDNN has no bfloat16 LSTM for them, and raises where its other layers make do.
    """

    def forward(  # type: ignore[override]  # packed sequences are not used
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        on_cpu = input.device.type == "cpu"
        if not on_cpu or not torch.is_autocast_enabled("cpu") or torch.cpu._is_avx512_supported():
            found: tuple[Tensor, tuple[Tensor, Tensor]] = super().forward(input, hx)
            return found
        with torch.autocast("cpu", enabled=False):
            memory = None if hx is None else (hx[0].float(), hx[1].float())
            found = super().forward(input.float(), memory)
            return found
