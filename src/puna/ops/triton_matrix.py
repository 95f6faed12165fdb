"""The kernel of linear layers whose weights are in rows, plain or in FP8, for any number of rows, gated or not.

It computes the transposed result: weight rows are the M of the tensor cores' tile, which is 64 at least, and tokens
their N, which may be as few as 16. So a step of one token multiplies little in vain, and reads each weight once.
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

from puna.ops.scaled import SCALE_BLOCK, InputScaling, ScaledRows, ScaledWeight
from puna.ops.triton_overlap import await_turn, bytes_ahead, launch_options, prefetch, programs_ahead
from puna.ops.triton_panels import computable
from puna.ops.triton_pointwise import gated
from puna.ops.triton_rounding import rounded
from puna.ops.triton_rows import BY_ROW, DTYPES, Target, target_for, write_rows
from puna.ops.triton_sizes import cdiv


@dataclass(frozen=True)
class Tile:
    """One program's share: `outputs` rows of the weight times `rows` of x, `bytes` of each at a time.

    With `parts`, the inputs are cut into that many runs, which the program sums side by side: the tensor cores' tile
    has the weight rows of all runs under each other and the tokens of all runs beside each other, and only its diagonal
    is used. That wastes arithmetic, of which a few rows need none to speak of, and gives programs of fewer than 64
    outputs, so that all multiprocessors have one; no second kernel has to add anything up.

    In a gated layer half of the outputs are gates and the others their ups.
    """

    outputs: int
    rows: int
    bytes: int
    parts: int = 1
    warps: int = 4
    stages: int = 4


# By name, since that is what a file of measurements keeps.
TILES: Final = MappingProxyType(
    {
        "16x16": Tile(16, 16, 256, parts=4, stages=3),
        "32x16": Tile(32, 16, 256, parts=2),
        "64x16": Tile(64, 16, 256),
        "128x16": Tile(128, 16, 128),
        "32x32": Tile(32, 32, 256, parts=2),
        "64x32": Tile(64, 32, 256),
        "128x32": Tile(128, 32, 128),
        "32x64": Tile(32, 64, 256, parts=2),
        "64x64": Tile(64, 64, 256, stages=5),
        "128x64": Tile(128, 64, 128, stages=5),
        "64x128": Tile(64, 128, 128, stages=5),
        "128x128": Tile(128, 128, 128, warps=8),
        "128x256": Tile(128, 256, 128, warps=8, stages=3),
        "256x16": Tile(256, 16, 128, warps=8),
        "256x32": Tile(256, 32, 128, warps=8),
        "256x64": Tile(256, 64, 128, warps=8),
    }
)
# For a gated layer whose result is rounded in blocks, which needs 128 gates in a tile.
ROUNDING_TILES: Final = tuple(name for name, tile in TILES.items() if tile.outputs == 2 * SCALE_BLOCK)
# For any other layer.
USUAL_TILES: Final = tuple(name for name in TILES if name not in ROUNDING_TILES)
# For weights with scales by block: two sets of sums, a block's and all, do not fit the registers of the largest tile.
BLOCK_TILES: Final = tuple(name for name in USUAL_TILES if TILES[name].outputs * TILES[name].rows <= 128 * 128)
# Of the tiles, how many are worth measuring.
_MEASURED: Final = 4
# Rows that tiles of the same outputs have together before the next outputs come: as many as the L2 cache (50 MB) holds
# beside the weights that stream by.
_TOGETHER_BYTES: Final = 1 << 23

# A multiprocessor of Hopper, by clock: bytes that it can load from the L2 cache, and bytes of a row that it multiplies
# by another (989 TFLOP/s of bfloat16, or 1,979 of FP8, / 132 / 1.755 GHz / 2: 2,048 or 4,096 products); its shared
# memory; the clocks from an asynchronous load to its data where all multiprocessors load (about 1.1 us); and its share
# of what an H200's memory was seen to deliver (4.3 TB/s / 132 / 1.755 GHz).
_BYTES_PER_CLOCK: Final = 64
_MEMORY_BYTES_PER_CLOCK: Final = 18.6
_PRODUCT_BYTES_PER_CLOCK: Final = 4096
_SHARED_BYTES: Final = 227 * 1024
_LATENCY: Final = 1900

# Scales of the kernel's operands.
_NONE = tl.constexpr(0)
_BY_OUTPUT = tl.constexpr(1)
_BY_BLOCK = tl.constexpr(2)


@functools.lru_cache(maxsize=1024)
def ranked_tiles(
    names: tuple[str, ...], rows: int, outputs: int, row_bytes: int, blocks: bool, processors: int
) -> tuple[str, ...]:
    """Those of the tiles that should be the fastest for a product of this shape, the best one first.

    Where the memory is the limit of several, the one is better whose programs need fewer waves: those of a wave end
    at about the same time, and the memory idles until the loads of the next ones are on their way.
    """

    def expected(name: str) -> tuple[float, float]:
        busy = clocks(TILES[name], rows, outputs, row_bytes, blocks, processors)
        memory = outputs * row_bytes / processors / _MEMORY_BYTES_PER_CLOCK
        return max(busy, memory) + _waves(TILES[name], rows, outputs, blocks, processors) * _LATENCY, busy

    return tuple(sorted(names, key=expected)[:_MEASURED])


def clocks(tile: Tile, rows: int, outputs: int, row_bytes: int, blocks: bool, processors: int) -> float:
    """How long the busiest multiprocessor has to load its tiles, to multiply them, or to wait for them; the longest of
    these. The memory's own time is the same for every tile."""
    step, stages = _pipeline(tile, blocks)
    tiles = cdiv(outputs, tile.outputs) * cdiv(rows, tile.rows)
    mine = cdiv(tiles, processors)
    loads = mine * (tile.outputs + tile.rows) * row_bytes / _BYTES_PER_CLOCK
    products = mine * tile.outputs * tile.rows * tile.parts * row_bytes / _PRODUCT_BYTES_PER_CLOCK
    steps = cdiv(row_bytes, step * tile.parts)
    waits = _waves(tile, rows, outputs, blocks, processors) * max(steps / (stages - 1), 1) * _LATENCY
    longest: float = max(loads, products, waits)
    return longest


def _waves(tile: Tile, rows: int, outputs: int, blocks: bool, processors: int) -> int:
    """How many programs follow each other in one place; as many are on a multiprocessor as its shared memory holds."""
    step, stages = _pipeline(tile, blocks)
    shared = stages * step * (tile.outputs + tile.rows) * tile.parts
    tiles = cdiv(outputs, tile.outputs) * cdiv(rows, tile.rows)
    waves: int = cdiv(tiles, processors * max(1, _SHARED_BYTES // shared))
    return waves


def _pipeline(tile: Tile, blocks: bool) -> tuple[int, int]:
    """Bytes at a time, and how many times as many are loaded or being loaded; with blocks (FP8), one at a time."""
    step = SCALE_BLOCK if blocks else tile.bytes
    return step, tile.stages * (tile.bytes // step)


def launch(
    x: Tensor | ScaledRows,
    weight: Tensor | ScaledWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    activation: str = "",
    scaling: InputScaling | None = None,
) -> Target:
    """x [..., E] times a weight [N, E], both plain and of one dtype or both in FP8, plus bias: [..., N] in `dtype`.

    With an activation, activation(gate) * up [..., N / 2] of that, which `scaling` may round further. Raises ValueError
    for a scaling by row: no program has the whole row.
    """
    values = x.values if isinstance(x, ScaledRows) else x
    matrix = weight.values if isinstance(weight, ScaledWeight) else weight
    outputs, inputs = matrix.shape
    columns = outputs // 2 if activation else outputs
    own = tile.outputs // 2 if activation else tile.outputs
    target = target_for(torch.Size((*values.shape[:-1], columns)), dtype, values.device, scaling)
    if target.mode == BY_ROW.value:
        raise ValueError("a scale by row needs the whole row: round the result with quantize_rows")
    flat = values.reshape(-1, inputs).contiguous()
    rows = flat.shape[0]
    scales, x_scales, weight_scales = _NONE.value, flat, matrix
    if isinstance(x, ScaledRows) and isinstance(weight, ScaledWeight):
        scales = _BY_BLOCK.value if weight.has_blocks else _BY_OUTPUT.value
        x_scales, weight_scales = x.scales, weight.scales
    scale_blocks = x_scales.shape[-1]
    step, stages = _pipeline(tile, scales == _BY_BLOCK.value)
    step //= flat.element_size()
    span = cdiv(cdiv(inputs, tile.parts), step) * step
    ahead = 0
    if rows <= tile.rows <= 64 and inputs == span * tile.parts:
        lines = tile.outputs * tile.parts
        ahead = bytes_ahead(matrix, span * flat.element_size(), lines, cdiv(columns, own))
    scales_of_line = cdiv(inputs, SCALE_BLOCK) if scales == _BY_BLOCK.value else columns
    has_scales = scales != _NONE.value and weight_scales.numel() > 1
    if target.values.numel():
        _matrix_kernel[(cdiv(columns, own) * cdiv(rows, tile.rows),)](
            target.values,
            target.scales,
            target.static,
            flat,
            x_scales,
            matrix.contiguous(),
            weight_scales,
            bias,
            rows,
            columns,
            inputs,
            0 if x_scales.dim() == 1 else scale_blocks,
            0 if scale_blocks == 1 else 1,
            DTYPE=DTYPES[dtype],
            MODE=target.mode,
            ACTIVATION=activation,
            OUTPUTS=tile.outputs,
            ROWS=tile.rows,
            INPUTS=step,
            PARTS=tile.parts,
            SPAN=span,
            SCALES=scales,
            ONE_WEIGHT_SCALE=weight_scales.numel() == 1,
            HAS_BIAS=bias is not None,
            WHOLE_OUTPUTS=columns % own == 0,
            WHOLE_INPUTS=inputs == span * tile.parts,
            PROMOTE=scales == _BY_OUTPUT.value and tile.rows <= 64,  # where reading weights takes longer than products
            TOGETHER=max(1, _TOGETHER_BYTES // (inputs * flat.element_size() * tile.rows)),
            AHEAD=ahead,
            PROGRAMS_AHEAD=programs_ahead(flat.device) if ahead else 0,
            SCALES_AHEAD=has_scales and bytes_ahead(weight_scales, 4 * scales_of_line, 1, 1) > 0,
            num_warps=tile.warps,
            num_stages=stages,
            **launch_options(),
        )
    return target


@triton.jit(do_not_specialize=["num_rows"])
def _matrix_kernel(  # type: ignore[no-untyped-def]
    y,
    y_scales,
    y_static,
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    num_rows,
    num_columns,  # of y: all rows of the weight, or half of them
    num_inputs,
    x_scale_row_stride,
    x_scale_block_stride,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,  # see write_rows
    ACTIVATION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,  # inputs of each of the parts
    SCALES: tl.constexpr,
    ONE_WEIGHT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_OUTPUTS: tl.constexpr,
    WHOLE_INPUTS: tl.constexpr,
    PROMOTE: tl.constexpr,
    TOGETHER: tl.constexpr,
    AHEAD: tl.constexpr = 0,  # bytes of each line of the weight, see triton_overlap
    PROGRAMS_AHEAD: tl.constexpr = 0,
    SCALES_AHEAD: tl.constexpr = False,
    OVERLAP: tl.constexpr = False,
):
    GATED: tl.constexpr = ACTIVATION != ""
    COLUMNS: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    tile_n, tile_t = _tile_of_program(num_columns, num_rows, COLUMNS, ROWS, TOGETHER)
    if AHEAD > 0:
        count = tl.minimum(num_columns - tile_n * COLUMNS, COLUMNS)
        count = tl.where(tl.program_id(0) < PROGRAMS_AHEAD, count, 0)
        blocks = tl.cdiv(num_inputs, 128)
        for half in tl.static_range(OUTPUTS // COLUMNS):
            first = half * num_columns + tile_n * COLUMNS
            for part in tl.static_range(PARTS):
                at = weight + first.to(tl.int64) * num_inputs + part * SPAN
                prefetch(at, count, num_inputs * (weight.dtype.element_ty.primitive_bitwidth // 8), AHEAD)
            if SCALES_AHEAD and SCALES == _BY_BLOCK:
                prefetch(weight_scales + first // 128 * blocks, 1, 0, 4 * blocks)
            elif SCALES_AHEAD:
                prefetch(weight_scales + first, 1, 0, 4 * count)
    await_turn(OVERLAP)
    # The lines of the tensor cores' tile: output (gates, then ups) and part, and row and part.
    lines = tl.arange(0, OUTPUTS * PARTS)
    columns = tl.arange(0, ROWS * PARTS)
    real_n = tile_n * COLUMNS + lines % COLUMNS < num_columns
    n = tile_n * COLUMNS + lines % COLUMNS + lines % OUTPUTS // COLUMNS * num_columns
    t = tile_t * ROWS + columns % ROWS
    real_t = t < num_rows
    first_of_line = lines // OUTPUTS * SPAN
    first_of_column = columns // ROWS * SPAN
    k = tl.arange(0, INPUTS)
    weights_at = weight + (n.to(tl.int64) * num_inputs + first_of_line)[:, None] + k[None, :]
    x_at = x + (t.to(tl.int64) * num_inputs + first_of_column)[None, :] + k[:, None]

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
        if SCALES == _BY_BLOCK:
            block = start // 128
            x_scales_at = x_scales + t.to(tl.int64) * x_scale_row_stride
            x_scales_at += (first_of_column // 128 + block) * x_scale_block_stride
            scaled_columns = real_t & (first_of_column + start < num_inputs)
            x_scale = tl.load(x_scales_at, mask=scaled_columns, other=0.0)
            if PARTS == 1 and 128 % OUTPUTS == 0 and not GATED:  # all outputs of the tile have one scale
                x_scale *= tl.load(weight_scales + tile_n * OUTPUTS // 128 * tl.cdiv(num_inputs, 128) + block)
                sums += tl.dot(w_tile, x_tile) * x_scale[None, :]
            else:
                weight_scales_at = weight_scales + n // 128 * tl.cdiv(num_inputs, 128) + first_of_line // 128 + block
                scaled_lines = real_n & (first_of_line + start < num_inputs)
                w_scale = tl.load(weight_scales_at, mask=scaled_lines, other=0.0)
                sums += tl.dot(w_tile, x_tile) * w_scale[:, None] * x_scale[None, :]
        elif PROMOTE:
            sums = tl.dot(w_tile, x_tile, sums, max_num_imprecise_acc=INPUTS)
        else:
            sums = tl.dot(computable(w_tile), computable(x_tile), sums, input_precision="ieee")

    if PARTS > 1:
        part = tl.arange(0, PARTS)
        own = part[:, None, None, None] == part[None, None, :, None]
        cut = tl.where(own, tl.reshape(sums, (PARTS, OUTPUTS, PARTS, ROWS)), 0.0)
        sums = tl.sum(tl.sum(cut, axis=2), axis=0)
    lines = tl.arange(0, OUTPUTS)
    real_n = tile_n * COLUMNS + lines % COLUMNS < num_columns
    n = tile_n * COLUMNS + lines % COLUMNS + lines // COLUMNS * num_columns
    t = tile_t * ROWS + tl.arange(0, ROWS)
    real_t = t < num_rows
    if SCALES == _BY_OUTPUT:
        w_scale = tl.load(weight_scales + n * (0 if ONE_WEIGHT_SCALE else 1), mask=real_n, other=0.0)
        x_scale = tl.load(x_scales + t * x_scale_row_stride, mask=real_t, other=0.0)
        sums = sums * w_scale[:, None] * x_scale[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=real_n, other=0.0).to(tl.float32)[:, None]
    result = rounded(sums, DTYPE)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result.to(tl.float32), (2, COLUMNS, ROWS)), (1, 2, 0)))
        result = gated(gate, up, ACTIVATION, DTYPE)
    column = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    inside = real_t[:, None] & (column < num_columns)[None, :]
    write_rows(tl.trans(result), y, y_scales, y_static, t.to(tl.int64), column, inside, num_columns, MODE)


@triton.jit
def _tile_of_program(num_columns, num_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Programs that run at the same time share weights and rows in the L2 cache: they go through some tiles of rows for
    each tile of columns, before they come to the next ones."""
    tiles_n, tiles_t = tl.cdiv(num_columns, COLUMNS), tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    first = program // (TOGETHER * tiles_n) * TOGETHER
    together = tl.minimum(tiles_t - first, TOGETHER)
    inside = program % (TOGETHER * tiles_n)
    return inside // together, first + inside % together
