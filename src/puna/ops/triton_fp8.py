"""Linear layers in FP8 on GPUs: one kernel for all scales and numbers of rows, and torch's own for many rows.

The kernel computes the transposed result: weight rows are the M of the tensor cores' tile, which is 64 at least, and
tokens their N, which may be as few as 16. So a step of one token multiplies little in vain, and reads each weight once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops import triton_tuning
from puna.ops.scaled import SCALE_BLOCK, ScaledRows, ScaledWeight
from puna.ops.triton_device import capability, interprets, multiprocessors
from puna.ops.triton_rounding import rounded


@dataclass(frozen=True)
class Tile:
    """One block's share: `outputs` x `rows` of the result, `inputs` at a time.

    With `parts`, the inputs are cut into that many runs, which the block sums side by side: the tensor cores' tile has
    the weight rows of all runs under each other and the tokens of all runs beside each other, and only its diagonal is
    used. That wastes arithmetic, of which a few rows need none to speak of, and gives blocks of fewer than 64 outputs,
    so that all multiprocessors have one; no second kernel has to add anything up.
    """

    outputs: int
    rows: int
    inputs: int
    parts: int = 1
    warps: int = 4
    stages: int = 4


# By name, since that is what a file of measurements keeps.
TILES: Final = MappingProxyType(
    {
        "16x16": Tile(16, 16, 256, parts=4, stages=3),
        "32x16": Tile(32, 16, 256, parts=2),
        "64x16": Tile(64, 16, 256),
        "32x32": Tile(32, 32, 256, parts=2),
        "64x32": Tile(64, 32, 256),
        "32x64": Tile(32, 64, 256, parts=2),
        "64x64": Tile(64, 64, 256, stages=5),
        "128x64": Tile(128, 64, 128, stages=5),
        "64x128": Tile(64, 128, 128, stages=5),
        "128x128": Tile(128, 128, 128, warps=8),
        "128x256": Tile(128, 256, 128, warps=8, stages=3),
    }
)
# Two sets of sums, those of a block and those of all, do not fit the registers of the largest tile.
BLOCK_TILES: Final = tuple(name for name, tile in TILES.items() if tile.outputs * tile.rows <= 128 * 128)
_LIBRARY: Final = "scaled_mm"
# For all numbers of rows alike.
_DETERMINISTIC: Final = "128x64"
# Rows beyond which torch's kernel is the default. With fewer its tiles of 128 outputs are too few: 32 for 132
# multiprocessors where there are 4096 outputs.
_FEW_ROWS: Final = 128
# Of the tiles, how many are worth measuring.
_MEASURED: Final = 4
# Numbers that the dimensions of torch._scaled_mm must be multiples of: its loads have 16 bytes.
_ALIGNMENT: Final = 16

# A multiprocessor of Hopper, by clock: bytes that it can load from the L2 cache, and products of FP8 numbers (1,979
# TFLOP/s / 132 / 1.755 GHz / 2); its shared memory; and the clocks from an asynchronous load to its data where all
# multiprocessors load (about 1.1 us).
_BYTES_PER_CLOCK: Final = 64
_PRODUCTS_PER_CLOCK: Final = 4096
_SHARED_BYTES: Final = 227 * 1024
_LATENCY: Final = 1900


def scaled_linear(
    x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype, *, deterministic: bool = False
) -> Tensor:
    """reference.scaled_linear; which tile, or torch's own kernel, is a matter of measurement.

    deterministic: in one tile for any number of rows, so that a row's bits do not depend on the others.
    """
    if deterministic:
        return launch(x, weight, bias, dtype, TILES[_DETERMINISTIC])
    device = weight.values.device
    rows = triton_tuning.bucket(x.values.numel() // x.values.shape[-1])
    outputs, inputs = weight.values.shape
    variants = ranked_tiles(rows, outputs, inputs, weight.has_blocks, multiprocessors(device))
    default = variants[0]
    if rows > _ALIGNMENT and library_can(weight, bias, dtype) and _has_library(device):
        variants = (*variants, _LIBRARY)
        default = _LIBRARY if rows > _FEW_ROWS else default

    def run(variant: str) -> Tensor:
        if variant == _LIBRARY:
            return library_scaled_linear(x, weight, bias, dtype)
        return launch(x, weight, bias, dtype, TILES[variant])

    shape = (rows, outputs, inputs, _kind(x, weight), str(dtype))
    return run(triton_tuning.current().choose("scaled_linear/1", shape, default, variants, run))


@functools.lru_cache(maxsize=1024)
def ranked_tiles(rows: int, outputs: int, inputs: int, blocks: bool, processors: int) -> tuple[str, ...]:
    """The tiles that should be the fastest for a product of this shape, the best one first."""
    names = BLOCK_TILES if blocks else tuple(TILES)
    return tuple(sorted(names, key=lambda name: clocks(TILES[name], rows, outputs, inputs, blocks, processors)))[
        :_MEASURED
    ]


def clocks(tile: Tile, rows: int, outputs: int, inputs: int, blocks: bool, processors: int) -> float:
    """How long the busiest multiprocessor has to load its tiles, to multiply them, or to wait for them; the longest of
    these. The memory's own time is the same for every tile."""
    step, stages = _pipeline(tile, blocks)
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows)
    mine = triton.cdiv(tiles, processors)
    loads = mine * (tile.outputs + tile.rows) * inputs / _BYTES_PER_CLOCK
    products = mine * tile.outputs * tile.rows * tile.parts * inputs / _PRODUCTS_PER_CLOCK
    shared = stages * step * (tile.outputs + tile.rows) * tile.parts
    waves = triton.cdiv(tiles, processors * max(1, _SHARED_BYTES // shared))
    steps = triton.cdiv(inputs, step * tile.parts)
    longest: float = max(loads, products, waves * max(steps / (stages - 1), 1) * _LATENCY)
    return longest


def _pipeline(tile: Tile, blocks: bool) -> tuple[int, int]:
    """Inputs at a time, and how many times as many are loaded or being loaded; with blocks, one block at a time."""
    step = SCALE_BLOCK if blocks else tile.inputs
    return step, tile.stages * (tile.inputs // step)


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


def launch(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype, tile: Tile) -> Tensor:
    values = x.values.flatten(0, -2).contiguous()
    rows, inputs = values.shape
    outputs = weight.values.shape[0]
    y = torch.empty(rows, outputs, dtype=dtype, device=values.device)
    step, stages = _pipeline(tile, weight.has_blocks)
    span = triton.cdiv(triton.cdiv(inputs, tile.parts), step) * step
    scale_blocks = x.scales.shape[-1]
    if rows:
        _scaled_linear_kernel[(triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows),)](
            y,
            values,
            x.scales,
            weight.values,
            weight.scales,
            bias,
            rows,
            outputs,
            inputs,
            0 if x.scales.dim() == 1 else scale_blocks,
            0 if scale_blocks == 1 else 1,
            OUTPUTS=tile.outputs,
            ROWS=tile.rows,
            INPUTS=step,
            PARTS=tile.parts,
            SPAN=span,
            BLOCKS=weight.has_blocks,
            ONE_WEIGHT_SCALE=weight.scales.numel() == 1,
            HAS_BIAS=bias is not None,
            WHOLE_OUTPUTS=outputs % tile.outputs == 0,
            WHOLE_INPUTS=inputs == span * tile.parts,
            PROMOTE=tile.rows <= 64,  # where weights take longer to read than to multiply
            num_warps=tile.warps,
            num_stages=stages,
        )
    return y.view(*x.values.shape[:-1], outputs)


@triton.jit(do_not_specialize=["num_rows"])
def _scaled_linear_kernel(  # type: ignore[no-untyped-def]
    y,
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    num_rows,
    num_outputs,
    num_inputs,
    x_scale_row_stride,
    x_scale_block_stride,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,  # inputs of each of the parts
    BLOCKS: tl.constexpr,
    ONE_WEIGHT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_OUTPUTS: tl.constexpr,
    WHOLE_INPUTS: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    tile_n, tile_t = _tile_of_program(num_outputs, num_rows, OUTPUTS, ROWS)
    # The lines of the tensor cores' tile: output and part, and row and part.
    lines = tl.arange(0, OUTPUTS * PARTS)
    columns = tl.arange(0, ROWS * PARTS)
    n = tile_n * OUTPUTS + lines % OUTPUTS
    t = tile_t * ROWS + columns % ROWS
    first_of_line = lines // OUTPUTS * SPAN
    first_of_column = columns // ROWS * SPAN
    k = tl.arange(0, INPUTS)
    weights_at = weight + (n.to(tl.int64) * num_inputs + first_of_line)[:, None] + k[None, :]
    x_at = x + (t.to(tl.int64) * num_inputs + first_of_column)[None, :] + k[:, None]
    real_n, real_t = n < num_outputs, t < num_rows
    weight_scales_at = weight_scales + n // 128 * tl.cdiv(num_inputs, 128) + first_of_line // 128
    x_scales_at = x_scales + t.to(tl.int64) * x_scale_row_stride + first_of_column // 128 * x_scale_block_stride

    sums = tl.zeros((OUTPUTS * PARTS, ROWS * PARTS), dtype=tl.float32)
    for start in range(0, SPAN, INPUTS):
        if WHOLE_INPUTS and WHOLE_OUTPUTS:
            w_tile = tl.load(weights_at + start)
        elif WHOLE_INPUTS:
            w_tile = tl.load(weights_at + start, mask=real_n[:, None], other=0.0)
        else:
            inside = (first_of_line + start)[:, None] + k[None, :] < num_inputs
            w_tile = tl.load(weights_at + start, mask=inside & real_n[:, None], other=0.0)
        if WHOLE_INPUTS:
            x_tile = tl.load(x_at + start, mask=real_t[None, :], other=0.0)
        else:
            inside = (first_of_column + start)[None, :] + k[:, None] < num_inputs
            x_tile = tl.load(x_at + start, mask=inside & real_t[None, :], other=0.0)
        if BLOCKS:
            block = start // 128
            scaled_columns = real_t & (first_of_column + start < num_inputs)
            x_scale = tl.load(x_scales_at + block * x_scale_block_stride, mask=scaled_columns, other=0.0)
            if PARTS == 1 and 128 % OUTPUTS == 0:  # all outputs of the tile have one scale
                x_scale *= tl.load(weight_scales + tile_n * OUTPUTS // 128 * tl.cdiv(num_inputs, 128) + block)
                sums += tl.dot(w_tile, x_tile) * x_scale[None, :]
            else:
                scaled_lines = real_n & (first_of_line + start < num_inputs)
                w_scale = tl.load(weight_scales_at + block, mask=scaled_lines, other=0.0)
                sums += tl.dot(w_tile, x_tile) * w_scale[:, None] * x_scale[None, :]
        elif PROMOTE:
            sums = tl.dot(w_tile, x_tile, sums, max_num_imprecise_acc=INPUTS)
        else:
            sums = tl.dot(w_tile, x_tile, sums)

    if PARTS > 1:
        part = tl.arange(0, PARTS)
        own = part[:, None, None, None] == part[None, None, :, None]
        cut = tl.where(own, tl.reshape(sums, (PARTS, OUTPUTS, PARTS, ROWS)), 0.0)
        sums = tl.sum(tl.sum(cut, axis=2), axis=0)
    n = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tile_t * ROWS + tl.arange(0, ROWS)
    real_n, real_t = n < num_outputs, t < num_rows
    if not BLOCKS:
        w_scale = tl.load(weight_scales + n * (0 if ONE_WEIGHT_SCALE else 1), mask=real_n, other=0.0)
        x_scale = tl.load(x_scales + t * x_scale_row_stride, mask=real_t, other=0.0)
        sums = sums * w_scale[:, None] * x_scale[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=real_n, other=0.0).to(tl.float32)[:, None]
    y_at = y + t.to(tl.int64)[None, :] * num_outputs + n[:, None]
    tl.store(y_at, rounded(sums, y.dtype.element_ty), mask=real_n[:, None] & real_t[None, :])


@triton.jit
def _tile_of_program(num_outputs, num_rows, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Programs that run at the same time share weights and rows in the L2 cache: they go through eight tiles of rows
    for each tile of outputs, before they come to the next ones."""
    tiles_n, tiles_t = tl.cdiv(num_outputs, OUTPUTS), tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    first = program // (8 * tiles_n) * 8
    together = tl.minimum(tiles_t - first, 8)
    inside = program % (8 * tiles_n)
    return inside // together, first + inside % together
