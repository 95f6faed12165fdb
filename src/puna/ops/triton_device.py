"""What launchers must know of the device that a tensor is on; of the interpreter's, an H200's facts."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has."""
    if device.type != "cuda":
        return 132
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability: (9, 0) is Hopper, (8, 9) Ada, (8, 0) Ampere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def interprets(device: torch.device) -> bool:
    """Whether kernels on this device run in triton's interpreter, which has no inline assembly and no FP8 units."""
    return device.type != "cuda"
