"""Mixtral's experts on GPUs: the choice of experts, sorting by expert, two grouped matmuls, and the weighted sum.

Shapes depend on numbers of tokens alone and nothing is read back to the host, so all of it is captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.panels import Panels
from puna.ops.scaled import InputScaling, ScaledWeight
from puna.ops.triton_grouped import Groups, Tile, multiply
from puna.ops.triton_linear import Tile as PanelTile
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_panel_groups import multiply_panels
from puna.ops.triton_pointwise import ACTIVATIONS, quantize_rows
from puna.ops.triton_rounding import rounded
from puna.ops.triton_sizes import cdiv, power_of_two

# Experts whose addresses fit a kernel's arguments (4 KB) twice, with those of their scales.
_MOST_EXPERTS: Final = 128
# Tokens whose experts one block can choose and sort in registers.
_FEW_TOKENS: Final = 256
_CHUNK: Final = 1024


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits,
    row,
    tokens,
    stride,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOP: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The weights float32 and experts int32 [ROWS, TOP_BLOCK] of tokens, the best first; of equals the lower index."""
    expert = tl.arange(0, EXPERTS_BLOCK)
    inside = (row < tokens)[:, None] & (expert < EXPERTS)[None, :]
    x = tl.load(logits + row.to(tl.int64)[:, None] * stride + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.where((expert < EXPERTS)[None, :], x, -float("inf"))
    odds = tl.exp(x - tl.max(x, axis=1)[:, None])
    left = odds / tl.sum(odds, axis=1)[:, None]
    place = tl.arange(0, TOP_BLOCK)
    weights = tl.zeros((ROWS, TOP_BLOCK), dtype=tl.float32)
    experts = tl.zeros((ROWS, TOP_BLOCK), dtype=tl.int32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for i in tl.static_range(TOP):
        # Of NaN any expert is the best, but one that exists.
        best = tl.minimum(tl.argmax(left, axis=1), EXPERTS - 1)
        weight = tl.sum(tl.where(expert[None, :] == best[:, None], left, 0.0), axis=1)
        weights = tl.where((place == i)[None, :], weight[:, None], weights)
        experts = tl.where((place == i)[None, :], best[:, None], experts)
        left = tl.where(expert[None, :] == best[:, None], -1.0, left)
        total += weight
    return weights / total[:, None], experts


@triton.jit
def route_kernel(  # type: ignore[no-untyped-def]
    logits,
    weights,
    indices,
    order,
    starts,
    tokens,
    stride,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOP: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SORT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """The experts of ROWS tokens; with SORT, of all tokens, and each block writes its expert's part of `order`."""
    await_turn(OVERLAP)
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    if not SORT:
        row += program * ROWS
    chosen_weights, chosen = _choose(logits, row, tokens, stride, EXPERTS, EXPERTS_BLOCK, TOP, TOP_BLOCK, ROWS)
    place = tl.arange(0, TOP_BLOCK)
    pair = row[:, None] * TOP + place[None, :]
    inside = (row < tokens)[:, None] & (place < TOP)[None, :]
    # With SORT every block has chosen for all tokens, and one writes it down.
    written = inside & (program == 0) if SORT else inside
    tl.store(weights + pair, chosen_weights, mask=written)
    tl.store(indices + pair, chosen.to(indices.dtype.element_ty), mask=written)
    if SORT:
        experts = tl.reshape(tl.where(inside, chosen, EXPERTS), (ROWS * TOP_BLOCK,))
        start = tl.sum((experts < program).to(tl.int32), axis=0)
        own = experts == program
        at = start + tl.cumsum(own.to(tl.int32), axis=0) - 1
        tl.store(order + at, tl.reshape(pair, (ROWS * TOP_BLOCK,)), mask=own)
        _store_starts(starts, program, start, tokens * TOP, EXPERTS)


@triton.jit
def _store_starts(starts, expert, start, pairs, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(starts + expert, start)
    if expert == EXPERTS - 1:
        tl.store(starts + EXPERTS, pairs)


@triton.jit
def sort_kernel(  # type: ignore[no-untyped-def]
    indices, order, starts, pairs, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr = False
):
    """A block for each expert, which finds its pairs in ascending order."""
    await_turn(OVERLAP)
    expert = tl.program_id(0)
    at = tl.arange(0, CHUNK)
    before = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in range(0, pairs, CHUNK):
        found = tl.load(indices + first + at, mask=first + at < pairs, other=EXPERTS)
        before += (found < expert).to(tl.int32)
    start = tl.sum(before, axis=0)
    _store_starts(starts, expert, start, pairs, EXPERTS)
    for first in range(0, pairs, CHUNK):
        found = tl.load(indices + first + at, mask=first + at < pairs, other=EXPERTS)
        own = (found == expert).to(tl.int32)
        tl.store(order + start + tl.cumsum(own, axis=0) - 1, first + at, mask=own > 0)
        start += tl.sum(own, axis=0)


@triton.jit
def weighted_sum_kernel(  # type: ignore[no-untyped-def]
    x, weights, y, SIZE: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr = False
):
    """y[token] = the sum of x[token, place] * weights[token, place] in the order of places, in float32."""
    await_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(TOP):
        part = tl.load(x + (token * TOP + i) * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
        total += part * tl.load(weights + token * TOP + i)
    tl.store(y + token * SIZE + column, rounded(total, y.dtype.element_ty), mask=column < SIZE)


def route_experts(router_logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """reference.route_experts; of equally probable experts the lower index comes first."""
    weights, indices, _ = _route(router_logits, experts_per_token, torch.int64, sort=False)
    return weights, indices


def experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[Tensor | ScaledWeight],
    proj: Sequence[Tensor | ScaledWeight],
    experts_per_token: int,
    activation: str,
    *,
    deterministic: bool = False,
) -> Tensor:
    """reference.experts; the tile depends on the number of rows, but in deterministic mode."""
    tiles = _tiles(router_logits, experts_per_token, gate_up[0], deterministic)
    return _experts(x, router_logits, gate_up, proj, experts_per_token, activation, tiles)


def panel_experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[Panels],
    proj: Sequence[Panels],
    experts_per_token: int,
    activation: str,
    *,
    deterministic: bool = False,
) -> Tensor:
    """reference.panel_experts; the tile depends on the number of rows, but in deterministic mode. With many rows,
    weights are rounded to x's dtype."""
    tiles = _DETERMINISTIC_PANELS if deterministic else _panel_tiles(router_logits, experts_per_token)
    return _experts(x, router_logits, gate_up, proj, experts_per_token, activation, tiles)


# The tiles of the gated matmul, which has two sets of sums, and of the one after it. With few rows an expert they read
# weights at the rate of memory: 16 rows is the least that tensor cores take, and 32 outputs make 896 and 256 blocks for
# two experts of Mixtral, of which a multiprocessor has 3 and 2 at once, with 48 and 40 KB of weights on their way each
# (37 KB in all is what the bandwidth needs). From 64 rows on they are Hopper's own instructions; 128 x 256 sums are
# half of the registers.
_FEW: Final = (Tile(16, 32, 256, warps=4, stages=4), Tile(16, 32, 256, warps=4, stages=6))
_SOME: Final = (Tile(64, 64, 128, warps=4, stages=4), Tile(64, 128, 128, warps=4, stages=4))
_MANY: Final = (Tile(128, 128, 128, warps=8, stages=4), Tile(128, 256, 128, warps=8, stages=4))
# Where sums are scaled block by block, or weights unpacked in registers, these must hold more than the sums.
_SOME_MIXED: Final = (Tile(64, 64, 128, warps=8, stages=4), Tile(64, 128, 128, warps=8, stages=4))
_MANY_MIXED: Final = (Tile(128, 64, 128, warps=8, stages=4), Tile(128, 128, 128, warps=8, stages=4))

# Of few rows times panels, by the most rows an expert; triton_linear has what the numbers mean.
_PANELS: Final = (
    (2, (PanelTile(8, 2, 8, 2), PanelTile(8, 1, 8, 4))),
    (8, (PanelTile(16, 2, 4, 1, 2), PanelTile(16, 1, 4, 2, 2))),
    (48, (PanelTile(32, 2, 2, 1, 2), PanelTile(32, 1, 2, 2, 4))),
)
_DETERMINISTIC_PANELS: Final = (PanelTile(16, 2, 8, 1), PanelTile(16, 1, 8, 2))

_Tiles = tuple[Tile, Tile] | tuple[PanelTile, PanelTile]


def _has_blocks(weight: Tensor | ScaledWeight) -> bool:
    return isinstance(weight, ScaledWeight) and weight.has_blocks


def _tiles(logits: Tensor, experts_per_token: int, weight: Tensor | ScaledWeight, deterministic: bool) -> _Tiles:
    """The tiles whose rows an expert fills, were tokens evenly spread; up to there reading weights takes longer. In
    deterministic mode the middle ones for any number of rows."""
    if deterministic:
        return _SOME_MIXED if _has_blocks(weight) else _SOME
    rows = logits.shape[0] * experts_per_token / logits.shape[1]
    if rows <= 8:
        return _FEW
    if _has_blocks(weight):
        return _SOME_MIXED if rows <= 96 else _MANY_MIXED
    # float32 has no tensor cores: its operands take registers beside the sums.
    plain_float = isinstance(weight, Tensor) and weight.dtype == torch.float32
    return _SOME if rows <= 96 or plain_float else _MANY


def _panel_tiles(logits: Tensor, experts_per_token: int) -> _Tiles:
    rows = logits.shape[0] * experts_per_token / logits.shape[1]
    return next((tiles for most, tiles in _PANELS if rows <= most), _MANY_MIXED)


def _experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[Tensor | ScaledWeight | Panels],
    proj: Sequence[Tensor | ScaledWeight | Panels],
    experts_per_token: int,
    activation: str,
    tiles: _Tiles,
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: use silu, gelu, gelu_pytorch_tanh or relu")
    if len(gate_up) != router_logits.shape[1] or len(proj) != len(gate_up) or len(gate_up) > _MOST_EXPERTS:
        raise ValueError(
            f"{len(gate_up)} and {len(proj)} weights for {router_logits.shape[1]} experts: there must be as many, and "
            f"at most {_MOST_EXPERTS}"
        )
    tokens, size = x.shape
    if not tokens:
        return torch.empty_like(x)
    x = x if x.stride(1) == 1 and x.stride(0) % 8 == 0 else x.contiguous()
    weights, _, groups = _route(router_logits, experts_per_token, torch.int32, sort=True)
    inner = _multiply(x, gate_up, groups, tiles[0], activation, x.dtype)
    in_panels = isinstance(proj[0], Panels)
    outputs = _multiply(inner, proj, groups, tiles[1], "", torch.float32 if in_panels else x.dtype)
    y = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    block = min(1024, power_of_two(size))
    weighted_sum_kernel[(tokens, cdiv(size, block))](
        outputs, weights, y, SIZE=size, TOP=experts_per_token, BLOCK=block, num_warps=4, **launch_options()
    )
    return y


def _multiply(
    x: Tensor,
    weights: Sequence[Tensor | ScaledWeight | Panels],
    groups: Groups,
    tile: Tile | PanelTile,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    first = weights[0]
    if isinstance(tile, PanelTile):
        panels = [weight for weight in weights if isinstance(weight, Panels)]
        return multiply_panels(x, panels, groups, tile, activation, dtype)
    scaling = InputScaling(blocks=first.has_blocks) if isinstance(first, ScaledWeight) else None
    rows = x if scaling is None else quantize_rows(x, scaling)
    return multiply(rows, weights, groups, tile, activation, dtype)


def _route(logits: Tensor, top: int, dtype: torch.dtype, sort: bool) -> tuple[Tensor, Tensor, Groups]:
    """Weights [T, k], experts [T, k] of `dtype`, and with `sort` the pairs by expert."""
    tokens, experts = logits.shape
    if not 1 <= top <= experts:
        raise ValueError(f"experts_per_token is {top}: it must be from 1 to the {experts} experts")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    weights = torch.empty(tokens, top, dtype=torch.float32, device=logits.device)
    indices = torch.empty(tokens, top, dtype=dtype, device=logits.device)
    order = torch.empty(tokens * top, dtype=torch.int32, device=logits.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=logits.device)
    groups = Groups(order, starts, experts, top)
    if not tokens:
        return weights, indices, groups
    at_once = sort and tokens <= _FEW_TOKENS
    rows = power_of_two(tokens) if at_once else 32
    route_kernel[(experts if at_once else cdiv(tokens, rows),)](
        logits,
        weights,
        indices,
        order,
        starts,
        tokens,
        logits.stride(0),
        EXPERTS=experts,
        EXPERTS_BLOCK=power_of_two(experts),
        TOP=top,
        TOP_BLOCK=power_of_two(top),
        ROWS=rows,
        SORT=at_once,
        num_warps=4,
        **launch_options(),
    )
    if sort and not at_once:
        sort_kernel[(experts,)](
            indices, order, starts, tokens * top, EXPERTS=experts, CHUNK=_CHUNK, num_warps=4, **launch_options()
        )
    return weights, indices, groups
