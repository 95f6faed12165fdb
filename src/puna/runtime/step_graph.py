"""Decode steps by bucket: which batch sizes a step is padded to, and what runs a padded step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from puna.runtime.step_buffers import StepInputs


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then by 8 up to max_rows: little padding where it hurts, few graphs where it does not."""
    sizes = [size for size in (1, 2, 4) if size < max_rows]
    return (*sizes, *range(8, max_rows, 8), max_rows)


def bucket_for(num_rows: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds the rows, or None where there is none."""
    return next((bucket for bucket in buckets if bucket >= num_rows), None)


class StepGraph(Protocol):
    """A decode step of one bucket, ready to run again and again over the same buffers."""

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits [R, V] of the tokens that the inputs want."""
        ...


class EagerStepGraph:
    """Runs the model as it is. Recorded graphs stand in its place where a device has them."""

    def __init__(self, forward: Callable[[StepInputs], Tensor]) -> None:
        self._forward = forward

    def run(self, inputs: StepInputs) -> Tensor:
        return self._forward(inputs)
