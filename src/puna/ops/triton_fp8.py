"""Linear layers in FP8 on GPUs: one kernel for all scales and numbers of rows, and torch's own for many rows.

The kernel computes the transposed result: weight rows are the M of the tensor cores' tile, which is 64 at least, and
tokens their N, which may be as few as 16. So a step of one token multiplies little in vain, and reads each weight once.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops import triton_tuning
from puna.ops.scaled import SCALE_BLOCK, ScaledRows, ScaledWeight
from puna.ops.triton_device import multiprocessors
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


# By name, since that is what a file of measurements keeps. Bytes in shared memory: stages * inputs * (outputs + rows) *
# parts; a multiprocessor has 227 KB, and needs 40 KB of weights on their way to keep its share of the bandwidth
# (4.8 TB/s x 1.1 us / 132 multiprocessors).
TILES: Final = MappingProxyType(
    {
        "16x16": Tile(16, 16, 256, parts=4, stages=3),
        "32x16": Tile(32, 16, 256, parts=2),
        "64x16": Tile(64, 16, 256),
        "32x32": Tile(32, 32, 256, parts=2),
        "64x32": Tile(64, 32, 256),
        "64x64": Tile(64, 64, 128, stages=5),
        "128x64": Tile(128, 64, 128, stages=5),
        "64x128": Tile(64, 128, 128, stages=4),
        "128x128": Tile(128, 128, 128, warps=8, stages=4),
        "128x256": Tile(128, 256, 128, warps=8, stages=3),
    }
)
_LIBRARY: Final = "scaled_mm"
# Two sets of sums, those of a block and those of all, do not fit the registers of the largest tile.
BLOCK_TILES: Final = tuple(name for name, tile in TILES.items() if tile.outputs * tile.rows <= 128 * 128)
# For all numbers of rows alike; half the multiprocessors are enough to read a matrix of 4096 outputs in this shape.
_DETERMINISTIC: Final = "128x64"
# Rows up to which weights take longer to read than to multiply, and our own kernel is the default.
_FEW_ROWS: Final = 64
# Numbers that the dimensions of torch._scaled_mm must be multiples of: its loads have 16 bytes.
_ALIGNMENT: Final = 16


def scaled_linear(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """reference.scaled_linear; which tile, or torch's own kernel, is a matter of measurement."""
    rows = x.values.numel() // x.values.shape[-1]
    outputs, inputs = weight.values.shape
    default = _default(rows, outputs, weight.has_blocks, multiprocessors(weight.values.device))
    names = BLOCK_TILES if weight.has_blocks else TILES
    variants = [name for name in names if _suits(TILES[name], rows)]
    if rows > _ALIGNMENT and library_can(weight, bias, dtype):
        variants.append(_LIBRARY)
        default = _LIBRARY if rows > _FEW_ROWS else default

    def run(variant: str) -> Tensor:
        if variant == _LIBRARY:
            return library_scaled_linear(x, weight, bias, dtype)
        return launch(x, weight, bias, dtype, TILES[variant])

    shape = (triton_tuning.bucket(rows), outputs, inputs, _kind(x, weight), str(dtype))
    return run(triton_tuning.current().choose("scaled_linear/1", shape, default, variants, run))


def deterministic_scaled_linear(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same in one tile for any number of rows: a row's result does not depend on the others, to the bit."""
    return launch(x, weight, bias, dtype, TILES[_DETERMINISTIC])


def _default(rows: int, outputs: int, blocks: bool, processors: int) -> str:
    """The tile where nothing was measured: the largest of which there are enough for all multiprocessors."""
    if rows <= 16:
        names = ("64x16", "32x16", "16x16")
    elif rows <= 32:
        names = ("64x32", "32x32")
    elif rows <= 64:
        names = ("128x64", "64x64")
    elif blocks or rows <= 256:
        names = ("128x128", "64x128")
    else:
        names = ("128x256", "128x128", "64x128")
    for name in names:
        tile = TILES[name]
        if triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows) >= processors * 3 // 4:
            return name
    return names[-1]


def _suits(tile: Tile, rows: int) -> bool:
    """Whether a tile is worth measuring for so many rows."""
    wanted = min(max(triton.next_power_of_2(rows), 16), 256)
    return wanted // 2 <= tile.rows <= wanted if wanted > 64 else tile.rows == wanted


def _kind(x: ScaledRows, weight: ScaledWeight) -> str:
    return "blocks" if weight.has_blocks else "static" if x.scales.numel() == 1 else "rows"


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
    # Fast accumulation leaves sums in the tensor cores, whose accumulators of FP8 products have fewer bits than float32
    # (docs/gpu.md has what that costs): an eighth of the error that rounding the inputs to FP8 has made already, for
    # up to half more speed. It is what TensorRT-LLM and cuBLAS's users take for inference.
    y = torch._scaled_mm(
        values, weight.values.t(), row_scales, output_scales, bias=bias, out_dtype=dtype, use_fast_accum=True
    )
    return y.view(*x.values.shape[:-1], outputs)


def launch(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype, tile: Tile) -> Tensor:
    values = x.values.flatten(0, -2).contiguous()
    rows, inputs = values.shape
    outputs = weight.values.shape[0]
    y = torch.empty(rows, outputs, dtype=dtype, device=values.device)
    step = SCALE_BLOCK if weight.has_blocks else tile.inputs
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
            PROMOTE=tile.rows <= _FEW_ROWS,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y.view(*x.values.shape[:-1], outputs)


@triton.jit(do_not_specialize=["num_rows"])
def _scaled_linear_kernel(
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
def _tile_of_program(num_outputs, num_rows, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    """Programs that run at the same time share weights and rows in the L2 cache: they go through eight tiles of rows
    for each tile of outputs, before they come to the next ones."""
    tiles_n, tiles_t = tl.cdiv(num_outputs, OUTPUTS), tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    first = program // (8 * tiles_n) * 8
    together = tl.minimum(tiles_t - first, 8)
    inside = program % (8 * tiles_n)
    return inside // together, first + inside % together
