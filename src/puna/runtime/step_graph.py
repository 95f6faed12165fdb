"""Steps by bucket: which sizes a step is padded to, and what runs a padded step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from puna.ops import cpu
from puna.runtime.accelerator import Accelerator, NotRecordable
from puna.runtime.step_buffers import StepInputs


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then by 8 up to 256, 32 up to 512, 64 up to max_rows: little padding where it hurts, few graphs where
    it does not."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, 512, 32), *range(512, max(max_rows, 513), 64))
    return (*(size for size in sizes if size < max_rows), max_rows)


def table_widths(max_blocks: int, block_size: int) -> tuple[int, ...]:
    """Widths of block tables for 1,024 tokens, for four times as many, and so on up to all: for devices whose kernels
    divide their work by the width, and to which tables are copied."""
    widths = [max(1, 1024 // block_size)]
    while widths[-1] < max_blocks:
        widths.append(widths[-1] * 4)
    return (*widths[:-1], max_blocks)


def bucket_for(num_rows: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds the rows, or None where there is none."""
    return next((bucket for bucket in buckets if bucket >= num_rows), None)


def padded_mixed(num_tokens: int, num_rows: int, max_rows: int, most_tokens: int) -> tuple[int, int] | None:
    """Tokens and rows that a step with prompts is padded to, an eighth more at most where there are many of them; None
    where that is more than `most_tokens`. There is a row more than the step has, which takes the tokens that are added.
    """
    rows = min(_eighths(num_rows + 1, 4), max_rows + 1)
    tokens = _eighths(num_tokens + rows - num_rows, 16)
    return (tokens, rows) if tokens <= most_tokens else None


def _eighths(number: int, least: int) -> int:
    """Rounded up to a multiple of `least`, or of an eighth of the power of two below it."""
    step = max(least, 1 << max(0, number.bit_length() - 4))
    return -(-number // step) * step


class StepGraph(Protocol):
    """A step of one bucket, ready to run again and again over the same buffers."""

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits [R, V] of the tokens that the inputs want, to be read before the next step."""
        ...


class EagerStepGraph:
    """Runs the model as it is: where a device has nothing recorded, or a model can't be."""

    def __init__(self, forward: Callable[[StepInputs], Tensor]) -> None:
        self._forward = forward

    def run(self, inputs: StepInputs) -> Tensor:
        return self._forward(inputs)


class CpuStepGraph:
    """The compiled kernels of one step, recorded once and replayed in C++.

    A recording has the addresses of the inputs, so every step must come in the same buffers; what it reads there, such
    as lengths and block tables, may change. With `angles`, what it gives for a step's rotary angles is computed outside
    and copied to where the recording expects them; without, `forward` looks them up with kernels.

    The first step is run both ways. Raises NotRecordable where the two results differ in any bit, which is what comes
    of a torch operation between the kernels: it works on memory that holds nothing yet, and not again at replay.
    """

    def __init__(
        self,
        forward: Callable[[StepInputs], Tensor],
        angles: Callable[[StepInputs], tuple[Tensor, Tensor]] | None,
        inputs: StepInputs,
        arena: cpu.Arena,
    ) -> None:
        self._angles = angles
        self._addresses = _addresses(inputs)
        self._arena = arena  # holds what the kernels write to
        if angles is not None:
            cos, sin = angles(inputs)
            self._cos_sin = cos.clone(), sin.clone()
            inputs = inputs.with_angles(self._cos_sin)
        first_logits = forward(inputs)
        with cpu.recording(arena) as recording:
            logits = forward(inputs)
        self._recording = recording
        if not arena.owns(logits):
            raise NotRecordable("the logits do not come from a compiled kernel")
        self._logits = arena.lent(logits)
        recording.replay()
        if not torch.equal(self._logits.view(torch.uint8), first_logits.view(torch.uint8)):
            raise NotRecordable("something between the kernels is not one of them")

    def run(self, inputs: StepInputs) -> Tensor:
        if _addresses(inputs) != self._addresses:
            raise ValueError("a recorded step must come in the buffers that it was recorded with")
        if self._angles is not None:
            for kept, angles in zip(self._cos_sin, self._angles(inputs), strict=True):
                kept.copy_(angles)
        self._recording.replay()
        return self._logits


class CudaStepGraph:
    """A step of one bucket, captured on an accelerator.

    Like every captured step it reads its inputs where they were, so that they must come in the same tensors. What it
    returns holds until another graph is replayed: all share their memory.
    """

    def __init__(self, forward: Callable[[StepInputs], Tensor], inputs: StepInputs, accelerator: Accelerator) -> None:
        self._inputs = inputs
        self._graph, self._result = accelerator.capture(lambda: forward(inputs))

    def run(self, inputs: StepInputs) -> Tensor:
        if inputs is not self._inputs:
            raise ValueError("a captured step must come in the tensors that it was captured with")
        self._graph.replay()
        return self._result


def _addresses(inputs: StepInputs) -> tuple[tuple[int, torch.Size], ...]:
    params = inputs.attention_params
    tables = (tensor for table in params.cache_tables for tensor in (table.block_tables, table.slot_mapping))
    tensors = (
        inputs.input_ids,
        inputs.position_ids,
        inputs.logits_ids,
        params.query_starts,
        params.sequence_lengths,
        *tables,
    )
    return tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors)
