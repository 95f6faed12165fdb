"""Memory from the system: zeros, aligned, writable to the last byte, and there for as long as a view of it."""

from __future__ import annotations

import gc
import mmap
import sys

import pytest
import torch

from puna.ops.pages import zero_pages


@pytest.mark.parametrize("size", [0, 1, 4096, 100_001, (1 << 25) - 1, (1 << 25) + 12_345])
def test_zeros_of_that_size_which_outlive_the_first_view(size: int) -> None:
    pages = zero_pages(size)
    assert pages.shape == (size,)
    assert pages.dtype == torch.uint8
    assert not pages.any()
    if not size:
        return
    assert pages.data_ptr() % (1 << 21 if size >= 1 << 25 else 4096) == 0
    last = pages[-1:]
    pages[-1] = 7
    del pages
    gc.collect()
    assert last.item() == 7


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are Linux's")
def test_many_small_parts_get_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []

    class Recorded(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            advised.append(len(self))

    monkeypatch.setattr(mmap, "mmap", Recorded)
    for size, parts in ((1 << 25, 1), (1 << 25, 2), (1 << 26, 2), (0, 0)):
        zero_pages(size, parts)
    assert advised == [(1 << 25) + (1 << 21), (1 << 26) + (1 << 21)]
