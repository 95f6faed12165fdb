"""Calls of the FP8 linear layers' launchers with tensors of an 8B model's sizes, for sm90.py to compile."""

from __future__ import annotations

import torch

from puna.ops import triton_fp8
from puna.ops.scaled import FP8, ScaledRows, ScaledWeight


def _call(tile: str, rows: int, outputs: int, inputs: int, blocks: bool = False) -> None:
    columns = inputs // 128 if blocks else 1
    x = ScaledRows(torch.empty(rows, inputs, dtype=FP8), torch.empty(rows, columns), torch.bfloat16)
    shape = (outputs // 128, columns) if blocks else (outputs, 1)
    weight = ScaledWeight(torch.empty(outputs, inputs, dtype=FP8), torch.empty(shape))
    triton_fp8.launch(x, weight, None, torch.bfloat16, triton_fp8.TILES[tile])


def row_tiles() -> None:
    for name, tile in triton_fp8.TILES.items():
        _call(name, tile.rows, 4096, 4096)


def block_tiles() -> None:
    for name in triton_fp8.BLOCK_TILES:
        _call(name, triton_fp8.TILES[name].rows, 4096, 4096, blocks=True)
