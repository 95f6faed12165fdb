"""CudaAccelerator without a GPU: what it does about captures that fail. See tests/triton/test_gpu_engine.py, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from puna.runtime.accelerator import NotRecordable
from puna.runtime.cuda import CudaAccelerator


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


class Cuda:
    """The part of torch.cuda that captures: `failure` is what comes of ending a capture, as torch.cuda.graph ends it:
    the stream stays the captured one then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
        self.usual = self.current = Stream()
        self.failure = failure
        replacements: dict[str, Any] = {
            "current_stream": lambda device: self.current,
            "set_stream": self.set_stream,
            "Stream": lambda device: Stream(),
            "stream": self.stream,
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: "graph",
            "graph": self.graph,
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: str, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        before, self.current = self.current, stream
        try:
            yield
        finally:
            if self.failure is not None:
                raise self.failure
            self.current = before


def test_a_step_runs_beside_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, None)
    seen: list[Stream] = []

    def function() -> int:
        seen.append(cuda.current)
        return len(seen)

    graph, result = CudaAccelerator(torch.device("cuda")).capture(function)
    assert (graph, result) == ("graph", 2)
    assert seen[0] is seen[1] is not cuda.usual
    assert cuda.current is cuda.usual


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(RuntimeError("operation failed due to a previous error during capture"), NotRecordable),
     (torch.OutOfMemoryError("full"), torch.OutOfMemoryError)],
)  # fmt: skip
def test_after_a_capture_that_fails_work_goes_where_it_went_before(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, expected: type[Exception]
) -> None:
    cuda = Cuda(monkeypatch, failure)
    with pytest.raises(expected, match=str(failure)):
        CudaAccelerator(torch.device("cuda")).capture(lambda: None)
    assert cuda.current is cuda.usual
