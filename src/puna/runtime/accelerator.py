"""Accelerator: what the runtime needs of a device that works behind the host's back, in one stream, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class NotRecordable(RuntimeError):
    """A model computes something that a recording leaves out, or that can't be captured."""


class Event(Protocol):
    """A place in the device's stream of work."""

    def synchronize(self) -> None:
        """Returns when the device has come here. Raises RuntimeError for what went wrong on its way."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """What the device took from there to here; for two that were recorded with `timed` and have been reached."""
        ...


class Graph(Protocol):
    """Work that was captured."""

    def replay(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes: of the device, `free` for anybody; of this process's tensors, those that are there, and the most that were
    since the last `reset_peak`; `reserved` is what its allocator holds for them."""

    total: int
    free: int
    allocated: int
    reserved: int
    peak: int


class Accelerator(Protocol):
    """One device. Work is queued in one order by one thread; events may be waited for in others.

    The tests have one that is a CPU, and takes its time only as they say.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def overlaps_kernels(self) -> bool:
        """Whether a kernel can start before the one ahead of it has ended."""
        ...

    def use(self) -> None:
        """The calling thread will queue work here."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of host memory, zero at first, which the device reads and writes by itself."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queues a copy between the device and pinned memory, which must stay as it is until it is done."""
        ...

    def record(self, timed: bool = False) -> Event:
        """An event behind all that is queued."""
        ...

    def capture(self, function: Callable[[], T]) -> tuple[Graph, T]:
        """What `function` queues, to be replayed, and its result, whose tensors a replay fills in.

        The function is called twice, and runs once before: kernels are compiled and workspaces allocated then. All
        graphs share their memory: a result holds until another graph is replayed. Raises NotRecordable for what waits
        for the device, or else can't be captured.
        """
        ...

    def memory(self) -> DeviceMemory: ...

    def reset_peak(self) -> None: ...

    def release_cached(self) -> None:
        """Waits for the device, and gives back what the allocator holds and nobody uses."""
        ...
