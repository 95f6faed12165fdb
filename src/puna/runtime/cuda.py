"""CudaAccelerator: what the runtime uses of one NVIDIA GPU; graphs, events, pinned memory, how much memory there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from puna.runtime.accelerator import DeviceMemory, Event, Graph, NotRecordable

T = TypeVar("T")


class CudaEvent:
    def __init__(self, timed: bool, stream: torch.cuda.Stream) -> None:
        # A waiting thread sleeps: a spinning one would take the processor from those that plan and launch.
        self._event = torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def synchronize(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        seconds: float = earlier._event.elapsed_time(self._event) / 1000
        return seconds


class CudaAccelerator:
    """A GPU of this process, and the stream that every thread uses unless it says otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._capture_stream: torch.cuda.Stream | None = None

    @property
    def overlaps_kernels(self) -> bool:
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def use(self) -> None:
        torch.cuda.set_device(self.device)  # each thread has its own, and triton launches there

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self, timed: bool = False) -> Event:
        return CudaEvent(timed, torch.cuda.current_stream(self.device))

    def capture(self, function: Callable[[], T]) -> tuple[Graph, T]:
        if self._capture_stream is None:
            self._capture_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        usual, aside = torch.cuda.current_stream(self.device), self._capture_stream
        aside.wait_stream(usual)
        with torch.cuda.stream(aside):
            function()
        usual.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads ask of the device meanwhile, such as whether a step has ended, is no part
        # of the capture, and must not break it.
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it has just run outside of a capture
            raise NotRecordable(str(error)) from error
        finally:
            # torch.cuda.graph stays on the other stream where what was captured turns out to be no graph.
            torch.cuda.set_stream(usual)
        return graph, result

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self.device)
        return DeviceMemory(
            total=total,
            free=free,
            allocated=torch.cuda.memory_allocated(self.device),
            reserved=torch.cuda.memory_reserved(self.device),
            peak=torch.cuda.max_memory_allocated(self.device),
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def release_cached(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


def accelerator_of(device: torch.device) -> CudaAccelerator | None:
    """What steps on this device are launched through; None where they simply run."""
    return CudaAccelerator(device) if device.type == "cuda" else None


def usable_device(device: torch.device | str) -> torch.device:
    """The device that is meant, GPUs with their number; "auto" is a GPU where there is one, else the CPU.

    Raises ValueError for what is no device, and where this machine or this build of torch has none such.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: use cpu, cuda, cuda:1 or the like, or auto") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        why = "this machine has no NVIDIA GPU that torch can use"
        if torch.version.cuda is None:
            why = f"this build of torch, {torch.__version__}, is without CUDA"
        raise ValueError(f"device is {str(device)!r}, but {why}: use cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device is {str(device)!r}, but there are only {torch.cuda.device_count()}, counted from 0")
    return torch.device("cuda", index)
