# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The highest logit of each row on GPUs, and how rows of logits are cut among programs.

R rows, V vocabulary. Nothing waits for the device or depends on values on the host.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.triton_device import multiprocessors
from puna.ops.triton_overlap import await_turn, launch_options
from puna.ops.triton_sizes import cdiv, power_of_two

# Columns that a program looks at in one go: 16 numbers a thread in four loads of 16 bytes, 8 KB on their way per block;
# Little's law asks for 20 to 30 KB a multiprocessor (4.3 TB/s x 0.8 us / 132), and eight blocks or more are resident.
TILE: Final = 2048
WARPS: Final = 4
# Programs per multiprocessor that are worth cutting rows for.
_PROGRAMS: Final = 8
_INFINITY = tl.constexpr(float("inf"))


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
            logits,
            logits.stride(0),
            size,
            ids,
            highest,
            1,
            each,
            TILE=TILE,
            num_warps=WARPS,
            enable_fp_fusion=False,
            **launch_options(),
        )
        return ids, highest
    part_ids = torch.empty((rows, splits), dtype=torch.int64, device=logits.device)
    part_highest = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    _peaks_kernel[(rows * splits,)](
        logits, logits.stride(0), size, part_ids, part_highest, splits, each, TILE=TILE, num_warps=WARPS,
        enable_fp_fusion=False,
        **launch_options(),
    )  # fmt: skip
    _join_peaks_kernel[(rows,)](
        part_ids, part_highest, ids, highest, splits, PARTS=power_of_two(splits), num_warps=1, **launch_options()
    )
    return ids, highest


def rows_of(logits: Tensor) -> Tensor:
    """The logits with each row in one piece; raises ValueError for what is no matrix of floats."""
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}: give float32, bfloat16 or float16 [R, V]")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def split(rows: int, size: int, device: torch.device) -> tuple[int, int]:
    """Programs that a row is cut among, and tiles of TILE columns for each of them: none without one."""
    tiles = cdiv(size, TILE)
    each = cdiv(tiles, max(1, min(tiles, multiprocessors(device) * _PROGRAMS // rows)))
    return cdiv(tiles, each), each


# What differs from one number of rows to the next is not compiled in: a kernel for all is enough.
@triton.jit(do_not_specialize=["splits", "each"])
def _peaks_kernel(x, x_stride, size, ids, highest, splits, each, TILE: tl.constexpr, OVERLAP: tl.constexpr = False):
    await_turn(OVERLAP)
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
def _join_peaks_kernel(
    part_ids, part_highest, ids, highest, splits, PARTS: tl.constexpr, OVERLAP: tl.constexpr = False
):
    await_turn(OVERLAP)
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    value = tl.load(part_highest + row * splits + part, mask=part < splits, other=-_INFINITY)
    has_nan = tl.max((value != value).to(tl.int32), 0) > 0
    top = tl.max(tl.where(value != value, -_INFINITY, value), 0)
    # Parts are in the order of the ids.
    first = tl.min(tl.where((value == top) & (part < splits), part, splits - 1), 0)
    tl.store(ids + row, tl.load(part_ids + row * splits + first))
    tl.store(highest + row, tl.where(has_nan, float("nan"), top))
