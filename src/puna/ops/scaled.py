"""FP8 numbers with scales: how a linear layer wants its inputs rounded, rounded inputs, and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

FP8: Final = torch.float8_e4m3fn
# The largest number of e4m3 (Micikevicius et al., 2022, "FP8 formats for deep learning"); it has no infinity.
FP8_MAX: Final = 448.0
# Inputs that share a scale where a weight has scales for blocks, and the sides of such a block (DeepSeek-V3, 2024).
SCALE_BLOCK: Final = 128


@dataclass(frozen=True)
class InputScaling:
    """How the inputs of a linear layer are rounded to e4m3.

    `static` float32 [1]: one scale, known beforehand, for all rows. Without it each row has its own, the highest
    absolute value / 448; with `blocks`, each run of 128 inputs of a row (the last one may be shorter).
    """

    static: Tensor | None = None
    blocks: bool = False


@dataclass(frozen=True)
class ScaledRows:
    """Rows [..., E] as values e4m3 [..., E] times scales float32: [1], [..., 1], or [..., E / 128 rounded up].

    `dtype` is what the rows had before.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """The rows in float32, each value times its scale."""
        wide = self.values.float()
        if self.scales.shape[-1] > 1:
            return wide * self.scales.repeat_interleave(SCALE_BLOCK, dim=-1)[..., : wide.shape[-1]]
        return wide * self.scales


@dataclass(frozen=True)
class ScaledWeight:
    """A weight [N, K] as values e4m3 [N, K], contiguous, times scales float32: [1], [N, 1], or one for each block of
    128 outputs and 128 inputs, [N / 128, K / 128] rounded up."""

    values: Tensor
    scales: Tensor

    @property
    def has_blocks(self) -> bool:
        # Of at most 128 inputs there is one column of blocks: not [N, 1], unless N is 1, where both mean the same.
        return self.scales.dim() == 2 and self.scales.shape != (self.values.shape[0], 1)

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        wide = self.values.float()
        if not self.has_blocks:
            return wide * self.scales
        scales = self.scales.repeat_interleave(SCALE_BLOCK, dim=0)[: wide.shape[0]]
        return wide * scales.repeat_interleave(SCALE_BLOCK, dim=1)[:, : wide.shape[1]]


def plain(x: Tensor | ScaledRows) -> Tensor:
    """Rows that came rounded as a tensor of the dtype that they had, others as they are."""
    return x.dequantize().to(x.dtype) if isinstance(x, ScaledRows) else x
