"""Linear layers in FP8 on GPUs: our kernel (triton_matrix) for few rows and blocks, torch's own for many rows."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from puna.ops import triton_tuning
from puna.ops.scaled import InputScaling, ScaledRows, ScaledWeight
from puna.ops.triton_device import capability, interprets, multiprocessors
from puna.ops.triton_matrix import BLOCK_TILES, ROUNDING_TILES, TILES, USUAL_TILES, launch, ranked_tiles
from puna.ops.triton_pointwise import gated_activation, gated_activation_scaled, quantize_rows

_LIBRARY: Final = "scaled_mm"
_APART: Final = "apart"
# For all numbers of rows alike.
_DETERMINISTIC: Final = "128x64"
# Rows beyond which torch's kernel is the default. With fewer its tiles of 128 outputs are too few: 32 for 132
# multiprocessors where there are 4096 outputs.
_FEW_ROWS: Final = 128
# Rows up to which gate, up and activation are one launch: with more the matrix product takes longer than the memory,
# and a pass over its result is a small part of that.
_GATED_ROWS: Final = 64
# Numbers that the dimensions of torch._scaled_mm must be multiples of: its loads have 16 bytes.
_ALIGNMENT: Final = 16


def scaled_linear(
    x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype, *, deterministic: bool = False
) -> Tensor:
    """reference.scaled_linear; which tile, or torch's own kernel, is a matter of measurement.

    deterministic: in one tile for any number of rows, so that a row's bits do not depend on the others.
    """
    if deterministic:
        return launch(x, weight, bias, dtype, TILES[_DETERMINISTIC]).values
    device = weight.values.device
    rows = triton_tuning.bucket(x.values.numel() // x.values.shape[-1])
    outputs, inputs = weight.values.shape
    variants = ranked_tiles(_tiles(weight), rows, outputs, inputs, weight.has_blocks, multiprocessors(device))
    default = variants[0]
    if rows > _ALIGNMENT and library_can(weight, bias, dtype) and _has_library(device):
        variants = (*variants, _LIBRARY)
        default = _LIBRARY if rows > _FEW_ROWS else default

    def run(variant: str) -> Tensor:
        if variant == _LIBRARY:
            return library_scaled_linear(x, weight, bias, dtype)
        return launch(x, weight, bias, dtype, TILES[variant]).values

    shape = (rows, outputs, inputs, _kind(x, weight), str(dtype))
    return run(triton_tuning.current().choose("scaled_linear/1", shape, default, variants, run))


def scaled_gated_linear(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    activation: str,
    scaling: InputScaling | None,
    *,
    deterministic: bool = False,
) -> Tensor | ScaledRows:
    """reference.scaled_gated_linear: few rows in one launch, with the rounding too, unless that needs whole rows.

    deterministic: as in scaled_linear.
    """

    def run(variant: str) -> Tensor | ScaledRows:
        if variant == _APART:
            whole = scaled_linear(x, weight, bias, x.dtype, deterministic=deterministic)
            if scaling is None:
                return gated_activation(whole, activation)
            return gated_activation_scaled(whole, activation, scaling)
        if scaling is None or rounding == "rows":
            y = launch(x, weight, bias, x.dtype, TILES[variant], activation).values
            return y if scaling is None else quantize_rows(y, scaling)
        return launch(x, weight, bias, x.dtype, TILES[variant], activation, scaling).scaled()

    rounding = _rounding(scaling)
    rows = triton_tuning.bucket(x.values.numel() // x.values.shape[-1])
    if deterministic or rows > _GATED_ROWS:
        return run(_APART)
    outputs, inputs = weight.values.shape
    names = ROUNDING_TILES if rounding == "blocks" else _tiles(weight)
    device = weight.values.device
    tiles = ranked_tiles(names, rows, outputs, inputs, weight.has_blocks, multiprocessors(device))
    shape = (rows, outputs, inputs, _kind(x, weight), str(x.dtype), rounding)
    return run(triton_tuning.current().choose("scaled_gated_linear/1", shape, tiles[0], (*tiles, _APART), run))


def _rounding(scaling: InputScaling | None) -> str:
    if scaling is None:
        return "none"
    return "static" if scaling.static is not None else "blocks" if scaling.blocks else "rows"


def _tiles(weight: ScaledWeight) -> tuple[str, ...]:
    return BLOCK_TILES if weight.has_blocks else USUAL_TILES


def _kind(x: ScaledRows, weight: ScaledWeight) -> str:
    return "blocks" if weight.has_blocks else "static" if x.scales.dim() == 1 else "rows"


def _has_library(device: torch.device) -> bool:
    return not interprets(device) and capability(device) >= (9, 0)


def library_can(weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """torch._scaled_mm with a scale for each row and output gives bfloat16 only. Its recipes for blocks want the scales
    in layouts of cuBLAS's own, column by column: they would have to be laid out anew in every step."""
    outputs, inputs = weight.values.shape
    return (
        dtype == torch.bfloat16
        and (bias is None or bias.dtype == torch.bfloat16)
        and not weight.has_blocks
        and outputs % _ALIGNMENT == 0
        and inputs % _ALIGNMENT == 0
    )


def library_scaled_linear(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """torch's kernel for a scale for each row and each output."""
    values = x.values.flatten(0, -2)
    rows, outputs = values.shape[0], weight.values.shape[0]
    # Scales must lie there for every row and output, also where there is one for all.
    row_scales = x.scales.reshape(-1, 1).expand(rows, 1).contiguous()
    output_scales = weight.scales.reshape(1, -1).expand(1, outputs).contiguous()
    # Fast accumulation leaves sums in the tensor cores, whose accumulators of FP8 products have fewer bits than
    # float32; the other way takes every 128 products or so out of them. That adds 0.1 to 0.3 % to a result (simulated,
    # see docs/gpu.md), as much as rounding it to bfloat16 does, where rounding to FP8 has made 3.5 to 4 % already.
    y = torch._scaled_mm(
        values, weight.values.t(), row_scales, output_scales, bias=bias, out_dtype=dtype, use_fast_accum=True
    )
    return y.view(*x.values.shape[:-1], outputs)
