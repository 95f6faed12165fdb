"""Compiled conversion of weights, done when a model is loaded; see puna.quantization for what it must give."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from puna.ops.panels import BLOCK, Panels

try:
    from puna import _kernels
except ImportError:  # a source tree that nothing was built in
    _kernels = None  # type: ignore[assignment]

_DTYPES: Final = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})


def can_round(rows: Tensor, panels: Panels) -> bool:
    """Whether `round_rows` takes these."""
    form = panels.format
    return (
        _kernels is not None
        and form.bits in (4, 8)
        and form.group_size == BLOCK
        and not form.minimums
        and rows.dtype in _DTYPES
        and rows.device.type == panels.data.device.type == "cpu"
    )


def round_rows(rows: Tensor, panels: Panels, first: int) -> None:
    """Rounds rows [n, E] to groups and puts them at `first`: the codes and scales of `round_to_groups`, to the bit.

    Raises ValueError for rows or panels that `can_round` refuses, or that do not fit together.
    """
    if not can_round(rows, panels):
        raise ValueError(f"rows {rows.dtype} on {rows.device} can't be rounded to {panels.format} by a kernel")
    shape = panels.format.buffer_shape(panels.outputs, panels.inputs)
    if panels.data.dtype != torch.uint8 or panels.data.shape != shape or not panels.data.is_contiguous():
        raise ValueError(f"the panels are {panels.data.dtype} {list(panels.data.shape)}: uint8 {list(shape)} is needed")
    count, inputs = rows.shape
    if inputs != panels.inputs or first < 0 or first + count > panels.outputs:
        raise ValueError(
            f"{count} rows of {inputs} from {first} on do not fit into a weight of {panels.outputs} x {panels.inputs}"
        )
    if (count > 1 and rows.stride(0) < inputs) or (inputs > 1 and rows.stride(1) != 1):
        rows = rows.contiguous()
    stride = max(rows.stride(0), inputs)
    _kernels.round_groups(
        rows.data_ptr(), panels.data.data_ptr(), first, count, inputs, stride, panels.format.bits, _DTYPES[rows.dtype]
    )
