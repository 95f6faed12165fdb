# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Drawing a token from each row of logits on GPUs, after temperature, top-k, top-p and min-p; its random numbers.

R rows, V vocabulary. Nothing here waits for the device or depends on values on the host, so that all of it can be
captured in a CUDA graph; what rows ask for comes in tensors [R], and rows of all kinds may be mixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.triton_argmax import TILE, WARPS, argmax, rows_of, split
from puna.ops.triton_cut import cut
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_sizes import cdiv, power_of_two
from puna.ops.triton_weights import exp, is_drawn, scale, weight_of

_INFINITY = tl.constexpr(float("inf"))


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [R, V], and the row's highest logit -> int64 [R], float32 [R].

    temperature float32: a row of 0 gets the lowest id of its highest logit, others are drawn. top_k int64 in 1..V,
    top_p float64, min_p float32; V, 1 and 0 rule nothing out, None does so for all rows and saves the time. uniform
    float64 in [0, 1). All are [R]. What is drawn is said in puna.runtime.sampling_ops.draw. A drawn row whose highest
    logit is not finite, or with a temperature that is no positive number, gets the token 0.

    Raises ValueError for a tensor of another shape or dtype.
    """
    logits = rows_of(logits)
    rows, size = logits.shape
    given = (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float64),
        ("min_p", min_p, torch.float32),
        ("uniform", uniform, torch.float64),
    )
    for name, numbers, dtype in given:
        if numbers is not None and (numbers.shape != (rows,) or numbers.dtype != dtype or not numbers.is_contiguous()):
            raise ValueError(f"{name} is {numbers.dtype} {tuple(numbers.shape)}: give contiguous {dtype} ({rows},)")
    likeliest, highest = argmax(logits)
    if rows == 0:
        return likeliest, highest
    device, stride = logits.device, logits.stride(0)
    splits, each = split(rows, size, device)
    # What the cut rules out; without one, nothing.
    least = last_id = None
    if top_k is not None or top_p is not None:
        least, last_id = cut(logits, highest, temperature, top_k, top_p)
    tiles = cdiv(size, TILE)
    sums = torch.empty((rows, tiles), dtype=torch.int64, device=device)
    _sums_kernel[(rows * splits,)](
        logits, stride, size, highest, temperature, least, last_id, min_p, sums, tiles, splits, each,
        TILE=TILE, num_warps=WARPS, enable_fp_fusion=False,
        **launch_options(),
    )  # fmt: skip
    token = torch.empty_like(likeliest)
    _point_kernel[(rows,)](
        logits, stride, size, highest, temperature, least, last_id, min_p, sums, tiles, uniform, likeliest, token,
        TILE=TILE, TILES=power_of_two(tiles), num_warps=WARPS, enable_fp_fusion=False,
        **launch_options(),
    )  # fmt: skip
    return token, highest


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """The random number in [0, 1) of each (seed, output position), as puna.runtime.sampling_ops.uniforms has it.

    seeds [R] int64, the bits of unsigned numbers; positions [R] int64 -> float64 [R].
    """
    if seeds.shape != positions.shape or {seeds.dtype, positions.dtype} != {torch.int64} or seeds.dim() != 1:
        raise ValueError(f"seeds {tuple(seeds.shape)} and positions {tuple(positions.shape)} must be int64 [R] both")
    found = torch.empty(seeds.shape, dtype=torch.float64, device=seeds.device)
    if len(seeds) > 0:
        block = 128
        grid = (cdiv(len(seeds), block),)
        _uniforms_kernel[grid](
            seeds.contiguous(), positions.contiguous(), found, len(seeds), BLOCK=block, num_warps=4, **launch_options()
        )
    return found


@triton.jit
def _kept_weights(x, at, size, row, peak, heat, least, last_id, min_p):
    """The weights of tokens after top-k, top-p and min-p; of what is no token, 0."""
    value = tl.load(x + at, mask=at < size, other=-_INFINITY).to(tl.float32)
    scaled = scale(value, peak, heat)
    relative = exp(scaled)
    if least is not None:
        least_scaled = tl.load(least + row * 2 + 1)
        is_level = (scaled == least_scaled) & (at <= tl.load(last_id + row))
        is_kept = (value >= tl.load(least + row * 2)) & ((scaled > least_scaled) | is_level)
        relative = tl.where(is_kept, relative, 0.0)
    if min_p is not None:
        relative = tl.where(relative < tl.load(min_p + row), 0.0, relative)
    return weight_of(relative)


@triton.jit(do_not_specialize=["splits", "each"])
def _sums_kernel(
    x,
    x_stride,
    size,
    highest,
    temperature,
    least,
    last_id,
    min_p,
    sums,
    tiles,
    splits,
    each,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """The weight of each tile of each row that is drawn."""
    await_turn(OVERLAP)
    program = tl.program_id(0)
    row = program // splits
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    if is_drawn(peak, heat):
        x += row.to(tl.int64) * x_stride
        first = program % splits * each
        for tile in range(first, tl.minimum(first + each, tiles)):
            at = tile * TILE + tl.arange(0, TILE)
            weight = _kept_weights(x, at, size, row, peak, heat, least, last_id, min_p)
            tl.store(sums + row * tiles + tile, tl.sum(weight, 0))


@triton.jit
def _point_kernel(
    x,
    x_stride,
    size,
    highest,
    temperature,
    least,
    last_id,
    min_p,
    sums,
    tiles,
    uniform,
    likeliest,
    tokens,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """The token at which the random number points, among the weights laid side by side in the order of the ids."""
    await_turn(OVERLAP)
    row = tl.program_id(0)
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    token = tl.where(heat == 0.0, tl.load(likeliest + row), 0)
    if is_drawn(peak, heat):
        x += row.to(tl.int64) * x_stride
        tile = tl.arange(0, TILES)
        held = tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0)
        ends = tl.cumsum(held, 0)
        total = tl.sum(held, 0)
        # Rounding may reach the total itself.
        aim = tl.minimum((total.to(tl.float64) * tl.load(uniform + row)).to(tl.int64), total - 1)
        chosen = tl.sum((ends <= aim).to(tl.int32), 0)
        before = tl.max(tl.where(tile < chosen, ends, 0), 0)
        at = chosen * TILE + tl.arange(0, TILE)
        weight = _kept_weights(x, at, size, row, peak, heat, least, last_id, min_p)
        token += chosen * TILE + tl.sum((before + tl.cumsum(weight, 0) <= aim).to(tl.int32), 0)
    tl.store(tokens + row, token)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["count"])
def _uniforms_kernel(seeds, positions, found, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr = False):
    """SplitMix64 with a start that is itself mixed; its upper 53 bits."""
    await_turn(OVERLAP)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + at, mask=at < count, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions + at, mask=at < count, other=0).to(tl.uint64, bitcast=True)
    start = _mix(seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15)
    bits = _mix(start + (position + 1) * 0x9E3779B97F4A7C15) >> 11
    # A number below 2**53, which int64 holds as well.
    tl.store(found + at, bits.to(tl.int64).to(tl.float64) * (2.0**-53), mask=at < count)
