"""The probe: what it counts is what it does, and its figures are those of some machine."""

from __future__ import annotations

import multiprocessing

import pytest

from puna.ops import cpu
from puna.ops.probe import Probe, Prober


def probe(level: str | None) -> Probe:
    return Prober(threads=1, level=level, read_bytes=1 << 22).measure()


@pytest.mark.parametrize("level", cpu.levels() or [None])
def test_figures_are_those_of_a_machine(level: str | None) -> None:
    # In a process of its own, as it sets the level of its process.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(probe, (level,))
    assert set(found.operations) == {"int8", "bfloat16", "float16", "float32"}
    assert 1e7 < found.read_bandwidth < 1e13
    assert all(1e7 < rate < 1e15 for rate in found.operations.values())
    assert found.operations["int8"] >= found.operations["float32"] == found.operations["float16"]
    assert found.operations["bfloat16"] >= found.operations["float32"]


def test_the_kernel_counts_what_it_does() -> None:
    if not cpu.compiled():
        pytest.skip("the compiled kernels are not built here")
    import torch

    from puna import _kernels

    done = torch.zeros(_kernels.threads(), dtype=torch.float64)
    memory = torch.arange(1 << 16, dtype=torch.int32)
    for size in (0, 64, 1000, 4096 + 64, memory.nbytes):
        _kernels.probe(0, memory.data_ptr(), size, 0, done.data_ptr())
        assert done.sum() == size // 64 * 64
    for kind in (1, 2, 3):
        _kernels.probe(kind, 0, 0, 10, done.data_ptr())
        once = done.clone()
        _kernels.probe(kind, 0, 0, 30, done.data_ptr())
        assert once.min() > 0
        assert torch.equal(done, 3 * once)
