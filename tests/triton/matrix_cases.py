"""Calls of the kernel of weights in rows with tensors of an 8B model's sizes, for sm90.py to compile."""

from __future__ import annotations

import torch

from puna.ops.scaled import FP8, InputScaling, ScaledRows, ScaledWeight
from puna.ops.triton_matrix import BLOCK_TILES, ROUNDING_TILES, TILES, USUAL_TILES, launch

# What few rows of plain matrices take, and the first choices for one row of an 8B model's layers.
FEW = tuple(name for name in USUAL_TILES if TILES[name].rows <= 64)
FIRST = ("16x16", "32x16", "128x16")
STATIC = InputScaling(torch.empty(1))


def plain(
    outputs: int, inputs: int, rows: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)


def in_fp8(outputs: int, inputs: int, rows: int, blocks: bool = False) -> tuple[ScaledRows, ScaledWeight]:
    columns = inputs // 128 if blocks else 1
    x = ScaledRows(torch.empty(rows, inputs, dtype=FP8), torch.empty(rows, columns), torch.bfloat16)
    shape = (outputs // 128, columns) if blocks else (outputs, 1)
    return x, ScaledWeight(torch.empty(outputs, inputs, dtype=FP8), torch.empty(shape))


def plain_tiles() -> None:
    """The output projection, and lm_head, whose result is in float32."""
    for name in FIRST:
        launch(*plain(4096, 4096, 1), None, torch.bfloat16, TILES[name])
    launch(*plain(128256, 4096, 1), None, torch.float32, TILES["128x16"])


def gated_tiles() -> None:
    for name in FEW:
        launch(*plain(28672, 4096, TILES[name].rows), None, torch.bfloat16, TILES[name], "silu")


def gated_fp8_tiles() -> None:
    """For a result in bfloat16, or rounded as the next layer wants it, with scales by row and by block."""
    for name in FEW:
        if name in FIRST:
            launch(*in_fp8(28672, 4096, 1), None, torch.bfloat16, TILES[name], "silu")
        if name in BLOCK_TILES:
            launch(*in_fp8(28672, 4096, TILES[name].rows, True), None, torch.bfloat16, TILES[name], "silu")
    launch(*in_fp8(28672, 4096, 16), None, torch.bfloat16, TILES["128x16"], "silu", STATIC)
    for name in ROUNDING_TILES:
        x, weight = in_fp8(28672, 4096, TILES[name].rows, True)
        launch(x, weight, None, torch.bfloat16, TILES[name], "silu", InputScaling(blocks=True))
