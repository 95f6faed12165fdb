# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Choosing a token from each row of logits on GPUs: highest, and drawn after temperature, top-k, top-p and min-p.

R rows, V vocabulary. Nothing here waits for the device or depends on values on the host, so that all of it can be
captured in a CUDA graph; what rows ask for comes in tensors [R], and rows of all kinds may be mixed.

What is drawn is what csrc/kernels/draw.h draws, from the same whole numbers: a weight is exp(scaled logit) in units of
2**-35, by the same polynomial with the same fused multiplications. Sums of whole numbers do not depend on their order,
so a row may be cut among as many programs as there are multiprocessors without a change in any bit.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.triton_device import multiprocessors

# Columns that a program looks at in one go: 16 numbers a thread in four loads of 16 bytes, 8 KB on their way per block;
# Little's law asks for 20 to 30 KB a multiprocessor (4.3 TB/s x 0.8 us / 132), and eight blocks or more are resident.
_TILE: Final = 2048
_WARPS: Final = 4
# Programs per multiprocessor that are worth cutting rows for.
_PROGRAMS: Final = 8
# The first look for an edge is a histogram of 1/84 nat steps of the scaled logit: tokens 24.27 nats below the
# likeliest have no weight, and 84 x 24.27 < 2048.
_BUCKETS = tl.constexpr(2048)
_BUCKETS_PER_NAT = tl.constexpr(84.0)
_WEIGHT_UNITS = tl.constexpr(34359738368.0)  # 2**35
# Tokens of the edge's buckets that are listed, to be looked at again and again. Where there are more, as with logits
# that are nearly all equal, the row itself is looked at: slower, and the same result.
_LISTED: Final = 4096
# One program goes over a row to list them: as many columns at once as registers hold, since each step waits for memory,
# and copied ahead; then over the list, which is short.
_LISTING_TILE: Final = 8192
_CUT_TILE: Final = 1024
_CUT_WARPS: Final = 16
_INFINITY = tl.constexpr(float("inf"))
# Of what is not worth a name: beyond any sum of weights, which are below 2**53.
_BEYOND = tl.constexpr(1 << 62)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest id of the highest logit of each row of [R, V], and that logit -> int64 [R], float32 [R].

    A row with a NaN has NaN as its highest, and some id.
    """
    logits = rows_of(logits)
    rows, size = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    highest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return ids, highest
    splits, each = split(rows, size, logits.device)
    if splits == 1:
        _peaks_kernel[(rows,)](
            logits, logits.stride(0), size, ids, highest, 1, each, TILE=_TILE, num_warps=_WARPS, enable_fp_fusion=False
        )
        return ids, highest
    part_ids = torch.empty((rows, splits), dtype=torch.int64, device=logits.device)
    part_highest = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    _peaks_kernel[(rows * splits,)](
        logits, logits.stride(0), size, part_ids, part_highest, splits, each, TILE=_TILE, num_warps=_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    _join_peaks_kernel[(rows,)](part_ids, part_highest, ids, highest, splits, PARTS=power_of_two(splits), num_warps=1)
    return ids, highest


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
        histogram = torch.zeros((2, rows, _BUCKETS.value), dtype=torch.int64, device=device)
        _histogram_kernel[(rows * splits,)](
            logits, stride, size, highest, temperature, top_k, top_p, histogram[0], histogram[1], splits, each,
            TILE=_TILE, num_warps=2 * _WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        least = torch.empty((rows, 2), dtype=torch.float32, device=device)
        last_id = torch.empty(rows, dtype=torch.int64, device=device)
        listed = torch.empty((rows, _LISTED), dtype=logits.dtype, device=device)
        listed_ids = torch.empty((rows, _LISTED), dtype=torch.int32, device=device)
        _cut_kernel[(rows,)](
            logits, stride, size, highest, temperature, top_k, top_p, histogram[0], histogram[1], listed, listed_ids,
            least, last_id, LISTED=_LISTED, LISTING_TILE=_LISTING_TILE, TILE=_CUT_TILE, num_warps=_CUT_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    tiles = triton.cdiv(size, _TILE)
    sums = torch.empty((rows, tiles), dtype=torch.int64, device=device)
    _sums_kernel[(rows * splits,)](
        logits, stride, size, highest, temperature, least, last_id, min_p, sums, tiles, splits, each,
        TILE=_TILE, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    token = torch.empty_like(likeliest)
    _point_kernel[(rows,)](
        logits, stride, size, highest, temperature, least, last_id, min_p, sums, tiles, uniform, likeliest, token,
        TILE=_TILE, TILES=power_of_two(tiles), num_warps=_WARPS, enable_fp_fusion=False,
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
        grid = (triton.cdiv(len(seeds), block),)
        _uniforms_kernel[grid](seeds.contiguous(), positions.contiguous(), found, len(seeds), BLOCK=block, num_warps=4)
    return found


def rows_of(logits: Tensor) -> Tensor:
    """The logits with each row in one piece; raises ValueError for what is no matrix of floats."""
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}: give float32, bfloat16 or float16 [R, V]")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def split(rows: int, size: int, device: torch.device) -> tuple[int, int]:
    """Programs that a row is cut among, and tiles for each of them: none without one."""
    tiles = triton.cdiv(size, _TILE)
    each = triton.cdiv(tiles, max(1, min(tiles, multiprocessors(device) * _PROGRAMS // rows)))
    return triton.cdiv(tiles, each), each


def power_of_two(count: int) -> int:
    """The lowest power of two that is not below: the sizes that a kernel's arrays may have."""
    return int(triton.next_power_of_2(count))


# What differs from one number of rows to the next is not compiled in: a kernel for all is enough.
@triton.jit(do_not_specialize=["splits", "each"])
def _peaks_kernel(x, x_stride, size, ids, highest, splits, each, TILE: tl.constexpr):
    program = tl.program_id(0)
    x += (program // splits).to(tl.int64) * x_stride
    first = program % splits * each
    lane = tl.arange(0, TILE)
    best = tl.full((TILE,), -_INFINITY, tl.float32)
    where = first * TILE + lane
    for tile in range(first, first + each):
        at = tile * TILE + lane
        value = tl.load(x + at, mask=at < size, other=-_INFINITY).to(tl.float32)
        # Nothing is above a NaN, so one that was met stays.
        is_better = (value > best) | (value != value)
        best = tl.where(is_better, value, best)
        where = tl.where(is_better, at, where)
    has_nan = tl.max((best != best).to(tl.int32), 0) > 0
    top = tl.max(tl.where(best != best, -_INFINITY, best), 0)
    found = tl.min(tl.where(best == top, where, size - 1), 0)
    tl.store(ids + program, tl.minimum(found, size - 1).to(tl.int64))
    tl.store(highest + program, tl.where(has_nan, float("nan"), top))


@triton.jit(do_not_specialize=["splits"])
def _join_peaks_kernel(part_ids, part_highest, ids, highest, splits, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    value = tl.load(part_highest + row * splits + part, mask=part < splits, other=-_INFINITY)
    has_nan = tl.max((value != value).to(tl.int32), 0) > 0
    top = tl.max(tl.where(value != value, -_INFINITY, value), 0)
    # Parts are in the order of the ids.
    first = tl.min(tl.where((value == top) & (part < splits), part, splits - 1), 0)
    tl.store(ids + row, tl.load(part_ids + row * splits + first))
    tl.store(highest + row, tl.where(has_nan, float("nan"), top))


@triton.jit
def _exp(x):
    """exp of what is 0 or below, as csrc/vec.h computes it, to the bit."""
    x = tl.maximum(x, -87.3)
    # Adding 1.5 * 2**23 rounds to a whole number. The compiler must not fuse the product into it: enable_fp_fusion.
    n = (x * 1.44269504088896341 + 12582912.0) - 12582912.0
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440e-4, r)
    p = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    p = tl.fma(p, r, 1.0 / 120)
    p = tl.fma(p, r, 1.0 / 24)
    p = tl.fma(p, r, 1.0 / 6)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p, r, 1.0)
    p = tl.fma(p, r, 1.0)
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale(value, peak, heat):
    """What is left of a logit below the highest one, over the temperature; exact division takes a dozen instructions,
    of sixty for a token, which the usual temperature need not pay."""
    scaled = value - peak
    if heat != 1.0:
        scaled = tl.div_rn(scaled, heat)
    return scaled


@triton.jit
def _weight(relative):
    return (relative * _WEIGHT_UNITS).to(tl.int64)


@triton.jit
def _bucket(scaled):
    return tl.minimum(-scaled * _BUCKETS_PER_NAT, _BUCKETS - 1.0).to(tl.int32)


@triton.jit
def _is_drawn(highest, temperature):
    return (tl.abs(highest) < _INFINITY) & (temperature > 0) & (temperature < _INFINITY)


@triton.jit
def _limits(row, size, top_k, top_p):
    k = size.to(tl.int64)
    if top_k is not None:
        k = tl.minimum(tl.maximum(tl.load(top_k + row), 1), k)
    p = tl.full((), 1.0, tl.float64)
    if top_p is not None:
        p = tl.load(top_p + row)
    return k, p


@triton.jit(do_not_specialize=["splits", "each"])
def _histogram_kernel(
    x, x_stride, size, highest, temperature, top_k, top_p, weights, counts, splits, each, TILE: tl.constexpr
):
    """The weight, and for top-k the number, of each bucket's tokens; tokens without weight are in none."""
    program = tl.program_id(0)
    row = program // splits
    k, p = _limits(row, tl.cast(size, tl.int64), top_k, top_p)
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    if _is_drawn(peak, heat) & ((k < size) | (p < 1.0)):
        x += row.to(tl.int64) * x_stride
        weights += row * _BUCKETS
        counts += row * _BUCKETS
        first = program % splits * each
        for tile in range(first, first + each):
            at = tile * TILE + tl.arange(0, TILE)
            value = tl.load(x + at, mask=at < size, other=-_INFINITY).to(tl.float32)
            scaled = _scale(value, peak, heat)
            weight = _weight(_exp(scaled))
            bucket = _bucket(scaled)
            tl.atomic_add(weights + bucket, weight, mask=weight > 0, sem="relaxed")
            if k < size:
                tl.atomic_add(counts + bucket, tl.full((TILE,), 1, tl.int64), mask=weight > 0, sem="relaxed")


@triton.jit
def _level_key(x):
    """Whole numbers in the order of the floats, both zeros being one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _fraction(total, share):
    """ceil of a share of a sum of weights, in the float64 arithmetic of the CPU's kernel."""
    exact = total.to(tl.float64) * share
    whole = exact.to(tl.int64)
    return whole + (whole.to(tl.float64) < exact).to(tl.int64)


@triton.jit
def _look(x, listed, listed_ids, at, end, is_listed, peak, heat):
    """Tokens that may be at the edge, from the list or from the row itself -> logit, id, scaled logit, weight, bucket;
    past the end, a logit of -inf without weight."""
    from_list = (at < end) & is_listed
    from_row = (at < end) & (is_listed == 0)
    value = tl.load(x + at, mask=from_row, other=-_INFINITY).to(tl.float32)
    value = tl.where(is_listed, tl.load(listed + at, mask=from_list, other=-_INFINITY).to(tl.float32), value)
    ids = tl.where(is_listed, tl.load(listed_ids + at, mask=from_list, other=0), at)
    scaled = _scale(value, peak, heat)
    return value, ids, scaled, _weight(_exp(scaled)), _bucket(scaled)


@triton.jit
def _cut_kernel(
    x,
    x_stride,
    size,
    highest,
    temperature,
    top_k,
    top_p,
    weights,
    counts,
    listed,
    listed_ids,
    least,  # [R, 2]: logits, and scaled logits, below which tokens are out
    last_id,  # and of those level with that scaled logit, the ids behind this one
    LISTED: tl.constexpr,
    LISTING_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Where top-k and top-p end, exactly: the tokens of the buckets in question are listed, and of their keys the one
    at which the count or the weight is reached is found by halving."""
    row = tl.program_id(0)
    k, p = _limits(row, tl.cast(size, tl.int64), top_k, top_p)
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    least_logit = tl.full((), -_INFINITY, tl.float32)
    least_scaled = tl.full((), -_INFINITY, tl.float32)
    last = tl.cast(size, tl.int64)
    if _is_drawn(peak, heat) & ((k < size) | (p < 1.0)):
        x += row.to(tl.int64) * x_stride
        listed += row * LISTED
        listed_ids += row * LISTED
        lane = tl.arange(0, TILE)

        bucket = tl.arange(0, _BUCKETS)
        weight_ends = tl.cumsum(tl.load(weights + row * _BUCKETS + bucket), 0)
        count_ends = tl.cumsum(tl.load(counts + row * _BUCKETS + bucket), 0)
        total = tl.max(weight_ends, 0)
        # The count is only there for rows with a top-k; where it ends among tokens without weight, it rules none out.
        has_k = (k < size) & (k < tl.max(count_ends, 0))
        k_bucket = tl.where(has_k, tl.sum((count_ends < k).to(tl.int32), 0), _BUCKETS)
        count_before = tl.max(tl.where(bucket < k_bucket, count_ends, 0), 0)
        weight_before = tl.max(tl.where(bucket < k_bucket, weight_ends, 0), 0)
        weight_through = tl.where(has_k, tl.min(tl.where(bucket >= k_bucket, weight_ends, _BEYOND), 0), total)
        # How much top-k leaves is not known yet, but the buckets between which top-p must end are.
        has_p = p < 1.0
        least_target = tl.maximum(_fraction(weight_before, p), 1)
        most_target = tl.maximum(_fraction(weight_through, p), 1)
        p_first = tl.where(has_p, tl.sum((weight_ends < least_target).to(tl.int32), 0), _BUCKETS)
        p_last = tl.where(has_p, tl.sum((weight_ends < most_target).to(tl.int32), 0), -1)
        p_before = tl.max(tl.where(bucket < p_first, weight_ends, 0), 0)

        found = tl.full((), 0, tl.int32)
        for start in tl.range(0, size, LISTING_TILE, num_stages=3):
            at = start + tl.arange(0, LISTING_TILE)
            value = tl.load(x + at, mask=at < size, other=-_INFINITY)
            its_bucket = _bucket(_scale(value.to(tl.float32), peak, heat))
            is_in = (its_bucket == k_bucket) | ((its_bucket >= p_first) & (its_bucket <= p_last))
            number = tl.sum(is_in.to(tl.int32), 0)
            if number > 0:
                place = found + tl.cumsum(is_in.to(tl.int32), 0) - 1
                tl.store(listed + place, value, mask=is_in & (place < LISTED))
                tl.store(listed_ids + place, at, mask=is_in & (place < LISTED))
                found += number
        # Other threads of this program read what these have written.
        tl.debug_barrier()
        is_listed = found <= LISTED
        end = tl.where(is_listed, found, size)

        if has_k:
            low, high = tl.full((), _BEYOND, tl.int64), tl.full((), -_BEYOND, tl.int64)
            for start in range(0, end, TILE):
                value, ids, scaled, weight, its_bucket = _look(
                    x, listed, listed_ids, start + lane, end, is_listed, peak, heat
                )
                is_in = (its_bucket == k_bucket) & (weight > 0)
                key = _level_key(value).to(tl.int64)
                low = tl.minimum(low, tl.min(tl.where(is_in, key, _BEYOND), 0))
                high = tl.maximum(high, tl.max(tl.where(is_in, key, -_BEYOND), 0))
            # The highest key down to which there are k.
            while low < high:
                middle = low + ((high - low + 1) >> 1)
                number = tl.full((), 0, tl.int64)
                for start in range(0, end, TILE):
                    value, ids, scaled, weight, its_bucket = _look(
                        x, listed, listed_ids, start + lane, end, is_listed, peak, heat
                    )
                    is_in = (its_bucket == k_bucket) & (weight > 0) & (_level_key(value).to(tl.int64) >= middle)
                    number += tl.sum(is_in.to(tl.int64), 0)
                is_enough = count_before + number >= k
                low = tl.where(is_enough, middle, low)
                high = tl.where(is_enough, high, middle - 1)
            total = weight_before
            for start in range(0, end, TILE):
                value, ids, scaled, weight, its_bucket = _look(
                    x, listed, listed_ids, start + lane, end, is_listed, peak, heat
                )
                is_in = (its_bucket == k_bucket) & (_level_key(value).to(tl.int64) >= low)
                total += tl.sum(tl.where(is_in, weight, 0), 0)
            bits = low.to(tl.int32)
            least_logit = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)

        if has_p:
            target = tl.maximum(_fraction(total, p), 1)
            low, high = tl.full((), _BEYOND, tl.int64), tl.full((), 0, tl.int64)
            for start in range(0, end, TILE):
                value, ids, scaled, weight, its_bucket = _look(
                    x, listed, listed_ids, start + lane, end, is_listed, peak, heat
                )
                is_in = (its_bucket >= p_first) & (its_bucket <= p_last) & (weight > 0) & (value >= least_logit)
                key = _scaled_key(scaled)
                low = tl.minimum(low, tl.min(tl.where(is_in, key, _BEYOND), 0))
                high = tl.maximum(high, tl.max(tl.where(is_in, key, 0), 0))
            # The lowest key, which is the likeliest token's, up to which there is enough weight.
            while low < high:
                middle = low + ((high - low) >> 1)
                held = p_before
                for start in range(0, end, TILE):
                    value, ids, scaled, weight, its_bucket = _look(
                        x, listed, listed_ids, start + lane, end, is_listed, peak, heat
                    )
                    is_in = (its_bucket >= p_first) & (its_bucket <= p_last) & (value >= least_logit)
                    held += tl.sum(tl.where(is_in & (_scaled_key(scaled) <= middle), weight, 0), 0)
                is_enough = held >= target
                high = tl.where(is_enough, middle, high)
                low = tl.where(is_enough, low, middle + 1)
            least_scaled = -low.to(tl.int32).to(tl.float32, bitcast=True)
            # Of those that are level with it, as many as it takes, the lowest ids first.
            held, each, level = p_before, tl.full((), 1, tl.int64), tl.full((), 0, tl.int64)
            for start in range(0, end, TILE):
                value, ids, scaled, weight, its_bucket = _look(
                    x, listed, listed_ids, start + lane, end, is_listed, peak, heat
                )
                is_in = (its_bucket >= p_first) & (its_bucket <= p_last) & (value >= least_logit)
                key = _scaled_key(scaled)
                held += tl.sum(tl.where(is_in & (key < low), weight, 0), 0)
                each = tl.maximum(each, tl.max(tl.where(is_in & (key == low), weight, 0), 0))
                level += tl.sum((is_in & (key == low) & (weight > 0)).to(tl.int64), 0)
            needed = (target - held + each - 1) // each
            if needed < level:
                first, last = tl.full((), 0, tl.int64), last - 1
                while first < last:
                    middle_id = (first + last) >> 1
                    number = tl.full((), 0, tl.int64)
                    for start in range(0, end, TILE):
                        value, ids, scaled, weight, its_bucket = _look(
                            x, listed, listed_ids, start + lane, end, is_listed, peak, heat
                        )
                        is_in = (its_bucket >= p_first) & (its_bucket <= p_last) & (value >= least_logit)
                        is_in = is_in & (_scaled_key(scaled) == low) & (weight > 0) & (ids <= middle_id)
                        number += tl.sum(is_in.to(tl.int64), 0)
                    is_enough = number >= needed
                    last = tl.where(is_enough, middle_id, last)
                    first = tl.where(is_enough, first, middle_id + 1)
    tl.store(least + row * 2, least_logit)
    tl.store(least + row * 2 + 1, least_scaled)
    tl.store(last_id + row, last)


@triton.jit
def _scaled_key(scaled):
    """Whole numbers that are lower the likelier a token is: scaled logits are 0 or below."""
    return (scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _kept_weights(x, at, size, row, peak, heat, least, last_id, min_p):
    """The weights of tokens after top-k, top-p and min-p; of what is no token, 0."""
    value = tl.load(x + at, mask=at < size, other=-_INFINITY).to(tl.float32)
    scaled = _scale(value, peak, heat)
    relative = _exp(scaled)
    if least is not None:
        least_scaled = tl.load(least + row * 2 + 1)
        is_level = (scaled == least_scaled) & (at <= tl.load(last_id + row))
        is_kept = (value >= tl.load(least + row * 2)) & ((scaled > least_scaled) | is_level)
        relative = tl.where(is_kept, relative, 0.0)
    if min_p is not None:
        relative = tl.where(relative < tl.load(min_p + row), 0.0, relative)
    return _weight(relative)


@triton.jit(do_not_specialize=["splits", "each"])
def _sums_kernel(
    x, x_stride, size, highest, temperature, least, last_id, min_p, sums, tiles, splits, each, TILE: tl.constexpr
):
    """The weight of each tile of each row that is drawn."""
    program = tl.program_id(0)
    row = program // splits
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    if _is_drawn(peak, heat):
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
):
    """The token at which the random number points, among the weights laid side by side in the order of the ids."""
    row = tl.program_id(0)
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    token = tl.where(heat == 0.0, tl.load(likeliest + row), 0)
    if _is_drawn(peak, heat):
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
def _uniforms_kernel(seeds, positions, found, count, BLOCK: tl.constexpr):
    """SplitMix64 with a start that is itself mixed; its upper 53 bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + at, mask=at < count, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions + at, mask=at < count, other=0).to(tl.uint64, bitcast=True)
    start = _mix(seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15)
    bits = _mix(start + (position + 1) * 0x9E3779B97F4A7C15) >> 11
    # A number below 2**53, which int64 holds as well.
    tl.store(found + at, bits.to(tl.int64).to(tl.float64) * (2.0**-53), mask=at < count)
