"""Grouped matmul on GPUs: rows of many tokens, sorted by expert, times their own expert's weight, in one launch.

A block looks up which expert its tile of rows belongs to, and chooses that weight's address among those in the
kernel's own arguments, so a CUDA graph keeps them and only experts that have rows are read. Weights are plain rows,
FP8 rows with scales, or int8 and int4 panels, whose numbers are rounded to the dtype of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.panels import BLOCK, PanelFormat, Panels
from puna.ops.scaled import SCALE_BLOCK, ScaledRows, ScaledWeight
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_pointwise import activate, gated
from puna.ops.triton_rounding import INTERPRETED, rounded
from puna.ops.triton_sizes import cdiv, power_of_two

# Tiles of rows whose tokens stay in the L2 cache while the experts' weights stream by: 16 x 128 rows of 4096 bfloat16
# are 16 MiB of its 50.
_TOGETHER: Final = 16
# Rows of a tile up to which sums of FP8 products are promoted, as in triton_fp8: a second set of sums would take the
# registers of larger ones, and their weights were rounded a hundred times more coarsely.
_PROMOTED_ROWS: Final = 64


@dataclass(frozen=True)
class Tile:
    """What one block computes: `rows` x `outputs` (of gate and as many of up), from `bytes` of each row at a time."""

    rows: int
    outputs: int
    bytes: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Groups:
    """Pairs of a token and an expert, sorted by expert: `order` int32 [pairs] names them (token * k + place), those of
    expert e are order[starts[e]] .. order[starts[e + 1] - 1]; `starts` is int32 [experts + 1]."""

    order: Tensor
    starts: Tensor
    experts: int
    experts_per_token: int


@triton.jit
def expert_of(tile, starts, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The expert of a tile of rows, and its first and last row + 1; no rows where there are fewer tiles."""
    expert = tl.arange(0, EXPERTS_BLOCK)
    begin = tl.load(starts + expert, mask=expert < EXPERTS, other=0)
    end = tl.load(starts + expert + 1, mask=expert < EXPERTS, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, axis=0) - tiles
    own = (before <= tile) & (tile < before + tiles)
    first = tl.sum(tl.where(own, begin + (tile - before) * ROWS, 0), axis=0)
    return tl.sum(tl.where(own, expert, 0), axis=0), first, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def chosen(pointers, expert, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """pointers[expert] of a tuple of pointers."""
    address = pointers[0].to(tl.int64)
    for i in tl.static_range(1, EXPERTS):
        address = tl.where(expert == i, pointers[i].to(tl.int64), address)
    # Weights begin at multiples of 16 bytes, which the choice has hidden from the compiler.
    return tl.multiple_of(address.to(pointers[0].dtype), 16)


@triton.jit
def _panel_tile(  # type: ignore[no-untyped-def]
    weight,
    n,
    start,
    inputs,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Numbers [INPUTS, OUTPUTS] of group panels (int32 words at `weight`), for the outputs n and the inputs from
    `start`, a multiple of 32; see panels.py. A block of 32 inputs has 16 words of scales for each of the GROUPS, as
    many of minimums, then 32 words, one for each output, for every quad (BITS 8) or two quads (BITS 4) of inputs."""
    HEAD: tl.constexpr = 16 * GROUPS * (1 + MINIMUMS)
    WORDS: tl.constexpr = HEAD + 32 * BITS
    PER_WORD: tl.constexpr = 32 // BITS
    panel = weight + (n // 32).to(tl.int64) * ((inputs + 31) // 32 * WORDS)
    place = tl.arange(0, INPUTS // PER_WORD)
    block = start // 32 + place // BITS
    # Past the last block there is another panel, or the end of the memory.
    exists = (block * 32 < inputs)[:, None]
    at = panel[None, :] + (block * WORDS + HEAD + place % BITS * 32)[:, None] + (n % 32)[None, :]
    words = tl.load(at, mask=exists, other=0)
    code = tl.arange(0, PER_WORD)
    # Bytes hold inputs in order; of 4 bits, the low halves of four bytes come before their high halves.
    shift = code * 8 if BITS == 8 else code % 4 * 8 + code // 4 * 4
    codes = (words[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
    GROUP: tl.constexpr = 32 // GROUPS
    group = tl.arange(0, INPUTS // GROUP)
    halves = panel.to(tl.pointer_type(tl.float16))
    group_block = start // 32 + group // GROUPS
    at = halves[None, :] + (group_block * (2 * WORDS) + group % GROUPS * 32)[:, None] + (n % 32)[None, :]
    exists = (group_block * 32 < inputs)[:, None]
    scale = tl.load(at, mask=exists, other=0.0).to(tl.float32)[:, None, :]
    codes = tl.reshape(codes, (INPUTS // GROUP, GROUP, OUTPUTS)).to(tl.float32)
    if MINIMUMS:
        minimum = tl.load(at + 32 * GROUPS, mask=exists, other=0.0).to(tl.float32)[:, None, :]
        numbers = codes * scale + minimum
    else:
        numbers = (codes - (1 << (BITS - 1))) * scale
    return rounded(tl.reshape(numbers, (INPUTS, OUTPUTS)), DTYPE)


@triton.jit
def _weight_tile(  # type: ignore[no-untyped-def]
    weight,
    n,
    start,
    inputs,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    WHOLE: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Numbers [INPUTS, OUTPUTS] of a weight: of panels where it has BITS, else of rows."""
    if BITS == 0:
        k = start + tl.arange(0, INPUTS)
        at = weight + n.to(tl.int64)[None, :] * inputs + k[:, None]
        numbers = tl.load(at) if WHOLE else tl.load(at, mask=(k < inputs)[:, None], other=0.0)
    else:
        numbers = _panel_tile(weight, n, start, inputs, BITS, GROUPS, MINIMUMS, INPUTS, OUTPUTS, DTYPE)
    return numbers


@triton.jit
def _dot(left, right, sums, PROMOTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """left @ right + sums. Sums of FP8 products, of which tensor cores keep 14 bits, leave them each PROMOTE inputs,
    with 0 in the end."""
    if INTERPRETED and left.dtype == tl.bfloat16:  # of which the interpreter would multiply the bits
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if PROMOTE == 0:
        return tl.dot(left, right, sums, input_precision="ieee")
    return tl.dot(left, right, sums, input_precision="ieee", max_num_imprecise_acc=PROMOTE)


@triton.jit
def grouped_kernel(  # type: ignore[no-untyped-def]
    x,
    x_scales,
    weights,
    weight_scales,
    y,
    order,
    starts,
    row_tiles,
    outputs,
    inputs,
    x_stride,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUND: tl.constexpr,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROMOTE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """y[row] = activation(x[token] @ gate) * (x[token] @ up) of sorted rows, or without one y[pair] = x[row] @ weight.

    SCALES: 0 without, 1 a scale for each row and output, 2 for each row and 128 inputs, and each 128 x 128 weights.
    """
    await_turn(OVERLAP)
    DOWN: tl.constexpr = ACTIVATION == ""
    # Some tiles of rows, then the next outputs for the same ones, so that their tokens are read from the L2 cache.
    output_tiles = tl.cdiv(outputs, OUTPUTS)
    strip = tl.program_id(0) // (TOGETHER * output_tiles) * TOGETHER
    width = tl.minimum(row_tiles - strip, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * output_tiles)
    expert, first, end = expert_of(strip + within % width, starts, EXPERTS, EXPERTS_BLOCK, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    inside = row < end
    column = within // width * OUTPUTS + tl.arange(0, OUTPUTS)
    # Columns past the last repeat it, so that no load needs a mask for them.
    n = column if WHOLE_OUTPUTS else tl.minimum(column, outputs - 1)
    pair = tl.load(order + row, mask=inside, other=0)
    source = row if DOWN else pair // TOP
    source = tl.where(inside, source, 0).to(tl.int64)
    weight = chosen(weights, expert, EXPERTS)
    a = x + source[:, None] * x_stride
    k = tl.arange(0, INPUTS)
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    up_sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    DTYPE: tl.constexpr = x.dtype.element_ty
    if SCALES != 0:
        scales = chosen(weight_scales, expert, EXPERTS)
    for start in range(0, inputs, INPUTS):
        if WHOLE:
            left = tl.load(a + (start + k)[None, :])
        else:
            left = tl.load(a + (start + k)[None, :], mask=(start + k < inputs)[None, :], other=0.0)
        right = _weight_tile(weight, n, start, inputs, BITS, GROUPS, MINIMUMS, WHOLE, INPUTS, OUTPUTS, DTYPE)
        if SCALES == 2:
            blocks = tl.cdiv(inputs, 128)
            row_scale = tl.load(x_scales + source * blocks + start // 128)[:, None]
            scale = tl.load(scales + n // 128 * blocks + start // 128)[None, :]
            sums += _dot(left, right, tl.zeros_like(sums), 0) * (row_scale * scale)
        else:
            sums = _dot(left, right, sums, PROMOTE)
        if not DOWN:
            up = outputs + n
            right = _weight_tile(weight, up, start, inputs, BITS, GROUPS, MINIMUMS, WHOLE, INPUTS, OUTPUTS, DTYPE)
            if SCALES == 2:
                scale = tl.load(scales + up // 128 * blocks + start // 128)[None, :]
                up_sums += _dot(left, right, tl.zeros_like(sums), 0) * (row_scale * scale)
            else:
                up_sums = _dot(left, right, up_sums, PROMOTE)
    if SCALES == 1:
        row_scale = tl.load(x_scales + source)[:, None]
        sums = sums * row_scale * tl.load(scales + n)[None, :]
        if not DOWN:
            up_sums = up_sums * row_scale * tl.load(scales + outputs + n)[None, :]
    TO: tl.constexpr = y.dtype.element_ty
    if DOWN:
        target = pair
        result = rounded(sums, TO)
    elif ROUND:
        target = row
        result = gated(rounded(sums, TO).to(tl.float32), rounded(up_sums, TO).to(tl.float32), ACTIVATION, TO)
    else:
        target = row
        result = rounded(activate(sums, ACTIVATION) * up_sums, TO)
    at = y + target.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(at, result, mask=inside[:, None] & (column < outputs)[None, :])


@dataclass(frozen=True)
class _Weights:
    """The experts' weights as the kernel takes them."""

    tensors: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    scale_mode: int
    form: PanelFormat | None


def multiply(
    x: Tensor | ScaledRows,
    weights: Sequence[Tensor | ScaledWeight | Panels],
    groups: Groups,
    tile: Tile,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Rows times their own expert's weight, in `dtype`.

    With an activation: x [T, E] times gate and up [2 F, E] -> [pairs, F], sorted by expert. Without: x [pairs, F], so
    sorted, times [E, F] -> [pairs, E] in the order of pairs, token by token.
    """
    values = x.values if isinstance(x, ScaledRows) else x
    found = _weights(weights)
    first = weights[0]
    total, inputs = (first.outputs, first.inputs) if isinstance(first, Panels) else _shape(first)
    outputs = total // 2 if activation else total
    pairs = groups.order.numel()
    y = torch.empty(pairs, outputs, dtype=dtype, device=values.device)
    row_tiles = most_tiles(pairs, groups.experts, tile.rows)
    step = SCALE_BLOCK if found.scale_mode == 2 else max(32, tile.bytes // values.element_size())
    grouped_kernel[(row_tiles * cdiv(outputs, tile.outputs),)](
        values,
        x.scales if isinstance(x, ScaledRows) else values,
        found.tensors,
        found.scales,
        y,
        groups.order,
        groups.starts,
        row_tiles,
        outputs,
        inputs,
        values.stride(0),
        EXPERTS=groups.experts,
        EXPERTS_BLOCK=power_of_two(groups.experts),
        TOP=groups.experts_per_token,
        ACTIVATION=activation,
        ROUND=found.form is None,
        SCALES=found.scale_mode,
        BITS=found.form.bits if found.form else 0,
        GROUPS=BLOCK // found.form.group_size if found.form else 1,
        MINIMUMS=found.form.minimums if found.form else False,
        WHOLE=inputs % step == 0,
        WHOLE_OUTPUTS=outputs % tile.outputs == 0,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        INPUTS=step,
        TOGETHER=_TOGETHER,
        PROMOTE=step if tile.rows <= _PROMOTED_ROWS else 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_options(),
    )
    return y


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """Tiles that pairs can need: each expert may have one that is not full."""
    return min(pairs, pairs // rows + experts)


def panel_words(weights: Sequence[Panels]) -> tuple[Tensor, ...]:
    """The panels' memory as int32."""
    return tuple(weight.data.view(-1).view(torch.int32) for weight in weights)


def _shape(weight: Tensor | ScaledWeight) -> tuple[int, int]:
    outputs, inputs = (weight.values if isinstance(weight, ScaledWeight) else weight).shape
    return outputs, inputs


def _weights(weights: Sequence[Tensor | ScaledWeight | Panels]) -> _Weights:
    """Raises ValueError unless all are of one kind and shape."""
    first = weights[0]
    panels = [weight for weight in weights if isinstance(weight, Panels)]
    scaled = [weight for weight in weights if isinstance(weight, ScaledWeight)]
    plain = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(weights) not in (len(panels), len(scaled), len(plain)):
        raise ValueError("the experts' weights are of several kinds: give all of them one")
    if isinstance(first, Panels):
        if len({(weight.format, weight.outputs, weight.inputs) for weight in panels}) > 1 or not first.format.bits:
            raise ValueError(f"the experts' panels must be int8 or int4, all of one format, not {first.format}")
        words = panel_words(panels)
        return _Weights(words, words, 0, first.format)
    if len({(_shape(weight), weight.dtype) for weight in plain} | {_shape(weight) for weight in scaled}) > 1:
        raise ValueError("the experts' weights must be of one shape and dtype")
    if isinstance(first, Tensor):
        matrices = tuple(_aligned(weight) for weight in plain)
        return _Weights(matrices, matrices, 0, None)
    values = tuple(_aligned(weight.values) for weight in scaled)
    if first.has_blocks:
        return _Weights(values, tuple(_aligned(weight.scales) for weight in scaled), 2, None)
    # One for each output, which is how Fp8Format has them, so that this copies nothing.
    scales = tuple(_aligned(weight.scales.reshape(-1, 1).expand(_shape(weight)[0], 1)) for weight in scaled)
    return _Weights(values, scales, 1, None)


def _aligned(weight: Tensor) -> Tensor:
    """Contiguous, beginning at a multiple of 16 bytes."""
    weight = weight.detach().contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
