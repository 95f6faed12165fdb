"""RmsNorm on GPUs: one pass over memory, with the residual's sum before and the rounding to FP8 behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.scaled import InputScaling, ScaledRows
from puna.ops.triton_device import multiprocessors
from puna.ops.triton_overlap import await_turn, bytes_ahead, launch_options, prefetch
from puna.ops.triton_rounding import rounded
from puna.ops.triton_rows import DTYPES, Rows, Target, row_starts, rows_of, target_for, write_rows
from puna.ops.triton_sizes import cdiv, power_of_two

# The registers of a block hold a row: 1024 threads with 64 numbers each.
LONGEST_ROW = 65536


@triton.jit
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    total,
    y,
    scales,
    static,
    count,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    epsilon,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    AHEAD: tl.constexpr = 0,  # bytes of the weight, see triton_overlap
    OVERLAP: tl.constexpr = False,
):
    if AHEAD > 0:
        prefetch(weight, 1, 0, AHEAD)
    await_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = tl.broadcast_to((column < SIZE)[None, :], (ROWS, BLOCK))
    if ROWS > 1:
        inside = inside & (row < count)[:, None]
    start = row_starts(row, x_inner, x_outer_stride, x_inner_stride)
    value = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    # Before the sum over the row, so that it is on its way meanwhile.
    scale = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    if ADD:
        start = row_starts(row, residual_inner, residual_outer_stride, residual_inner_stride)
        other = tl.load(residual + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        summed = rounded(value + other, total.dtype.element_ty)
        tl.store(total + row[:, None] * SIZE + column[None, :], summed, mask=inside)
        value = summed.to(tl.float32)
    mean = tl.sum(value * value, axis=1) / SIZE
    # Rounded before the weight and behind it, as torch does.
    normal = rounded(value * tl.rsqrt(mean + epsilon)[:, None], x.dtype.element_ty).to(tl.float32)
    write_rows(rounded(normal * scale[None, :], DTYPE), y, scales, static, row, column, inside, SIZE, MODE)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _norm(x, None, weight, epsilon, None)[1].values


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    total, target = _norm(x, residual, weight, epsilon, None)
    return total, target.values


def rms_norm_scaled(x: Tensor, weight: Tensor, epsilon: float, scaling: InputScaling) -> ScaledRows:
    return _norm(x, None, weight, epsilon, scaling)[1].scaled()


def add_rms_norm_scaled(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, scaling: InputScaling
) -> tuple[Tensor, ScaledRows]:
    total, target = _norm(x, residual, weight, epsilon, scaling)
    return total, target.scaled()


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, scaling: InputScaling | None
) -> tuple[Tensor, Target]:
    size = weight.numel()
    if x.shape[-1] != size or (residual is not None and residual.shape != x.shape):
        other = "" if residual is None else f", residual {list(residual.shape)}"
        raise ValueError(f"x has the shape {list(x.shape)}{other}: the last axis must be the weight's {size}")
    if size > LONGEST_ROW:
        raise ValueError(f"rows of {size} numbers are more than the {LONGEST_ROW} that a block holds")
    target = target_for(x.shape, torch.promote_types(x.dtype, weight.dtype), x.device, scaling)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual is not None else x
    rows = rows_of(x)
    others: Rows = rows if residual is None else rows_of(residual)
    if rows.count:
        # A fixed shape for each size, so that a row's result does not depend on how many there are. Heads are so short
        # that several go together: 1024 numbers, 8 a thread, which are one load of 16 bytes.
        block = max(power_of_two(size), 128)
        together = max(1, 1024 // block)
        programs = cdiv(rows.count, together)
        few = programs <= multiprocessors(x.device)
        rms_norm_kernel[(programs,)](
            rows.data,
            others.data,
            weight,
            total,
            target.values,
            target.scales,
            target.static,
            rows.count,
            rows.inner,
            rows.outer_stride,
            rows.inner_stride,
            others.inner,
            others.outer_stride,
            others.inner_stride,
            epsilon,
            SIZE=size,
            ROWS=together,
            BLOCK=block,
            ADD=residual is not None,
            MODE=target.mode,
            DTYPE=DTYPES[target.dtype],
            AHEAD=bytes_ahead(weight, size * weight.itemsize, 1, programs) if few else 0,
            num_warps=row_warps(block * together),
            **launch_options(),
        )
    return total, target


def row_warps(numbers: int) -> int:
    """Warps of a block that holds so many numbers in registers: 16 a thread, so that a row of 4096 has 8 warps and its
    loads are all on their way at once, and at most 32 warps."""
    return min(32, max(4, numbers // 512))
