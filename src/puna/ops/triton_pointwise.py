"""Gated activations, rounding to FP8, sums and choices of rows on GPUs: one pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.scaled import InputScaling, ScaledRows
from puna.ops.triton_norm import LONGEST_ROW, row_warps
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_rounding import rounded
from puna.ops.triton_rows import BY_ROW, Target, row_starts, rows_of, target_for, write_rows
from puna.ops.triton_sizes import cdiv, power_of_two

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# Numbers a block where rows can be cut: 128 threads with 8 each, one load of 16 bytes. An H200 needs 37 KB on their way
# a multiprocessor (4.8 TB/s x 1 us / 132); 16 such blocks with two loads a thread are 64 KB.
_BLOCK = 1024


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of float32 numbers, not rounded."""
    if ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (gate + 0.044715 gate^3)
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        gate = tl.where(gate < 0.0, 0.0, gate)
    return gate


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """activation(gate) * up of float32 numbers, rounded to DTYPE where torch rounds."""
    return rounded(rounded(activate(gate, ACTIVATION), DTYPE).to(tl.float32) * up, DTYPE)


@triton.jit
def rows_kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    scales,
    static,
    inner,
    outer_stride,
    inner_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MODE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """Rows of x to rows of SIZE: as they are, or with an ACTIVATION of their first half times their second."""
    await_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < SIZE)[None, :]
    at = x + row_starts(row, inner, outer_stride, inner_stride)[:, None] + column[None, :]
    value = tl.load(at, mask=inside, other=0.0)
    if ACTIVATION != "":
        up = tl.load(at + SIZE, mask=inside, other=0.0).to(tl.float32)
        value = gated(value.to(tl.float32), up, ACTIVATION, x.dtype.element_ty)
    write_rows(value, y, scales, static, row, column, inside, SIZE, MODE)


@triton.jit
def add_kernel(a, b, y, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr = False):  # type: ignore[no-untyped-def]
    await_turn(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    left = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, rounded(left + right, y.dtype.element_ty), mask=inside)


@triton.jit
def embedding_kernel(  # type: ignore[no-untyped-def]
    ids, weight, y, vocabulary, weight_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr = False
):
    await_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(ids + row).to(tl.int64)
    inside = column < SIZE
    exists = (chosen >= 0) & (chosen < vocabulary)
    value = tl.load(weight + chosen * weight_stride + column, mask=inside & exists, other=0.0)
    tl.store(y + row * SIZE + column, value, mask=inside)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    return _gated(gate_up, activation, None).values


def gated_activation_scaled(gate_up: Tensor, activation: str, scaling: InputScaling) -> ScaledRows:
    return _gated(gate_up, activation, scaling).scaled()


def quantize_rows(x: Tensor, scaling: InputScaling) -> ScaledRows:
    return _launch_rows(x, x.shape[-1], "", scaling).scaled()


def add(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"add of {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}: they must be alike")
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    if a.numel():
        add_kernel[(cdiv(a.numel(), _BLOCK),)](a, b, y, a.numel(), BLOCK=_BLOCK, num_warps=4, **launch_options())
    return y


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [V, E] for `token_ids` [...] -> [..., E]; zeros for an id outside of 0..V-1."""
    size = weight.shape[-1]
    y = torch.empty((*token_ids.shape, size), dtype=weight.dtype, device=weight.device)
    if weight.stride(-1) != 1 and size > 1:
        weight = weight.contiguous()
    if y.numel():
        block = min(power_of_two(size), _BLOCK)
        embedding_kernel[(token_ids.numel(), cdiv(size, block))](
            token_ids.contiguous(),
            weight,
            y,
            weight.shape[0],
            weight.stride(0),
            SIZE=size,
            BLOCK=block,
            num_warps=4,
            **launch_options(),
        )
    return y


def _gated(gate_up: Tensor, activation: str, scaling: InputScaling | None) -> Target:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: use silu, gelu, gelu_pytorch_tanh or relu")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has the shape {list(gate_up.shape)}: its last axis holds gates and as many ups")
    return _launch_rows(gate_up, gate_up.shape[-1] // 2, activation, scaling)


def _launch_rows(x: Tensor, size: int, activation: str, scaling: InputScaling | None) -> Target:
    target = target_for(torch.Size((*x.shape[:-1], size)), x.dtype, x.device, scaling)
    rows = rows_of(x)
    if target.values.numel() == 0:
        return target
    block, warps = _BLOCK, 4
    if target.mode == BY_ROW.value:
        # A row's highest value must be known before the first number is written: a block holds a whole row.
        if size > LONGEST_ROW:
            raise ValueError(f"rows of {size} numbers are more than the {LONGEST_ROW} that a block holds")
        block = max(power_of_two(size), 128)
        warps = row_warps(block)
    rows_kernel[(rows.count, cdiv(size, block))](
        rows.data,
        target.values,
        target.scales,
        target.static,
        rows.inner,
        rows.outer_stride,
        rows.inner_stride,
        SIZE=size,
        BLOCK=block,
        ACTIVATION=activation,
        MODE=target.mode,
        num_warps=warps,
        **launch_options(),
    )
    return target
