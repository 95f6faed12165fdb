# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Log-probabilities of chosen tokens and the likeliest of each row, on GPUs: one pass over the logits, and no sorting.

R rows, V vocabulary. Each tile of 2048 columns is summed up by itself, in one order, and the tiles of a row always in
the same order: a row's numbers do not depend on how many rows there are. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.triton_argmax import TILE, rows_of, split
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_sizes import cdiv, power_of_two

_WARPS: Final = 4
_INFINITY = tl.constexpr(float("inf"))


class Logprobs(NamedTuple):
    """Of R rows: the log-probability and the rank of each chosen token, and the k likeliest with theirs, best first.

    own float32 [R]; ranks int64 [R], 1 and one more for each token with a higher logit; top_ids int64 [R, k], the lower
    id first among equals; top_logprobs float32 [R, k]: -inf where fewer than k have a logit above that, with ids that
    mean nothing. All log-probabilities of a row with a NaN or an infinite highest logit are NaN.
    """

    own: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> Logprobs:
    """What is known of the chosen tokens, int64 [R] in 0..V-1, and of the k likeliest of logits [R, V].

    Raises ValueError for tensors of another shape or dtype.
    """
    if token_ids.shape != logits.shape[:1] or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids are {token_ids.dtype} {tuple(token_ids.shape)}: give int64 ({len(logits)},)")
    values, ids, own, ranks, highest, log_sums = _summary(logits, token_ids.contiguous(), k)
    top_logprobs = (values - highest.unsqueeze(1)) - log_sums.unsqueeze(1)
    return Logprobs((own - highest) - log_sums, ranks, ids, top_logprobs)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of [R, V], highest first, the lower id first among equals -> float32, int64 [R, k].

    Takes a look into one tile for each of them, one after another: 2 us of one multiprocessor, so some hundreds are the
    most that is quicker than sorting. Where fewer than k are above -inf, the rest are -inf with ids without meaning.
    """
    values, ids, *_ = _summary(logits, None, k)
    return values, ids


def _summary(logits: Tensor, token_ids: Tensor | None, k: int) -> tuple[Tensor, ...]:
    """The k highest and their ids; the tokens' logits and ranks; the highest and the logarithm of the sum of
    exp(logit - highest)."""
    logits = rows_of(logits)
    rows, size = logits.shape
    if not 0 <= k <= size:
        raise ValueError(f"k is {k}: a row has 0 to {size} likeliest tokens")
    device = logits.device
    values = torch.empty((rows, k), dtype=torch.float32, device=device)
    ids = torch.empty((rows, k), dtype=torch.int64, device=device)
    own, highest, log_sums = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    if rows > 0:
        splits, each = split(rows, size, device)
        tiles = cdiv(size, TILE)
        peaks, sums = (torch.empty((rows, tiles), dtype=torch.float32, device=device) for _ in range(2))
        places, above = (torch.empty((rows, tiles), dtype=torch.int32, device=device) for _ in range(2))
        _tiles_kernel[(rows * splits,)](
            logits, logits.stride(0), size, token_ids, peaks, places, sums, above, tiles, splits, each,
            TILE=TILE, num_warps=_WARPS,
            **launch_options(),
        )  # fmt: skip
        _rows_kernel[(rows,)](
            logits, logits.stride(0), size, token_ids, peaks, places, sums, above, tiles, k, values, ids, own, ranks,
            highest, log_sums, TILE=TILE, TILES=power_of_two(tiles), num_warps=_WARPS,
            **launch_options(),
        )  # fmt: skip
    return values, ids, own, ranks, highest, log_sums


@triton.jit
def _highest(value, at, size):
    """The highest of a tile and its lowest id; NaN counts as nothing here, and makes the sums NaN."""
    peak = tl.max(tl.where(value == value, value, -_INFINITY), 0)
    place = tl.min(tl.where((value == peak) & (at < size), at, size - 1), 0)
    return peak, place


@triton.jit(do_not_specialize=["splits", "each"])
def _tiles_kernel(
    x, x_stride, size, token_ids, peaks, places, sums, above, tiles, splits, each, TILE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    await_turn(OVERLAP)
    program = tl.program_id(0)
    row = program // splits
    x += row.to(tl.int64) * x_stride
    own = tl.full((), _INFINITY, tl.float32)
    if token_ids is not None:
        own = tl.load(x + tl.load(token_ids + row)).to(tl.float32)
    first = program % splits * each
    for tile in range(first, tl.minimum(first + each, tiles)):
        at = tile * TILE + tl.arange(0, TILE)
        value = tl.load(x + at, mask=at < size, other=-_INFINITY).to(tl.float32)
        peak, place = _highest(value, at, size)
        # Of a tile that is ruled out as a whole, -inf minus -inf would be NaN.
        shift = tl.where(peak == -_INFINITY, 0.0, peak)
        tl.store(peaks + row * tiles + tile, peak)
        tl.store(places + row * tiles + tile, place)
        tl.store(sums + row * tiles + tile, tl.sum(tl.exp(value - shift), 0))
        tl.store(above + row * tiles + tile, tl.sum((value > own).to(tl.int32), 0))


@triton.jit(do_not_specialize=["k"])
def _rows_kernel(
    x,
    x_stride,
    size,
    token_ids,
    peaks,
    places,
    sums,
    above,
    tiles,
    k,
    values,
    ids,
    own,
    ranks,
    highest,
    log_sums,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    await_turn(OVERLAP)
    row = tl.program_id(0)
    x += row.to(tl.int64) * x_stride
    tile = tl.arange(0, TILES)
    is_tile = tile < tiles
    peak = tl.load(peaks + row * tiles + tile, mask=is_tile, other=-_INFINITY)
    place = tl.load(places + row * tiles + tile, mask=is_tile, other=0)
    held = tl.load(sums + row * tiles + tile, mask=is_tile, other=0.0)
    best = tl.max(peak, 0)
    # Infinity less infinity would be NaN. A tile with +inf has a sum of NaN already; if all are -inf, the total is 0.
    total = tl.sum(held * tl.exp(tl.where(peak == best, 0.0, peak - best)), 0)
    tl.store(highest + row, best)
    tl.store(log_sums + row, tl.log(total))
    if token_ids is not None:
        tl.store(own + row, tl.load(x + tl.load(token_ids + row)).to(tl.float32))
        number = tl.sum(tl.load(above + row * tiles + tile, mask=is_tile, other=0), 0)
        tl.store(ranks + row, number.to(tl.int64) + 1)
    for rank in range(0, k):
        peak_now = tl.max(peak, 0)
        chosen = tl.min(tl.where((peak == peak_now) & is_tile, tile, tiles - 1), 0)
        id_now = tl.sum(tl.where(tile == chosen, place, 0), 0)
        tl.store(values + row * k + rank, peak_now)
        tl.store(ids + row * k + rank, id_now.to(tl.int64))
        # What comes next in that tile.
        at = chosen * TILE + tl.arange(0, TILE)
        value = tl.load(x + at, mask=at < size, other=-_INFINITY).to(tl.float32)
        is_left = (value < peak_now) | ((value == peak_now) & (at > id_now))
        next_peak, next_place = _highest(tl.where(is_left, value, -_INFINITY), at, size)
        peak = tl.where(tile == chosen, next_peak, peak)
        place = tl.where(tile == chosen, next_place, place)
