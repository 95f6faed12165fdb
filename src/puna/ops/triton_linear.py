"""Linear layers whose weights are int8 or int4 in panels: activations stay as they are, sums are in float32.

One kernel, in tiles for 8 to 64 rows of x, multiplies codes as they are, which are exact in bfloat16, on tensor cores,
and the sums of each group by its scale: nothing is rounded but sums. For many rows the whole weight is written out and
multiplied by torch (cuBLAS). docs/gpu.md has the counts behind the choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from puna.ops import reference, triton_tuning
from puna.ops.panels import BLOCK, LANES, Panels
from puna.ops.triton_device import multiprocessors
from puna.ops.triton_overlap import await_turn, bytes_ahead, launch_options, prefetch, programs_ahead
from puna.ops.triton_panels import dequantize, panel_sums, tile_rows
from puna.ops.triton_pointwise import activate, gated_activation
from puna.ops.triton_rounding import rounded
from puna.ops.triton_sizes import cdiv


@dataclass(frozen=True)
class Tile:
    """One program's share: `rows` of x times `beside` x `stacked` panels of 32 outputs, the inputs in `runs`.

    Each of beside x runs warps multiplies `stacked` panels and every runs-th block of inputs; the warps of one run
    share what they read of x. unroll: blocks of int4 that a warp has between two barriers, of int8 half as many; two
    more such steps are on their way to shared memory.
    """

    rows: int
    stacked: int
    runs: int
    unroll: int
    beside: int = 1

    @property
    def panels(self) -> int:
        return self.beside * self.stacked

    @property
    def warps(self) -> int:
        return self.beside * self.runs


# By name, rows x outputs / runs, since that is what a file of measurements keeps. Pairs are what gated layers need.
TILES: Final = MappingProxyType(
    {
        "8x32/8": Tile(8, 1, 8, 4),
        "8x32/16": Tile(8, 1, 16, 2),
        "8x64/8 pairs": Tile(8, 2, 8, 2),
        "8x128/4 pairs": Tile(8, 2, 4, 2, beside=2),
        "16x32/8": Tile(16, 1, 8, 2),
        "16x32/16": Tile(16, 1, 16, 2),
        "16x64/4": Tile(16, 1, 4, 2, beside=2),
        "16x64/8 pairs": Tile(16, 2, 8, 1),
        "16x128/4 pairs": Tile(16, 2, 4, 1, beside=2),
        "32x64/4": Tile(32, 1, 4, 2, beside=2),
        "32x128/2": Tile(32, 1, 2, 2, beside=4),
        "32x128/2 pairs": Tile(32, 2, 2, 1, beside=2),
        "32x256/1 pairs": Tile(32, 2, 1, 1, beside=4),
        "64x64/4": Tile(64, 1, 4, 1, beside=2),
        "64x128/2": Tile(64, 1, 2, 1, beside=4),
    }
)
# For all numbers of rows alike, in deterministic mode, and the one of gated layers.
_DETERMINISTIC: Final = "16x32/8"
_DETERMINISTIC_GATED: Final = "16x64/8 pairs"
# Where nothing was measured: the first of which there are enough for the multiprocessors, else the last.
_DEFAULTS: Final = MappingProxyType(
    {
        8: ("8x64/8 pairs", "8x32/16"),
        16: ("16x128/4 pairs", "16x64/4", "16x32/16"),
        32: ("32x128/2", "32x64/4"),
        64: ("64x128/2", "64x64/4", "32x64/4"),
    }
)
_GATED_DEFAULTS: Final = MappingProxyType(
    {
        8: ("8x64/8 pairs",),
        16: ("16x128/4 pairs", "16x64/8 pairs"),
        32: ("32x128/2 pairs",),
        64: ("32x128/2 pairs",),
    }
)
_LIBRARY: Final = "library"
# Rows from which on it takes less time to write the weight out and have cuBLAS multiply it (docs/gpu.md).
_MANY_ROWS: Final = 256
# Numbers of a weight that are written out at a time: 128 MiB in bfloat16.
_WRITTEN_OUT: Final = 1 << 26


# T is not specialised: one machine code for all numbers of rows.
@triton.jit(do_not_specialize=["T"])
def panel_kernel(  # type: ignore[no-untyped-def]
    x,  # [T, E]
    words,  # int32, the panels
    bias,  # [N], or unused
    y,  # [T, N], or gated [T, F]
    T,
    E,
    N,  # columns of y
    x_stride,
    blocks,  # of 32 inputs
    panels,  # in all
    second,  # how many panels after the first one of a program the next one is
    magic,  # see centred_codes
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr = 0,  # bytes of each panel, see triton_overlap
    PROGRAMS_AHEAD: tl.constexpr = 0,
    OVERLAP: tl.constexpr = False,
):
    """BLOCK_T rows of x times P R panels: see panel_sums. A gated layer's are R = 2 runs of P panels, gates and ups."""
    first = tl.program_id(1) * (P if ACTIVATION != "" else P * R)
    if AHEAD > 0:
        WORDS: tl.constexpr = 16 * GROUPS * (1 + MINIMUMS) + 32 * BITS
        for r in tl.static_range(R):
            at = first + r * second
            runs = tl.where(tl.program_id(1) < PROGRAMS_AHEAD, tl.minimum(panels - at, P), 0)
            prefetch(words + at.to(tl.int64) * blocks * WORDS, runs, blocks * (4 * WORDS), AHEAD)
    await_turn(OVERLAP)
    # Rows past the last one are computed from it and not stored, which takes no masks.
    t = tl.minimum(tl.program_id(0) * BLOCK_T + tile_rows(BLOCK_T), T - 1)
    result = panel_sums(
        x + t.to(tl.int64) * x_stride,
        words,
        E,
        blocks,
        first,
        second,
        panels,
        magic,
        BITS,
        GROUPS,
        MINIMUMS,
        DTYPE,
        PARTS,
        EVEN,
        S,
        R,
        BLOCK_T,
        UNROLL,
        P,
    )
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    if ACTIVATION == "":
        m = tl.arange(0, 32 * P * R)
        panel = first + m // (32 * R) + m // 32 % R * second
        column = (panel * 32 + m % 8 * 4 + m % 32 // 8)[:, None]
        if HAS_BIAS:
            result += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    else:
        tl.static_assert(R == 2)
        m = tl.arange(0, 32 * P)
        column = ((first + m // 32) * 32 + m % 8 * 4 + m % 32 // 8)[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(result, (P, 2, 32, BLOCK_T)), (0, 2, 3, 1)))
        gate, up = tl.reshape(gate, (32 * P, BLOCK_T)), tl.reshape(up, (32 * P, BLOCK_T))
        if HAS_BIAS:
            gate += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
            up += tl.load(bias + N + column, mask=column < N, other=0.0).to(tl.float32)
        result = activate(gate, ACTIVATION) * up
    inside = (row < T) & (column < N)
    tl.store(y + row.to(tl.int64) * N + column, rounded(result, y.dtype.element_ty), mask=inside)


def panel_linear(
    x: Tensor, panels: Panels, bias: Tensor | None, dtype: torch.dtype, *, deterministic: bool = False
) -> Tensor:
    """reference.panel_linear; which tile is a matter of measurement. Weights in dense panels go to the reference.

    deterministic: in one tile for any number of rows, so that a row's bits do not depend on the others. Raises
    ValueError for dense panels, of which that cannot be had.
    """
    if deterministic:
        if not panels.format.bits:
            raise ValueError(f"{panels.format} on a GPU is not deterministic: keep such weights in rows")
        return launch(x, panels, bias, dtype, TILES[_DETERMINISTIC])
    if not panels.format.bits:
        return reference.panel_linear(x, panels, bias, dtype)
    rows = x.numel() // x.shape[-1]
    variants = [name for name, tile in TILES.items() if _suits(tile, rows)]
    default = _default(_DEFAULTS, rows, panels, x.device)
    if rows > 64 and dtype == x.dtype:  # with another dtype, the library would round twice
        variants.append(_LIBRARY)
        default = _LIBRARY if rows > _MANY_ROWS else default

    def run(variant: str) -> Tensor:
        return _library(x, panels, bias) if variant == _LIBRARY else launch(x, panels, bias, dtype, TILES[variant])

    shape = _shape(rows, panels, x.dtype, dtype)
    return run(triton_tuning.current().choose("panel_linear/1", shape, default, variants, run))


def panel_gated_linear(
    x: Tensor, panels: Panels, bias: Tensor | None, activation: str, *, deterministic: bool = False
) -> Tensor:
    """reference.panel_gated_linear: one kernel where no panel holds both gates and ups, as is nearly always so.

    deterministic: as in panel_linear.
    """
    if not _fuses(panels):
        whole = panel_linear(x, panels, bias, torch.float32, deterministic=deterministic)
        return gated_activation(whole, activation).to(x.dtype)
    if deterministic:
        return launch(x, panels, bias, x.dtype, TILES[_DETERMINISTIC_GATED], activation)
    rows = x.numel() // x.shape[-1]
    variants = [name for name, tile in TILES.items() if tile.stacked == 2 and _suits(tile, rows)]
    default = _default(_GATED_DEFAULTS, rows, panels, x.device)
    if rows > 64:
        variants.append(_LIBRARY)
        default = _LIBRARY if rows > _MANY_ROWS else default

    def run(variant: str) -> Tensor:
        if variant == _LIBRARY:
            return gated_activation(_library(x, panels, bias), activation)
        return launch(x, panels, bias, x.dtype, TILES[variant], activation)

    shape = _shape(rows, panels, x.dtype, x.dtype)
    return run(triton_tuning.current().choose("panel_gated_linear/1", shape, default, variants, run))


def launch(
    x: Tensor, panels: Panels, bias: Tensor | None, dtype: torch.dtype, tile: Tile, activation: str = ""
) -> Tensor:
    """panel_linear, or with an activation panel_gated_linear, in a given tile -> [..., N]."""
    form, inputs = panels.format, panels.inputs
    flat = x.reshape(-1, inputs)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    columns = panels.outputs // 2 if activation else panels.outputs
    y = torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)
    count, blocks = panels.data.shape[0], -(-inputs // BLOCK)
    half = x.dtype == torch.float16
    row_tiles, programs = cdiv(flat.shape[0], tile.rows), cdiv(count, tile.panels)
    if y.numel():
        ahead = bytes_ahead(panels.data, panels.data.nbytes // count, tile.panels, programs) if row_tiles == 1 else 0
        panel_kernel[(row_tiles, programs)](
            flat,
            panels.data.view(torch.int32),
            y if bias is None else bias,
            y,
            flat.shape[0],
            inputs,
            columns,
            flat.stride(0),
            blocks,
            count,
            count // 2 if activation else tile.beside,
            0x64006400 if half else 0x43004300,
            BITS=form.bits,
            GROUPS=BLOCK // form.group_size,
            MINIMUMS=form.minimums,
            DTYPE=tl.float16 if half else tl.bfloat16,
            PARTS=3 if x.dtype == torch.float32 else 1,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            EVEN=inputs % (BLOCK * tile.runs) == 0,
            S=tile.runs,
            P=tile.beside,
            R=tile.stacked,
            BLOCK_T=tile.rows,
            UNROLL=max(1, tile.unroll * 4 // form.bits),
            AHEAD=ahead,
            PROGRAMS_AHEAD=programs_ahead(x.device) if ahead else 0,
            num_warps=tile.warps,
            **launch_options(),
        )
    return y


def _library(x: Tensor, panels: Panels, bias: Tensor | None) -> Tensor:
    """The weight written out in x's dtype, as much of it at a time as keeps memory small, and multiplied by torch."""
    step = max(1, _WRITTEN_OUT // panels.inputs // LANES) * LANES
    parts = []
    for start in range(0, panels.outputs, step):
        stop = min(start + step, panels.outputs)
        part = None if bias is None else bias[start:stop].to(x.dtype)
        parts.append(F.linear(x, dequantize(panels, start, stop - start, x.dtype), part))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _fuses(panels: Panels) -> bool:
    return bool(panels.format.bits) and panels.outputs % (2 * LANES) == 0


def _size(rows: int) -> int:
    """The rows of the tiles for so many."""
    return min(max(triton_tuning.bucket(rows), 8), 64)


def _suits(tile: Tile, rows: int) -> bool:
    """Whether a tile is worth measuring for so many rows."""
    return tile.rows == _size(rows) or (rows > 32 and tile.rows == 32)


def _default(choices: Mapping[int, Sequence[str]], rows: int, panels: Panels, device: torch.device) -> str:
    names = choices[_size(rows)]
    for name in names:
        tile = TILES[name]
        programs = cdiv(rows, tile.rows) * cdiv(panels.data.shape[0], tile.panels)
        if programs >= multiprocessors(device) * 3 // 4:
            return name
    return names[-1]


def _shape(rows: int, panels: Panels, *dtypes: torch.dtype) -> Sequence[int | str]:
    form = panels.format
    kind = f"int{form.bits}-{form.group_size}{'-min' if form.minimums else ''}"
    return (triton_tuning.bucket(rows), panels.outputs, panels.inputs, kind, *map(str, dtypes))
