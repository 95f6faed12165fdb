# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Where top-k and top-p end in rows of logits on GPUs, exactly and without sorting.

A histogram of the weights finds the bucket or two in which they end; the tokens of these are listed, and the list is
gone over again and again. R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.triton_argmax import TILE, split
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_weights import exp, is_drawn, scale, weight_of

# The first look for an edge is a histogram of 1/84 nat steps of the scaled logit: tokens 24.27 nats below the
# likeliest have no weight, and 84 x 24.27 < 2048.
_BUCKETS = tl.constexpr(2048)
_BUCKETS_PER_NAT = tl.constexpr(84.0)
_HISTOGRAM_WARPS: Final = 8
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


def cut(
    logits: Tensor, highest: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What top-k, then top-p leave of each row of logits [R, V], whose highest are given -> float32 [R, 2], int64 [R].

    The lowest logit and the lowest scaled logit of the tokens that are left, and of those level with that scaled logit
    the last id. Rows that are not drawn, or ask for neither, have no bounds. The others as in triton_sampling.draw.
    """
    rows, size = logits.shape
    device, stride = logits.device, logits.stride(0)
    splits, each = split(rows, size, device)
    histogram = torch.zeros((2, rows, _BUCKETS.value), dtype=torch.int64, device=device)
    _histogram_kernel[(rows * splits,)](
        logits, stride, size, highest, temperature, top_k, top_p, histogram[0], histogram[1], splits, each,
        TILE=TILE, num_warps=_HISTOGRAM_WARPS, enable_fp_fusion=False,
        **launch_options(),
    )  # fmt: skip
    least = torch.empty((rows, 2), dtype=torch.float32, device=device)
    last_id = torch.empty(rows, dtype=torch.int64, device=device)
    listed = torch.empty((rows, _LISTED), dtype=logits.dtype, device=device)
    listed_ids = torch.empty((rows, _LISTED), dtype=torch.int32, device=device)
    _cut_kernel[(rows,)](
        logits, stride, size, highest, temperature, top_k, top_p, histogram[0], histogram[1], listed, listed_ids,
        least, last_id, LISTED=_LISTED, LISTING_TILE=_LISTING_TILE, TILE=_CUT_TILE, num_warps=_CUT_WARPS,
        enable_fp_fusion=False,
        **launch_options(),
    )  # fmt: skip
    return least, last_id


@triton.jit
def _bucket(scaled):
    return tl.minimum(-scaled * _BUCKETS_PER_NAT, _BUCKETS - 1.0).to(tl.int32)


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
    x,
    x_stride,
    size,
    highest,
    temperature,
    top_k,
    top_p,
    weights,
    counts,
    splits,
    each,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """The weight, and for top-k the number, of each bucket's tokens; tokens without weight are in none."""
    await_turn(OVERLAP)
    program = tl.program_id(0)
    row = program // splits
    k, p = _limits(row, tl.cast(size, tl.int64), top_k, top_p)
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    if is_drawn(peak, heat) & ((k < size) | (p < 1.0)):
        x += row.to(tl.int64) * x_stride
        weights += row * _BUCKETS
        counts += row * _BUCKETS
        first = program % splits * each
        for tile in range(first, first + each):
            at = tile * TILE + tl.arange(0, TILE)
            value = tl.load(x + at, mask=at < size, other=-_INFINITY).to(tl.float32)
            scaled = scale(value, peak, heat)
            weight = weight_of(exp(scaled))
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
def _scaled_key(scaled):
    """Whole numbers that are lower the likelier a token is: scaled logits are 0 or below."""
    return (scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)


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
    scaled = scale(value, peak, heat)
    return value, ids, scaled, weight_of(exp(scaled)), _bucket(scaled)


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
    OVERLAP: tl.constexpr = False,
):
    """Where top-k and top-p end, exactly: the tokens of the buckets in question are listed, and of their keys the one
    at which the count or the weight is reached is found by halving."""
    await_turn(OVERLAP)
    row = tl.program_id(0)
    k, p = _limits(row, tl.cast(size, tl.int64), top_k, top_p)
    peak, heat = tl.load(highest + row), tl.load(temperature + row)
    least_logit = tl.full((), -_INFINITY, tl.float32)
    least_scaled = tl.full((), -_INFINITY, tl.float32)
    last = tl.cast(size, tl.int64)
    if is_drawn(peak, heat) & ((k < size) | (p < 1.0)):
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
            its_bucket = _bucket(scale(value.to(tl.float32), peak, heat))
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
