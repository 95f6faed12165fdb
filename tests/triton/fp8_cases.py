"""Calls of the FP8 linear layers' launchers with tensors of an 8B model's sizes, for sm90.py to compile."""

from __future__ import annotations

import torch

from puna.ops.scaled import FP8, ScaledRows, ScaledWeight
from puna.ops.triton_matrix import BLOCK_TILES, TILES, USUAL_TILES, launch


def _call(tile: str, rows: int, outputs: int, inputs: int, blocks: bool = False) -> None:
    columns = inputs // 128 if blocks else 1
    x = ScaledRows(torch.empty(rows, inputs, dtype=FP8), torch.empty(rows, columns), torch.bfloat16)
    shape = (outputs // 128, columns) if blocks else (outputs, 1)
    weight = ScaledWeight(torch.empty(outputs, inputs, dtype=FP8), torch.empty(shape))
    launch(x, weight, None, torch.bfloat16, TILES[tile])


def row_tiles() -> None:
    for name in USUAL_TILES:
        _call(name, TILES[name].rows, 4096, 4096)


def block_tiles() -> None:
    for name in BLOCK_TILES:
        _call(name, TILES[name].rows, 4096, 4096, blocks=True)
