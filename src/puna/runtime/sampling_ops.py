"""Choosing a token from each row of logits, as functions on tensors: highest, top-k, truncated and random choice.

R rows, V vocabulary, C columns that are still in play. A row's result never depends on the rows beside it, to the bit:
probabilities are summed as integers, where the order of addition does not matter, and everything else is element-wise.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.ops import cpu

# A weight is exp(logit - highest logit) in units of 2**-35. The sum of 2**18 of them is below 2**53, which a float64
# holds exactly; tokens 24 nats below the likeliest weigh nothing, together less than 1e-5 of it.
WEIGHT_BITS: Final = 35
# One pass finds each block's highest logit at memory speed, and only the few blocks that matter are looked into.
BLOCK: Final = 64
# To find a nucleus, rows up to this long are sorted; in longer ones the highest few are, and if those do not hold
# enough, the bucket in which it ends. A stable sort of 128k floats takes 25 ms on one core, the buckets 2 ms, the few
# 0.5 ms. A language model's nucleus of 0.9 at temperature 1 mostly has less than a hundred tokens.
SORTED_COLUMNS: Final = 4096
SORTED_FIRST: Final = 128
# On GPUs: up to here the highest are found one after another, 2 us each; a row is sorted in less than twice that.
LOOKED_UP_ON_GPU: Final = 256

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Shaping:
    """How the rows of a chunk are drawn; each tensor is [R, 1], or None where no row asks for that step.

    temperature: float32, above 0. top_k: int64 in 1..V. top_p, typical_p: float64. min_p: float32. Neutral values, for
    rows that do not ask: V, 1, 1, 0. `highest_top_k` is the maximum among rows that ask. `is_narrow`: all rows ask
    for a top_k, small enough that looking into a few blocks is quicker than going over the whole row.
    """

    temperature: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    typical_p: Tensor | None = None
    highest_top_k: int = 0
    is_narrow: bool = False


def is_narrow_top_k(k: int, vocab_size: int) -> bool:
    """Whether the blocks that can hold the k highest of a row are few enough to be worth picking out."""
    return 0 < 2 * k * BLOCK <= vocab_size


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The random number in [0, 1) of each (seed, output position): a counter-based stream, so there is no state.

    SplitMix64 (Steele, Lea & Flood, 2014) with a start that is itself mixed, so that the streams of seeds 0, 1, 2 ...
    are unrelated; its upper 53 bits.
    """
    start = _mix(seeds * np.uint64(0xD1342543DE82EF95) + _GOLDEN)
    bits = _mix(start + (positions + np.uint64(1)) * _GOLDEN) >> np.uint64(11)
    found: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return found


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@functools.cache
def has_triton() -> bool:
    """Whether CUDA tensors have kernels for this; torch does it without them, waiting for the device in between."""
    return importlib.util.find_spec("triton") is not None


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest id of the highest logit of each row of [R, V], and that logit -> int64 [R], float32 [R].

    A row with a NaN gives NaN as its highest. (torch.argmax promises the first of equals too, but takes ten times as
    long on CPU.)
    """
    if logits.device.type == "cpu" and cpu.compiled():
        return cpu.argmax(logits)
    if logits.is_cuda and has_triton():
        from puna.ops import triton_argmax

        return triton_argmax.argmax(logits)
    block = _by_block(logits, BLOCK, torch.amax).argmax(dim=1, keepdim=True)
    values, ids = _look_into(logits, block, BLOCK)
    place = values.argmax(dim=1, keepdim=True)
    return ids.gather(1, place).squeeze(1), values.gather(1, place).squeeze(1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of [R, V], highest first, the lower id first among equals -> values, ids [R, k].

    Where fewer than k are above -inf, the rest have the value -inf and ids without meaning.
    """
    k = min(k, logits.shape[1])
    if logits.is_cuda and has_triton() and k <= LOOKED_UP_ON_GPU:
        from puna.ops import triton_logprobs

        return triton_logprobs.top_k(logits, k)
    if not is_narrow_top_k(k, logits.shape[1]):
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    values, ids = _narrow(logits, torch.full((len(logits), 1), k, device=logits.device), k)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order)[:, :k]


def draw(logits: Tensor, shaping: Shaping, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A random token for each row of logits [R, V], and the row's highest logit -> int64 [R], float32 [R].

    The order is that of transformers: temperature, top-k, top-p, min-p, typical-p. Tokens that are left are laid side
    by side in the order of their ids, and uniform (float64 [R], in [0, 1)) says where among them to point. A row whose
    highest logit is not finite gets some id without meaning.

    top-k keeps ties with the k-th, as transformers does. Of equally likely tokens at the end of the nucleus, top-p
    keeps those with the lowest ids.
    """
    if shaping.typical_p is None:
        optional = (shaping.top_k, shaping.top_p, shaping.min_p)
        top_k, top_p, min_p = (None if column is None else column.squeeze(1) for column in optional)
        if logits.device.type == "cpu" and cpu.compiled():
            return cpu.draw(logits, shaping.temperature.squeeze(1), top_k, top_p, min_p, uniform)
        if logits.is_cuda and has_triton():
            from puna.ops import triton_sampling

            return triton_sampling.draw(logits, shaping.temperature.squeeze(1), top_k, top_p, min_p, uniform)
    ids: Tensor | None = None
    if shaping.is_narrow and shaping.top_k is not None:
        logits, ids = _narrow(logits, shaping.top_k, shaping.highest_top_k)
    highest = logits.amax(dim=1, keepdim=True)
    # From the highest downwards, so that nothing overflows however low the temperature.
    scaled = (logits - highest).div_(shaping.temperature)
    if shaping.top_k is not None:
        k = min(shaping.highest_top_k, logits.shape[1])
        lowest = logits.topk(k, dim=1).values.gather(1, shaping.top_k.clamp(max=k) - 1)
        # The neutral V must not cut at the k-th.
        lowest.masked_fill_(shaping.top_k > k, -torch.inf)
        scaled.masked_fill_(logits < lowest, -torch.inf)
    relative = scaled.exp()
    weights = (relative * 2.0**WEIGHT_BITS).to(torch.int64)
    if shaping.top_p is not None:
        weights = _keep_nucleus(scaled, weights, shaping.top_p)
    if shaping.min_p is not None:
        weights.masked_fill_(relative < shaping.min_p, 0)
    if shaping.typical_p is not None:
        weights = _keep_typical(scaled, relative, weights, shaping.typical_p)
    place = _point(weights, uniform.unsqueeze(1))
    return (place if ids is None else ids.gather(1, place)).squeeze(1), highest.squeeze(1)


def _point(weights: Tensor, uniform: Tensor) -> Tensor:
    """The column in which the fraction `uniform` [R, 1] of each row's weight lies -> int64 [R, 1].

    Its weight is above 0 in every row with any: the first column whose running sum exceeds a number below the total.
    """
    sums = _by_block(weights, BLOCK, torch.sum)
    ends = sums.cumsum(dim=1)
    total = ends[:, -1:]
    # Rounding may reach the total itself.
    aim = torch.minimum((total.double() * uniform).floor_().to(torch.int64), total - 1)
    block = (ends <= aim).sum(dim=1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    inside, columns = _look_into(weights, block, BLOCK)
    inside_ends = inside.cumsum(dim=1) + (ends - sums).gather(1, block)
    place = (inside_ends <= aim).sum(dim=1, keepdim=True).clamp_(max=BLOCK - 1)
    return columns.gather(1, place).clamp_(max=weights.shape[1] - 1)


def _keep_nucleus(scaled: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """weights [R, C], 0 outside of the fewest likeliest tokens that hold top_p of it (Holtzman et al., 2019)."""
    target = (weights.sum(dim=1, keepdim=True).double() * top_p).ceil_().to(torch.int64)
    return _keep_highest(scaled, weights, target)


def _keep_typical(scaled: Tensor, relative: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """weights [R, C], 0 outside of the tokens whose surprise is nearest to the entropy (Meister et al., 2022).

    |-log p - H| is |mean of scaled - scaled|: the logarithm of the total cancels. Ties with the last one stay.
    """
    total = weights.sum(dim=1, keepdim=True).double()
    moments = (relative * scaled).mul_(2.0**WEIGHT_BITS).masked_fill_(weights == 0, 0).to(torch.int64)
    mean = moments.sum(dim=1, keepdim=True).double() / total
    nearness = (scaled - mean.float()).abs_().neg_()
    kept = _keep_highest(nearness, weights, (total * mass).ceil_().to(torch.int64))
    farthest = nearness.masked_fill(kept == 0, 0).amin(dim=1, keepdim=True)
    return weights.masked_fill(nearness < farthest, 0)


def _keep_highest(x: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """weights [R, C], 0 outside of the highest of x, as many as it takes to `target` [R, 1] of weight.

    x is float32, 0 or below. Among equals the lowest ids come first. Which of the three ways is taken changes nothing.
    """
    if weights.shape[1] <= SORTED_COLUMNS:
        return weights * _is_before(x, weights, target)
    highest, ids = _narrow(x, torch.full_like(target, SORTED_FIRST), SORTED_FIRST)
    # What is not among the highest, and is here because of its neighbours, counts for nothing.
    is_outside = highest < highest.topk(min(SORTED_FIRST, highest.shape[1]), dim=1).values[:, -1:]
    ids = ids.clamp_(max=weights.shape[1] - 1)
    highest_weights = weights.gather(1, ids).masked_fill_(is_outside | highest.isinf(), 0)
    if bool((highest_weights.sum(dim=1, keepdim=True) >= target).all()):
        highest_weights *= _is_before(highest, highest_weights, target)
        return torch.zeros_like(weights).scatter_add_(1, ids, highest_weights)
    return _keep_by_buckets(x, weights, target)


def _keep_by_buckets(x: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """_keep_highest where that may be thousands: only the bucket in which the target lies is sorted."""
    # The upper half of a float's bits is in the order of the floats: 128 buckets for each power of two.
    bucket = (x.abs().view(torch.int32) >> 16).to(torch.int64)
    held = weights.new_zeros(len(weights), 1 << 15).scatter_add_(1, bucket, weights)
    ends = held.cumsum(dim=1)
    edge = (ends < target).sum(dim=1, keepdim=True).clamp_(max=held.shape[1] - 1)
    target = target - (ends - held).gather(1, edge)
    row, column = (bucket == edge).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(weights))
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    edge_x = x.new_full((len(weights), int(counts.max())), -torch.inf)
    edge_x[row, slot] = x[row, column]
    edge_weights = torch.zeros_like(edge_x, dtype=torch.int64)
    edge_weights[row, slot] = weights[row, column]
    edge_weights *= _is_before(edge_x, edge_weights, target)
    kept = weights.masked_fill(bucket >= edge, 0)
    kept[row, column] = edge_weights[row, slot]
    return kept


def _is_before(x: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """bool [R, C]: tokens before which, highest first, less than `target` [R, 1] of the weight lies."""
    order = x.sort(dim=1, descending=True, stable=True).indices
    sorted_weights = weights.gather(1, order)
    is_kept = sorted_weights.cumsum(dim=1) - sorted_weights < target
    return torch.zeros_like(is_kept).scatter_(1, order, is_kept)


def _narrow(logits: Tensor, counts: Tensor, highest_count: int) -> tuple[Tensor, Tensor]:
    """The columns of [R, V] in which the counts [R, 1] highest are, with all ties -> values, ids [R, C], ids ascending.

    Other columns may be among them. `highest_count` is the maximum of counts.
    """
    ids: Tensor | None = None
    # Twice, since C of the first is 64 columns for each one wanted.
    for size in (BLOCK, 8):
        peaks = _by_block(logits, size, torch.amax)
        k = min(highest_count, peaks.shape[1])
        # At least `counts` logits are as high as the block with that rank; -inf is never wanted.
        bound = peaks.topk(k, dim=1).values.gather(1, counts.clamp(max=k) - 1).clamp_(min=torch.finfo(peaks.dtype).min)
        if k < highest_count:
            bound.masked_fill_(counts > k, torch.finfo(peaks.dtype).min)
        num_blocks = max(1, int((peaks >= bound).sum(dim=1).max()))
        blocks = peaks.topk(num_blocks, dim=1).indices.sort(dim=1).values
        logits, places = _look_into(logits, blocks, size)
        ids = places if ids is None else ids.gather(1, places)
    if ids is None:
        raise RuntimeError("no block size to narrow by")
    return logits, ids


def _by_block(x: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Each block of `size` columns of [R, C] reduced to one; the last block may be shorter."""
    whole = x.shape[1] // size * size
    parts = reduce(x[:, :whole].reshape(len(x), whole // size, size), dim=2)
    return parts if whole == x.shape[1] else torch.cat((parts, reduce(x[:, whole:], dim=1, keepdim=True)), dim=1)


def _look_into(x: Tensor, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The columns of the given blocks [R, N] -> values, columns [R, N * size]; past the end -inf, or 0 of integers."""
    columns = (blocks.unsqueeze(2) * size + torch.arange(size, device=x.device)).flatten(1)
    values = x.gather(1, columns.clamp(max=x.shape[1] - 1))
    nothing = -torch.inf if x.is_floating_point() else 0
    return values.masked_fill_(columns >= x.shape[1], nothing), columns
