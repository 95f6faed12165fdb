"""Reading panels of int8 and int4 in Triton: codes as operands of tensor cores, whole weights, rows of an embedding.

A block is 32 outputs x 32 inputs: float16 scales (and minimums), then codes as int32 words, 32 outputs side by side:
word p of 4 bits has the inputs 8 p .. 8 p + 7 (byte i: 8 p + i low, 8 p + 4 + i high), of 8 bits 4 p .. 4 p + 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops import reference
from puna.ops.panels import BLOCK, Panels
from puna.ops.triton_rounding import INTERPRETED, rounded


@triton.jit
def computable(values):  # type: ignore[no-untyped-def]
    """As they are; in the interpreter, which computes with the bits of bfloat16, as float32."""
    if INTERPRETED:
        return values.to(tl.float32)
    return values


@triton.jit
def centred_codes(words, magic, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """codes - 8 or - 128, exact, in DTYPE (bfloat16 or float16), as the first operand of a dot: [S, 32 R, 32].

    words: 4 bits [4 c, 8 g, S, R, 4 i], word p = c of the output 4 g + i of panel R and block S; 8 bits
    [4 c, 8 g, S, R, 2 u, 4 i], word p = 2 c + u. magic: 0x43004300 (bfloat16) or 0x64006400 (float16): the numbers 128
    and 1024, whose lowest bits count ones, so that or-ing codes into pairs of them adds the codes. It comes as an
    argument because the compiler makes one instruction of `and` and `or` only where one of the two is in a register.

    Rows of the result are ordered (R, i, g), the inputs of a block (j1, c, j0, e) with input = 8 c + 4 j0 + 2 e + j1:
    then a thread's words hold just the elements of the fragments that mma.m16n8k16 wants of it (rows g, inputs by c),
    and nothing moves between threads.
    """
    if BITS == 4:
        q0 = (words & 0x000F000F) | magic
        q1 = ((words >> 4) & 0x000F000F) | magic
        q2 = ((words >> 8) & 0x000F000F) | magic
        q3 = ((words >> 12) & 0x000F000F) | magic
        pairs = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [c, g, S, R, i, j1, j0]
        both = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
        centre: tl.constexpr = 136.0 if tl.bfloat16 == DTYPE else 1032.0
        values = computable(both.to(DTYPE, bitcast=True)) - computable(tl.full((), centre, tl.float32).to(DTYPE))
        ordered = tl.permute(values, (2, 3, 4, 1, 5, 0, 6, 7))
    else:
        pairs = tl.join(words & 0x00FF00FF, (words >> 8) & 0x00FF00FF)  # [c, g, S, R, j0, i, j1]
        if tl.bfloat16 == DTYPE:
            # Of the 8 bits 7 fit beside 128; the highest chooses what is taken off: 128 or 256.
            low = (pairs & 0x007F007F) | magic
            high = (pairs & 0x00800080) ^ (magic | 0x00800080)
            lows = tl.join(low.to(tl.int16), (low >> 16).to(tl.int16))
            highs = tl.join(high.to(tl.int16), (high >> 16).to(tl.int16))
            values = computable(lows.to(DTYPE, bitcast=True)) - computable(highs.to(DTYPE, bitcast=True))
        else:
            whole = pairs | magic
            both = tl.join(whole.to(tl.int16), (whole >> 16).to(tl.int16))
            values = computable(both.to(DTYPE, bitcast=True)) - computable(tl.full((), 1152.0, tl.float32).to(DTYPE))
        ordered = tl.permute(values, (2, 3, 5, 1, 6, 0, 4, 7))
    return tl.reshape(ordered, (words.shape[2], 32 * words.shape[3], 32))


@triton.jit
def rows_kernel(  # type: ignore[no-untyped-def]
    words,
    ids,  # [rows], which outputs; or unused
    y,  # [rows, E]
    first,
    outputs,
    rows,
    E,
    blocks,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """ROWS rows x INPUTS inputs of a weight in panels, as numbers."""
    HEAD: tl.constexpr = 16 * GROUPS * (1 + MINIMUMS)
    WORDS: tl.constexpr = HEAD + 32 * BITS
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if HAS_IDS:
        output = tl.load(ids + place, mask=place < rows, other=-1).to(tl.int64)
        exists = (output >= 0) & (output < outputs)
        output = tl.where(exists, output, 0)
    else:
        output = (first + place).to(tl.int64)
        exists = output < outputs
    at = words + (output // 32 * blocks * WORDS)[:, None]
    lane = (output % 32)[:, None]
    # One word at a time and all of its codes: a word is loaded once.
    word = tl.program_id(1) * (INPUTS * BITS // 32) + tl.arange(0, INPUTS * BITS // 32)[None, :]
    block = word // BITS
    inside = exists[:, None] & (block < blocks)
    head = (at + block * WORDS).to(tl.pointer_type(tl.float16)) + lane
    code = tl.load(at + block * WORDS + HEAD + word % BITS * 32 + lane, mask=inside, other=0)
    if GROUPS == 2:
        head += word % BITS * 2 // BITS * 32
    scale = tl.load(head, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    if BITS == 4:
        shift = tl.arange(0, 8) % 4 * 8 + tl.arange(0, 8) // 4 * 4
        codes = (code[:, :, None] >> shift[None, None, :]) & 0xF
    else:
        codes = (code[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 0xFF
    if MINIMUMS:
        value = codes.to(tl.float32) * scale
        value += tl.load(head + GROUPS * 32, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    else:
        value = (codes - (1 << (BITS - 1))).to(tl.float32) * scale
    value = tl.reshape(value, (ROWS, INPUTS))
    column = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)[None, :]
    to = y + place.to(tl.int64)[:, None] * E + column
    tl.store(to, rounded(value, y.dtype.element_ty), mask=(place < rows)[:, None] & (column < E))


def dequantize(panels: Panels, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Panels.dequantize in `dtype`: outputs first .. first + count -> [count, E]."""
    y = torch.empty((count, panels.inputs), dtype=dtype, device=panels.data.device)
    _launch(panels, y, None, first, 32, 128)
    return y


def panel_embedding(token_ids: Tensor, panels: Panels, dtype: torch.dtype) -> Tensor:
    """reference.panel_embedding; zeros for an id outside of 0..V-1."""
    if not panels.format.bits:
        return reference.panel_embedding(token_ids, panels, dtype)
    y = torch.empty((*token_ids.shape, panels.inputs), dtype=dtype, device=panels.data.device)
    _launch(panels, y, token_ids.contiguous(), 0, 1, 1024)
    return y


def _launch(panels: Panels, y: Tensor, ids: Tensor | None, first: int, rows: int, inputs: int) -> None:
    form, count = panels.format, y.numel() // panels.inputs
    if not count:
        return
    rows_kernel[(triton.cdiv(count, rows), triton.cdiv(panels.inputs, inputs))](
        panels.data.view(torch.int32),
        y if ids is None else ids,
        y,
        first,
        panels.outputs,
        count,
        panels.inputs,
        -(-panels.inputs // BLOCK),
        BITS=form.bits,
        GROUPS=BLOCK // form.group_size,
        MINIMUMS=form.minimums,
        HAS_IDS=ids is not None,
        ROWS=rows,
        INPUTS=inputs,
        num_warps=4,
    )
