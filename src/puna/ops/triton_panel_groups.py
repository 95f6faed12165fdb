"""Few rows of many experts times their weights in int8 and int4 panels, in one launch: triton_linear's way for groups.

Codes are multiplied as they are, exact in bfloat16, and the sums of each group by its scale, so that nothing is
rounded but sums; what there are rows for is read once, at the rate of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.panels import BLOCK, LANES, Panels
from puna.ops.triton_grouped import Groups, chosen, expert_of, most_tiles, panel_words
from puna.ops.triton_linear import Tile
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_panels import panel_sums, tile_rows
from puna.ops.triton_pointwise import activate
from puna.ops.triton_rounding import rounded
from puna.ops.triton_sizes import cdiv, power_of_two


@triton.jit
def panel_groups_kernel(  # type: ignore[no-untyped-def]
    x,
    weights,  # int32 words of each expert's panels
    y,
    order,
    starts,
    x_stride,
    E,
    N,  # columns of y
    blocks,  # of 32 inputs
    panels,  # in all
    second,  # how many panels after the first one of a program the next one is
    magic,  # see centred_codes
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """What triton_grouped's kernel computes; R = 2 runs of P panels are gates and ups."""
    await_turn(OVERLAP)
    expert, begin, end = expert_of(tl.program_id(0), starts, EXPERTS, EXPERTS_BLOCK, BLOCK_T)
    if begin >= end:
        return
    first = tl.program_id(1) * (P if ACTIVATION != "" else P * R)
    # Rows past the last one are computed from it and not stored.
    source = tl.minimum(begin + tile_rows(BLOCK_T), end - 1)
    if ACTIVATION != "":
        source = tl.load(order + source) // TOP
    result = panel_sums(
        x + source.to(tl.int64) * x_stride,
        chosen(weights, expert, EXPERTS),
        E,
        blocks,
        first,
        second,
        panels,
        magic,
        BITS=BITS,
        GROUPS=GROUPS,
        MINIMUMS=MINIMUMS,
        DTYPE=DTYPE,
        PARTS=PARTS,
        EVEN=EVEN,
        S=S,
        R=R,
        BLOCK_T=BLOCK_T,
        UNROLL=UNROLL,
        P=P,
    )
    row = begin + tl.arange(0, BLOCK_T)
    if ACTIVATION == "":
        m = tl.arange(0, 32 * P * R)
        panel = first + m // (32 * R) + m // 32 % R * second
        target = tl.load(order + tl.minimum(row, end - 1))
    else:
        m = tl.arange(0, 32 * P)
        panel = first + m // 32
        gate, up = tl.split(tl.permute(tl.reshape(result, (P, 2, 32, BLOCK_T)), (0, 2, 3, 1)))
        gate, up = tl.reshape(gate, (32 * P, BLOCK_T)), tl.reshape(up, (32 * P, BLOCK_T))
        result = activate(gate, ACTIVATION) * up
        target = row
    column = (panel * 32 + m % 8 * 4 + m % 32 // 8)[:, None]
    inside = (row < end)[None, :] & (column < N)
    tl.store(y + target.to(tl.int64)[None, :] * N + column, rounded(result, y.dtype.element_ty), mask=inside)


def multiply_panels(
    x: Tensor, weights: Sequence[Panels], groups: Groups, tile: Tile, activation: str, dtype: torch.dtype
) -> Tensor:
    """triton_grouped.multiply for panels, in a tile of triton_linear's."""
    first = weights[0]
    form, inputs = first.format, first.inputs
    columns = first.outputs // 2 if activation else first.outputs
    pairs = groups.order.numel()
    y = torch.empty(pairs, columns, dtype=dtype, device=x.device)
    count = first.data.shape[0]
    half = x.dtype == torch.float16
    grid = (most_tiles(pairs, groups.experts, tile.rows), cdiv(count, tile.panels))
    panel_groups_kernel[grid](
        x,
        panel_words(weights),
        y,
        groups.order,
        groups.starts,
        x.stride(0),
        inputs,
        columns,
        -(-inputs // BLOCK),
        count,
        columns // LANES if activation else tile.beside,
        0x64006400 if half else 0x43004300,
        EXPERTS=groups.experts,
        EXPERTS_BLOCK=power_of_two(groups.experts),
        TOP=groups.experts_per_token,
        ACTIVATION=activation,
        BITS=form.bits,
        GROUPS=BLOCK // form.group_size,
        MINIMUMS=form.minimums,
        DTYPE=tl.float16 if half else tl.bfloat16,
        PARTS=3 if x.dtype == torch.float32 else 1,
        EVEN=inputs % (BLOCK * tile.runs) == 0,
        S=tile.runs,
        P=tile.beside,
        R=tile.stacked,
        BLOCK_T=tile.rows,
        UNROLL=max(1, tile.unroll * 4 // form.bits),
        num_warps=tile.warps,
        **launch_options(),
    )
    return y
