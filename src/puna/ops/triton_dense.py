"""Linear layers over plain matrices in deterministic mode: the same sums in the same order for any number of rows.

Otherwise torch's own (cuBLAS) multiplies plain matrices: it chooses a kernel, and so an order of sums, by the number of
rows, and may add up parts of the inputs in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops import reference
from puna.ops.triton_panels import computable
from puna.ops.triton_rounding import rounded


@dataclass(frozen=True)
class Tile:
    """One program's share: `outputs` x `rows` of the result, `inputs` at a time."""

    outputs: int
    rows: int
    inputs: int
    warps: int = 4
    stages: int = 4


# The tile depends on the weight alone. Weight rows are the M of the tensor cores' tile, so that few tokens are cheap.
# 64 outputs a program where that is what gives most of an H200's 132 multiprocessors one; float32 is multiplied without
# tensor cores, which would round it to tf32.
_NARROW: Final = Tile(64, 64, 128)
_WIDE: Final = Tile(128, 64, 64, stages=5)
_FLOAT32: Final = Tile(64, 32, 32, stages=3)
_WIDE_OUTPUTS: Final = 128 * 132
# Tiles of rows that run beside each other before the next outputs: 1,024 rows of 4,096 inputs are 8 MB, which the L2
# cache holds, and the weight is read once for them.
_TOGETHER: Final = 16


# T is not specialised: one machine code for all numbers of rows.
@triton.jit(do_not_specialize=["T"])
def linear_kernel(  # type: ignore[no-untyped-def]
    x,  # [T, E]
    weight,  # [N, E]
    bias,  # [N], or unused
    y,  # [T, N]
    T,
    N,
    E,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row_tiles, output_tiles = tl.cdiv(T, ROWS), tl.cdiv(N, OUTPUTS)
    group = tl.program_id(0) // (TOGETHER * output_tiles)
    within = tl.program_id(0) % (TOGETHER * output_tiles)
    size = tl.minimum(row_tiles - group * TOGETHER, TOGETHER)
    n = within // size * OUTPUTS + tl.arange(0, OUTPUTS)
    t = (group * TOGETHER + within % size) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INPUTS)
    # What lies outside is computed from other rows and not stored.
    weights = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]
    rows = x + tl.minimum(t, T - 1).to(tl.int64)[None, :] * x_stride + k[:, None]
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(0, E, INPUTS):
        if EVEN:
            a, b = tl.load(weights), tl.load(rows)
        else:
            a = tl.load(weights, mask=(start + k < E)[None, :], other=0.0)
            b = tl.load(rows, mask=(start + k < E)[:, None], other=0.0)
        total = tl.dot(computable(a), computable(b), total, input_precision="ieee")
        weights += INPUTS
        rows += INPUTS
    inside = (n < N)[:, None] & (t < T)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + t.to(tl.int64)[None, :] * N + n[:, None], rounded(total, y.dtype.element_ty), mask=inside)


def deterministic_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """reference.linear, where a row's result does not depend on the other rows, to the bit; sums are in float32.

    Raises ValueError where x, the weight and the bias are not of one dtype.
    """
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        found = ", ".join(str(part.dtype) for part in (x, weight, bias) if part is not None)
        raise ValueError(f"a linear layer of {found}: they must be of one dtype")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return reference.linear(x, weight, bias)
    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    tile = _tile(x.dtype, outputs)
    if y.numel():
        linear_kernel[(triton.cdiv(outputs, tile.outputs) * triton.cdiv(flat.shape[0], tile.rows),)](
            flat,
            weight,
            y if bias is None else bias,
            y,
            flat.shape[0],
            outputs,
            inputs,
            flat.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            EVEN=inputs % tile.inputs == 0,
            OUTPUTS=tile.outputs,
            ROWS=tile.rows,
            INPUTS=tile.inputs,
            TOGETHER=_TOGETHER,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y


def _tile(dtype: torch.dtype, outputs: int) -> Tile:
    if dtype == torch.float32:
        return _FLOAT32
    return _WIDE if outputs >= _WIDE_OUTPUTS else _NARROW
