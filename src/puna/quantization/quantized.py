"""Quantized: rows of a weight as checkpoints hold them quantised, in groups of codes or in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from puna.ops.scaled import ScaledWeight
from puna.quantization.groups import GroupQuantized


@dataclass(frozen=True)
class Fp8Quantized:
    """Rows in FP8 with their scales, and float32 [1] for its inputs, if the checkpoint has one for all of them."""

    weight: ScaledWeight
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [n, K]."""
        return self.weight.dequantize()


Quantized: TypeAlias = GroupQuantized | Fp8Quantized
