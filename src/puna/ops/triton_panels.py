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
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_rounding import INTERPRETED, rounded
from puna.ops.triton_sizes import cdiv


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
def tile_rows(BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 .. BLOCK_T - 1 as [8, 1, BLOCK_T / 8, 1], the order in which panel_sums takes rows."""
    return tl.arange(0, 8)[:, None, None, None] + 8 * tl.arange(0, BLOCK_T // 8)[None, None, :, None]


@triton.jit
def panel_sums(  # type: ignore[no-untyped-def]
    rows,  # where rows of x begin, in the order of tile_rows; for rows that there are not, those of any other one
    words,  # int32, the panels
    E,
    blocks,  # of 32 inputs
    first,  # panel
    second,  # how many panels after the first one the next one is
    panels,  # in all
    magic,  # see centred_codes
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
    P: tl.constexpr = 1,
):
    """BLOCK_T rows of x times P R panels -> float32 [32 P R, BLOCK_T].

    Row m of the result is the output m % 8 * 4 + m % 32 // 8 of the panel first + m // (32 R) + m // 32 % R * second.
    Each of P S warps takes R panels and every S-th block of inputs; the sums of S are added up in a fixed order.
    """
    T1: tl.constexpr = BLOCK_T // 8
    HEAD: tl.constexpr = 16 * GROUPS * (1 + MINIMUMS)  # words of scales and minimums
    WORDS: tl.constexpr = HEAD + 32 * BITS
    # The order of the axes is what makes triton's choice of who loads what the one that needs no exchange: contiguous
    # ones last, then the threads of a warp from the first axis on, then the warps.
    c = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    warp = tl.arange(0, P * S)[None, None, :, None, None]
    s = warp % S
    r = tl.arange(0, R)[None, None, None, :, None]
    i = tl.arange(0, 4)[None, None, None, None, :]
    panel = tl.minimum(first + warp // S + r * second, panels - 1).to(tl.int64)
    at = words + (panel * blocks + s) * WORDS
    heads = at.to(tl.pointer_type(tl.float16)) + (g * 4 + i + 0 * c)
    if BITS == 4:
        codes = at + (HEAD + c * 32 + g * 4 + i)
        block = s
    else:
        u = tl.arange(0, 2)[None, None, None, None, :, None]
        codes = tl.expand_dims(at + (c * 64 + g * 4 + i), 4) + (HEAD + u * 32)
        block = tl.expand_dims(s, 4)
    k = tl.arange(0, S)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    rows = rows + k
    total = tl.zeros((P * S, 32 * R, BLOCK_T), tl.float32)
    # The number of stages is said here, since otherwise only what a dot multiplies is copied ahead: each step would
    # wait for its scales.
    for n in tl.range(0, tl.cdiv(blocks, S), num_stages=3, loop_unroll_factor=UNROLL):
        w = tl.load(codes) if EVEN else tl.load(codes, mask=n * S + block < blocks, other=0)
        a = centred_codes(w, magic, BITS, DTYPE)
        for group in tl.static_range(GROUPS):
            if GROUPS == 2 or not EVEN:
                live = n * (32 * S) + k < E
                if GROUPS == 2:
                    live = live & (k % 32 // 16 == group)
                part = tl.load(rows, mask=live, other=0.0)
            else:
                part = tl.load(rows)
            if EVEN:
                scale = tl.load(heads + group * 32)
            else:
                scale = tl.load(heads + group * 32, mask=n * S + s < blocks, other=0.0)
            scale = _per_output(scale.to(tl.float32), P * S, R, T1)
            acc = _dot(a, part, P, S, T1, DTYPE, PARTS)
            total += scale * acc
            if MINIMUMS:
                if EVEN:
                    minimum = tl.load(heads + (GROUPS + group) * 32)
                else:
                    minimum = tl.load(heads + (GROUPS + group) * 32, mask=n * S + s < blocks, other=0.0)
                # weight = scale * (code - centre) + (minimum + scale * centre)
                level = _per_output(minimum.to(tl.float32), P * S, R, T1) + scale * (1 << (BITS - 1))
                ones = tl.full((P * S, 16, 16), 1.0, tl.float32).to(DTYPE)
                ones = computable(tl.reshape(tl.join(ones, ones), (P * S, 16, 32)))
                sums = _dot(ones, part, P, S, T1, DTYPE, PARTS)  # each row is the sum of x
                sums = tl.broadcast_to(tl.expand_dims(sums, 1), (P * S, 2 * R, 16, BLOCK_T))
                total += level * tl.reshape(sums, (P * S, 32 * R, BLOCK_T))
        codes += S * WORDS
        heads += 2 * S * WORDS
        rows += 32 * S
    return tl.reshape(tl.sum(tl.reshape(total, (P, S, 32 * R, BLOCK_T)), 1), (P * 32 * R, BLOCK_T))


@triton.jit
def _per_output(values, S: tl.constexpr, R: tl.constexpr, T1: tl.constexpr):  # type: ignore[no-untyped-def]
    """[4, 8 g, S, R, 4 i], alike along the first axis -> [S, 32 R, 8 T1], laid out as the sums of a dot are."""
    ordered = tl.permute(values, (2, 3, 4, 1, 0))[:, :, :, :, None, :, None]
    return tl.reshape(tl.broadcast_to(ordered, (S, R, 4, 8, T1, 4, 2)), (S, 32 * R, 8 * T1))


@triton.jit
def _dot(a, x, P: tl.constexpr, S: tl.constexpr, T1: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [S, M, 32] times x [8, S, T1, 32] -> float32 [S, M, 8 T1]; x in float32 as three parts, with exact products."""
    if PARTS == 1:
        return tl.dot(a, _operand(x.to(DTYPE), P, S, T1))
    high = rounded(x, DTYPE)
    rest = x - high.to(tl.float32)
    middle = rounded(rest, DTYPE)
    low = rounded(rest - middle.to(tl.float32), DTYPE)
    acc = tl.dot(a, _operand(low, P, S, T1))
    acc = tl.dot(a, _operand(middle, P, S, T1), acc)
    return tl.dot(a, _operand(high, P, S, T1), acc)


@triton.jit
def _operand(x, P: tl.constexpr, S: tl.constexpr, T1: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [8, S, T1, 32] with its inputs in the order of centred_codes -> [S, 32, 8 T1]."""
    split = tl.reshape(x, (8, S, T1, 4, 2, 2, 2))  # c, j0, e, j1
    ordered = tl.reshape(tl.permute(split, (1, 6, 3, 4, 5, 2, 0)), (1, S, 32, 8 * T1))
    return computable(tl.reshape(tl.broadcast_to(ordered, (P, S, 32, 8 * T1)), (P * S, 32, 8 * T1)))


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
    OVERLAP: tl.constexpr = False,
):
    """ROWS rows x INPUTS inputs of a weight in panels, as numbers."""
    await_turn(OVERLAP)
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
    rows_kernel[(cdiv(count, rows), cdiv(panels.inputs, inputs))](
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
        **launch_options(),
    )
