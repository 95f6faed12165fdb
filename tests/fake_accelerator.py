"""An accelerator that is the CPU: its work is done at once, but the host hears of it only when the test lets it.

What a real device would do later shows nevertheless. Pinned memory that the device is to write holds rubbish until an
event behind it is reached, pinned memory that it is to read must be the same then, and captured work is done by replays
alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from puna.runtime.accelerator import DeviceMemory, Event, Graph, NotRecordable

T = TypeVar("T")
GIB = 1 << 30
RUBBISH = 0xA5


class FakeEvent:
    """`is_reached` once the device has come here."""

    def __init__(self, accelerator: FakeAccelerator, number: int, timed: bool) -> None:
        self._accelerator, self.number, self.timed = accelerator, number, timed
        self.time = time.monotonic()

    def synchronize(self) -> None:
        self._accelerator.wait_for(self.number)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, FakeEvent)
        assert self.timed, "only timed events have times"
        assert earlier.timed, "only timed events have times"
        assert self._accelerator.reached >= max(self.number, earlier.number)
        return self.time - earlier.time


class FakeGraph:
    def __init__(self, function: Callable[[], object], result: object) -> None:
        self._function, self._result = function, result
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        found = self._function()
        if isinstance(found, Tensor) and isinstance(self._result, Tensor) and found is not self._result:
            self._result.copy_(found)


class FakeAccelerator:
    """`go` lets the device go on, which otherwise stands still: it is at `reached` of the `queued` pieces of work."""

    def __init__(self, runs_freely: bool = True, total: int = 16 * GIB) -> None:
        self.device = torch.device("cpu")
        self.overlaps_kernels = True
        self.runs_freely = runs_freely
        self.total = total
        self.used = 0  # bytes that others have
        self.peaks: list[int] = []  # of the measurements to come, beyond what is allocated
        self.queued = self.reached = 0
        self.graphs: list[FakeGraph] = []
        self.error: tuple[int, Exception] | None = None
        self.refusal: str | None = None  # to capture anything
        self.num_copies = 0
        self._work: list[tuple[int, Callable[[], None]]] = []
        self._condition = threading.Condition()
        self._is_capturing = False
        self._owner: int | None = None
        self._pinned: dict[int, Tensor] = {}  # by address, which nothing else may have later

    # ---- what the tests say

    def go(self, count: int | None = None) -> None:
        """Does the next pieces of work, or all that is queued."""
        with self._condition:
            last = self.queued if count is None else self.reached + count
            while self._work and self._work[0][0] <= last:
                self._work.pop(0)[1]()
            self.reached = min(last, self.queued)
            self._condition.notify_all()

    # ---- what the runtime asks

    def use(self) -> None:
        self._owner = threading.get_ident()

    def pinned(self, num_bytes: int) -> Tensor:
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self._pinned[memory.untyped_storage().data_ptr()] = memory
        return memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert not self._is_capturing, "host memory has no part in a graph"
        assert target.shape == source.shape
        self.num_copies += 1
        at_its_turn = source.clone()
        is_pinned = [tensor.untyped_storage().data_ptr() in self._pinned for tensor in (target, source)]
        assert sorted(is_pinned) == [False, True], "copies go between the device and pinned memory"
        if is_pinned[1]:
            target.copy_(source)

            def work() -> None:
                assert torch.equal(source, at_its_turn), "pinned memory was written before the device had read it"
        else:
            target.fill_(RUBBISH)

            def work() -> None:
                target.copy_(at_its_turn)

        self._queue(work)

    def record(self, timed: bool = False) -> Event:
        self._queue(lambda: None)
        return FakeEvent(self, self.queued, timed)

    def capture(self, function: Callable[[], T]) -> tuple[Graph, T]:
        function()
        if self.refusal is not None:
            raise NotRecordable(self.refusal)
        self._is_capturing = True
        result = function()
        self._is_capturing = False
        if isinstance(result, Tensor) and result.is_floating_point():
            result.fill_(torch.nan)  # nothing was computed: a replay has to
        graph = FakeGraph(function, result)
        self.graphs.append(graph)
        return graph, result

    def memory(self) -> DeviceMemory:
        peak = self.peaks.pop(0) if self.peaks else 0
        return DeviceMemory(total=self.total, free=self.total - self.used, allocated=0, reserved=0, peak=peak)

    def reset_peak(self) -> None: ...

    def release_cached(self) -> None: ...

    def wait_for(self, number: int) -> None:
        if self.runs_freely:
            self.go(max(0, number - self.reached))
        with self._condition:
            assert self._condition.wait_for(lambda: self.reached >= number, timeout=30), "the device stands still"
        if self.error is not None and number >= self.error[0]:
            raise self.error[1]

    def _queue(self, work: Callable[[], None]) -> None:
        assert self._owner in (None, threading.get_ident()), "one thread queues work"
        with self._condition:
            self.queued += 1
            self._work.append((self.queued, work))
