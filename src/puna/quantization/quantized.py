"""Quantized: rows of a weight as checkpoints hold them quantised, in groups of codes or in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.ops.scaled import SCALE_BLOCK, ScaledWeight
from puna.quantization.groups import GroupQuantized


@dataclass(frozen=True)
class Fp8Quantized:
    """Rows in FP8 with their scales, and float32 [1] for its inputs, if the checkpoint has one for all of them."""

    weight: ScaledWeight
    input_scale: Tensor | None = None

    def padded(self, count: int) -> Fp8Quantized:
        """The same with `count` rows of zeros behind it."""
        values, scales = self.weight.values, self.weight.scales
        rows = values.shape[0]
        if self.weight.has_blocks:
            blocks, all_blocks = (-(-size // SCALE_BLOCK) for size in (rows, rows + count))
            scales = F.pad(scales[:blocks], (0, 0, 0, all_blocks - blocks), value=1.0)
        elif scales.dim() == 2:
            scales = F.pad(scales, (0, 0, 0, count), value=1.0)
        # As bytes: torch pads no FP8.
        values = F.pad(values.view(torch.uint8), (0, 0, 0, count)).view(values.dtype)
        return Fp8Quantized(ScaledWeight(values, scales), self.input_scale)

    def dequantize(self) -> Tensor:
        """float32 [n, K]."""
        return self.weight.dequantize()


Quantized: TypeAlias = GroupQuantized | Fp8Quantized
