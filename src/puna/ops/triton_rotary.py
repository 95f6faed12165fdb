"""Rotary positions on GPUs, and the keys and values' way into the paged cache, in the same launch.

A cache of floating-point numbers is [blocks, K, block size, D], each position's D numbers side by side; FP8 ones have
no scale and are at most 448. In an int8 cache, [blocks, K, block size, D + 4] bytes, each head of a block has first its
block size x D codes, position by position, then a float32 scale for each position: number = code * scale, codes from
-127 to 127. (The CPU's kernels have the same codes and scales in another order.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.scaled import FP8
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_rounding import highest, nearest_integer, rounded
from puna.ops.triton_rows import rows_of
from puna.ops.triton_sizes import cdiv, power_of_two

# Numbers of each half of the heads that a block rotates: 128 threads with 4 of both.
_NUMBERS = 512
_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, FP8, torch.int8)


@triton.jit
def rotate(first, second, cos, sin, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rotated halves of heads, each product and each sum rounded to DTYPE as torch does: all are float32, `cos` and
    `sin` rounded already. Launch with enable_fp_fusion=False: fused, products in float32 would not be rounded."""
    a = rounded(first * cos, DTYPE).to(tl.float32) - rounded(second * sin, DTYPE).to(tl.float32)
    b = rounded(second * cos, DTYPE).to(tl.float32) + rounded(first * sin, DTYPE).to(tl.float32)
    return rounded(a, DTYPE), rounded(b, DTYPE)


@triton.jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    y,
    heads,
    outer_stride,
    head_stride,
    angle_stride,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    await_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    HALF: tl.constexpr = SIZE // 2
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    at = x + token * outer_stride + head[:, None] * head_stride + column[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    c, s = load_angles(cos, sin, token * angle_stride, column, HALF, x.dtype.element_ty)
    first, second = rotate(first, second, c, s, x.dtype.element_ty)
    to = y + (token * heads + head[:, None]) * SIZE + column[None, :]
    tl.store(to, first, mask=inside)
    tl.store(to + HALF, second, mask=inside)


@triton.jit
def load_angles(cos, sin, start, column, HALF: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token's cosines and sines, rounded to DTYPE -> float32 [1, BLOCK] each."""
    c = tl.load(cos + start + column, mask=column < HALF, other=0.0)
    s = tl.load(sin + start + column, mask=column < HALF, other=0.0)
    return rounded(c, DTYPE).to(tl.float32)[None, :], rounded(s, DTYPE).to(tl.float32)[None, :]


@triton.jit
def store_heads(first, second, cache, scales, chunk, offset, block_size, column, inside, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Halves of heads, of the model's dtype, to position `offset` of the chunks [HEADS] of a cache: see the top."""
    HALF: tl.constexpr = SIZE // 2
    if cache.dtype.element_ty == tl.int8:
        # The bits of the CPU's kernels: a number that is not finite makes the scale NaN, and the codes zero.
        a, b = first.to(tl.float32), second.to(tl.float32)
        top = tl.maximum(highest(a, 1), highest(b, 1), propagate_nan=tl.PropagateNan.ALL)
        finite = top < float("inf")
        inverse = tl.div_rn(tl.zeros_like(top) + 127.0, tl.where(finite & (top > 1e-30), top, 1.0))
        inverse = tl.where(finite & (top > 1e-30), inverse, 0.0)[:, None]
        a = tl.where(finite[:, None], nearest_integer(a * inverse), 0.0).to(tl.int8)
        b = tl.where(finite[:, None], nearest_integer(b * inverse), 0.0).to(tl.int8)
        scale = tl.where(finite, top * (1.0 / 127.0), float("nan"))
        at = chunk * block_size * (SIZE + 4)
        tl.store(scales + (at + block_size * SIZE) // 4 + offset, scale, mask=tl.max(inside.to(tl.int32), axis=1) > 0)
        to = cache + (at + offset * SIZE)[:, None] + column[None, :]
        tl.store(to, a, mask=inside)
        tl.store(to + HALF, b, mask=inside)
    else:
        to = cache + ((chunk * block_size + offset) * SIZE)[:, None] + column[None, :]
        tl.store(to, cache_number(first, cache.dtype.element_ty), mask=inside)
        tl.store(to + HALF, cache_number(second, cache.dtype.element_ty), mask=inside)


@triton.jit
def cache_number(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    if value.dtype == dtype:
        return value
    wide = value.to(tl.float32)
    if dtype == tl.float8e4nv:
        wide = tl.where(wide > 448.0, 448.0, wide)
        wide = tl.where(wide < -448.0, -448.0, wide)
    return rounded(wide, dtype)


@triton.jit
def rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    cos,
    sin,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slots,
    heads,
    kv_heads,
    query_programs,
    positions,
    block_size,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    angle_stride,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """A token's HEADS query heads, rotated in place, or HEADS of its keys and values, rotated and stored."""
    await_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    HALF: tl.constexpr = SIZE // 2
    DTYPE: tl.constexpr = key.dtype.element_ty
    c, s = load_angles(cos, sin, token * angle_stride, column, HALF, DTYPE)
    if tl.program_id(1) < query_programs:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (column < HALF)[None, :]
        at = query + token * query_stride + head[:, None] * query_head_stride + column[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        first, second = rotate(first, second, c, s, DTYPE)
        tl.store(at, first, mask=inside)
        tl.store(at + HALF, second, mask=inside)
    else:
        head = (tl.program_id(1) - query_programs) * HEADS + tl.arange(0, HEADS)
        inside = (head < kv_heads)[:, None] & (column < HALF)[None, :]
        slot = tl.load(slots + token)
        at = key + token * key_stride + head[:, None] * key_head_stride + column[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        value_at = value + token * value_stride + head[:, None] * value_head_stride + column[None, :]
        value_first = tl.load(value_at, mask=inside, other=0.0)
        value_second = tl.load(value_at + HALF, mask=inside, other=0.0)
        first, second = rotate(first, second, c, s, DTYPE)
        tl.store(at, first, mask=inside)
        tl.store(at + HALF, second, mask=inside)
        # Slots that are not in the cache would be writes to anywhere.
        inside = inside & (slot >= 0) & (slot < positions)
        chunk, offset = slot // block_size * kv_heads + head, slot % block_size
        store_heads(first, second, key_cache, key_scales, chunk, offset, block_size, column, inside, SIZE)
        store_heads(
            value_first, value_second, value_cache, value_scales, chunk, offset, block_size, column, inside, SIZE
        )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, size = x.shape[-2:]
    if cos.shape != (*x.shape[:-2], size // 2) or sin.shape != cos.shape or size % 2:
        raise ValueError(f"cos and sin are {list(cos.shape)} and {list(sin.shape)} for x {list(x.shape)}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = y.numel() // max(1, heads * size)
    if not tokens:
        return y
    cos, sin = cos.contiguous(), sin.contiguous()
    flat = x.reshape(tokens, heads, size)
    if flat.stride(-1) != 1 and size > 1:
        flat = flat.contiguous()
    together, block = _head_shape(size)
    rotary_kernel[(tokens, cdiv(heads, together))](
        flat,
        cos,
        sin,
        y,
        heads,
        flat.stride(0),
        flat.stride(1),
        size // 2,
        SIZE=size,
        HEADS=together,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
        **launch_options(),
    )
    return y


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor]:
    tokens, heads, size = query.shape
    kv_heads, block_size = key_cache.shape[1:3]
    scales = _check_cache(key_cache, value_cache, size)
    for name, part in (("key", key), ("value", value)):
        if part.shape != (tokens, kv_heads, size) or part.dtype != query.dtype:
            raise ValueError(f"{name} is {part.dtype} {list(part.shape)}: {[tokens, kv_heads, size]} is needed")
    if slot_mapping.shape != (tokens,) or cos_sin[0].shape != (tokens, size // 2):
        raise ValueError(f"{tokens} tokens have {list(slot_mapping.shape)} slots and angles {list(cos_sin[0].shape)}")
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    if not tokens:
        return query, key
    cos, sin = (rows_of(angles) for angles in cos_sin)
    together, block = _head_shape(size)
    query_programs = cdiv(heads, together)
    rotate_and_store_kernel[(tokens, query_programs + cdiv(kv_heads, together))](
        query,
        key,
        value,
        cos.data,
        sin.data,
        key_cache,
        value_cache,
        *scales,
        slot_mapping,
        heads,
        kv_heads,
        query_programs,
        key_cache.shape[0] * block_size,
        block_size,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos.outer_stride,
        SIZE=size,
        HEADS=together,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
        **launch_options(),
    )
    return query, key


def _head_shape(size: int) -> tuple[int, int]:
    """Heads that a block takes, and the length of their halves rounded up."""
    block = power_of_two(size // 2)
    return max(1, _NUMBERS // block), block


def _check_cache(keys: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The caches' memory as scales, where they are int8; see the top of the file."""
    width = size + 4 if keys.dtype == torch.int8 else size
    if keys.dtype not in _CACHE_DTYPES or keys.dtype != values.dtype or keys.shape != values.shape:
        raise ValueError(f"the caches are {keys.dtype} {list(keys.shape)} and {values.dtype} {list(values.shape)}")
    if keys.shape[3] != width or not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError(f"the caches have positions of {keys.shape[3]} numbers: {width}, contiguous, are needed")
    if keys.dtype != torch.int8:
        return keys, values
    if keys.shape[2] * size % 4:
        raise ValueError(f"int8 caches need a block size ({keys.shape[2]}) x head size ({size}) that 4 divides")
    return keys.view(-1).view(torch.float32), values.view(-1).view(torch.float32)
