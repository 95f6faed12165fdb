"""Overlap: how a kernel starts before the one ahead of it in the stream has ended, and what it may do until then.

Between two kernels of a stream memory idles: the last blocks end, their writes are flushed, the next kernel is
launched, its blocks start, and their first loads are on their way. Hopper has programmatic dependent launch for that
(PTX ISA, griddepcontrol): a kernel that is launched with an attribute may start as soon as all blocks of the one ahead
have started, and waits inside for its end. `await_turn` is that, the first thing in every kernel of ours; `prefetch`
may stand before it, for weights. `launch_options` are what launchers add: nothing, unless whoever runs the model asked
for it (triton_tuning.Tuning.overlaps). The order that holds, and must go on to:

- **A kernel waits before it touches what any kernel writes**, also before it writes itself: the memory of its result
  may be what the kernel ahead still reads, since the allocator gives freed memory out again in the order of the stream.
  Before the wait are only instructions on arguments, and prefetches of weights, which nobody writes while steps run.
- **All blocks wait, with no way out before it.** The wait ends when the kernel ahead has ended and its writes are
  visible. That the kernels before that one have ended follows only because it has waited for them itself, and so on.
  Were all blocks of a kernel to leave before they wait, as programs do that have nothing to do, it could end before the
  kernels ahead of it, and whoever waits for it would read too early.
- **The next kernel is called first, not last.** It starts only when every block of this one has started or ended, so it
  never takes the place of a block that something waits for: the first kernel that has not ended has all its blocks on
  the device, or nothing behind it has any, and nothing can be stuck. The earlier the call, the more kernels stand in
  line: small ones, and behind them a product that prefetches meanwhile. It costs the registers and shared memory of
  blocks that wait; and two blocks may share a multiprocessor while another one has none, because that was still full
  when they came. Whether this is worth it, only a measurement can say.
- **Other work keeps its order.** Kernels of torch and cuBLAS are launched without the attribute: they start when our
  last kernel has ended, which implies all before it. Behind one of them, ours may start when its blocks are gone, and
  waits for its writes. Copies, fills, records of events and waits for other streams come after the end of what was
  queued before them; the attribute means nothing behind one of these.
- **Graphs** keep it: the pair of kernels gets a programmatic edge where it is captured, and a graph starts after all
  that is ahead of it.
- **Nothing is timed like that**: a kernel that starts before the event that is to time it would look too good, so
  Tuning measures without.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops import triton_tuning
from puna.ops.triton_device import multiprocessors
from puna.ops.triton_rounding import INTERPRETED

# Bytes of a weight that a program asks for before it waits. What is between two products takes one to three
# microseconds, in each of which memory could deliver 4.3 MB, or 33 KB for each multiprocessor. Two microseconds make
# 8.7 MB, a sixth of the L2 cache.
_AHEAD: Final = 32 * 1024
# And where a multiprocessor has one program.
_AHEAD_OF_ONE: Final = 64 * 1024
# Programs of a multiprocessor that prefetch: those that come later have nothing to wait for.
_PROGRAMS_AHEAD: Final = 2


def launch_options() -> dict[str, bool]:
    """What a launch gets beside the kernel's own arguments: `kernel[grid](..., **launch_options())`."""
    return {"OVERLAP": True, "launch_pdl": True} if triton_tuning.current().overlaps else {}


def bytes_ahead(weight: Tensor, length: int, runs: int, programs: int) -> int:
    """How many bytes each of `programs` programs should prefetch of each of its `runs` runs (rows, panels) of a weight,
    which have `length` bytes: 0 where it can't, or where kernels do not start early."""
    if not triton_tuning.current().overlaps or length % 16 or weight.data_ptr() % 16:
        return 0
    most = _AHEAD_OF_ONE if programs <= multiprocessors(weight.device) else _AHEAD
    return min(length, most // runs // 16 * 16)


def programs_ahead(device: torch.device) -> int:
    """Programs that should prefetch, of those that are the first to start."""
    return _PROGRAMS_AHEAD * multiprocessors(device)


@triton.jit
def await_turn(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first statement of every kernel; see above: the next one may start, and behind this all before has ended.

    Clobbers keep compilers from moving loads and stores across; tests/triton/test_overlap.py reads the machine code.
    """
    if OVERLAP and not INTERPRETED:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r,~{memory}", [], tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r,~{memory}", [], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prefetch(first, runs, stride, size):  # type: ignore[no-untyped-def]
    """Asks the L2 cache for the first `size` bytes of each of `runs` runs of a weight, `stride` bytes apart.

    Only before `await_turn`, and only weights. Addresses, strides and sizes are multiples of 16, and there are no more
    runs than threads. Each is one instruction of one thread; they are dealt out to the warps in turn, since those of a
    warp go one after another.
    """
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred wanted, some;
            .reg .b32 run, warp, lane, warps;
            .reg .b64 at;
            mov.u32 warps, %ntid.x;
            shr.u32 warps, warps, 5;
            mov.u32 run, %tid.x;
            shr.u32 warp, run, 5;
            and.b32 lane, run, 31;
            mad.lo.u32 run, lane, warps, warp;
            mul.wide.u32 at, run, $3;
            add.u64 at, at, $1;
            setp.gt.s32 some, $4, 0;
            setp.lt.and.s32 wanted, run, $2, some;
            @wanted cp.async.bulk.prefetch.L2.global [at], $4;
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r,r",
            [first.to(tl.int64), runs, stride, size],
            tl.int32,
            is_pure=False,
            pack=1,
        )
