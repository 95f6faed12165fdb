"""Rows of tensors: where launchers find them, and how kernels write them, plain or rounded to FP8."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.scaled import FP8, SCALE_BLOCK, InputScaling, ScaledRows
from puna.ops.triton_rounding import highest, rounded
from puna.ops.triton_sizes import cdiv

DTYPES: Final = MappingProxyType(
    {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, FP8: tl.float8e4nv}
)

# How a kernel writes its rows: InputScaling as a number.
PLAIN = tl.constexpr(0)
BY_ROW = tl.constexpr(1)
STATIC = tl.constexpr(2)
BY_BLOCK = tl.constexpr(3)


@dataclass(frozen=True)
class Rows:
    """A tensor [..., E] as rows of contiguous numbers: row r begins r // inner * outer_stride + r % inner *
    inner_stride numbers behind `data`. So heads inside of wider rows need no copy."""

    data: Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(x: Tensor) -> Rows:
    """The rows of x; those of a copy where they don't lie as Rows can tell."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return rows_of(x.contiguous())
    count = x.numel() // max(1, x.shape[-1])
    if len(axes) == 2:
        return Rows(x, count, axes[1][0], axes[0][1], axes[1][1])
    return Rows(x, count, 1, axes[0][1] if axes else x.shape[-1], 0)


@dataclass(frozen=True)
class Target:
    """What a kernel writes rows [..., size] to: `values`, and where they are rounded `scales`, or it reads `static`."""

    values: Tensor
    scales: Tensor
    static: Tensor
    mode: int
    dtype: torch.dtype

    def scaled(self) -> ScaledRows:
        return ScaledRows(self.values, self.scales if self.mode != STATIC.value else self.static, self.dtype)


def target_for(shape: torch.Size, dtype: torch.dtype, device: torch.device, scaling: InputScaling | None) -> Target:
    """Memory for rows [..., E] of `dtype`, or for what `scaling` rounds them to."""
    values = torch.empty(shape, dtype=dtype if scaling is None else FP8, device=device)
    if scaling is None:
        return Target(values, values, values, PLAIN.value, dtype)
    if scaling.static is not None:
        return Target(values, scaling.static, scaling.static, STATIC.value, dtype)
    width = cdiv(shape[-1], SCALE_BLOCK) if scaling.blocks else 1
    scales = torch.empty((*shape[:-1], width), dtype=torch.float32, device=device)
    return Target(values, scales, scales, BY_BLOCK.value if scaling.blocks else BY_ROW.value, dtype)


@triton.jit
def row_starts(row, inner, outer_stride, inner_stride):  # type: ignore[no-untyped-def]
    """Where rows begin, as Rows has it. `row` is int64: large batches have more numbers than int32 counts."""
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def write_rows(value, y, scales, static, row, column, inside, size, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes value [ROWS, BLOCK], of the dtype of the rows and zero outside, to the rows `row` of y [..., size].

    BY_ROW needs the whole row in one BLOCK, BY_BLOCK a BLOCK and a first column that are multiples of 128. The bits are
    those of reference.quantize_rows.
    """
    ROWS: tl.constexpr = value.shape[0]
    BLOCK: tl.constexpr = value.shape[1]
    if MODE != PLAIN:
        wide = value.to(tl.float32)
        if MODE == STATIC:
            quotient = tl.div_rn(wide, tl.zeros_like(wide) + tl.load(static))
        else:
            # Rows have one group of numbers, or one for each 128.
            GROUP: tl.constexpr = 128 if MODE == BY_BLOCK else BLOCK
            groups = tl.reshape(wide, (ROWS, BLOCK // GROUP, GROUP))
            top = highest(groups, 2)
            scale = tl.where(top < 1e-12, 1e-12, top) * (1.0 / 448.0)
            quotient = tl.reshape(tl.div_rn(groups, tl.zeros_like(groups) + scale[:, :, None]), (ROWS, BLOCK))
            count = (size + GROUP - 1) // GROUP
            group = tl.min(column, axis=0) // GROUP + tl.arange(0, BLOCK // GROUP)
            rows_inside = tl.max(inside.to(tl.int32), axis=1) > 0
            used = rows_inside[:, None] & (group < count)[None, :]
            tl.store(scales + row[:, None] * count + group[None, :], scale, mask=used)
        # Comparisons, unlike minimum and maximum, let NaN through.
        quotient = tl.where(quotient > 448.0, 448.0, quotient)
        value = rounded(tl.where(quotient < -448.0, -448.0, quotient), tl.float8e4nv)
    tl.store(y + row[:, None] * size + column[None, :], value, mask=inside)
