"""WeightFormat: how the weight of a linear layer is stored and multiplied; one format per file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from puna.ops import OpTable
from puna.quantization.dense import DenseFormat


class WeightFormat(Protocol):
    """Owns the parameters of a linear layer's weight [N outputs, E inputs]; the layer itself knows none of this.

    The layer registers the parameters under the names that `create_parameters` gives them, and hands them back as
    `parameters` to the other methods.
    """

    @property
    def name(self) -> str: ...

    @property
    def parameter_names(self) -> tuple[str, ...]: ...

    def create_parameters(self, outputs: int, inputs: int) -> dict[str, nn.Parameter]:
        """The parameters for a weight of that shape, on torch's default device, with small random values.

        Raises ValueError for a shape that the format cannot hold.
        """
        ...

    def write(self, parameters: Mapping[str, Tensor], rows: slice, dense: Tensor) -> None:
        """Converts the dense rows [n, E] and puts them in place."""
        ...

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        """The dense rows [n, E] back, exact but for the rounding of the format."""
        ...

    def linear(self, ops: OpTable, x: Tensor, parameters: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x [..., E] times the transposed weight, plus bias [N] -> [..., N]."""
        ...


def weight_format(name: str, dtype: torch.dtype) -> WeightFormat:
    """The format of that name for a model whose activations have `dtype`. Raises ValueError for an unknown name."""
    if name == "none":
        return DenseFormat(dtype)
    raise ValueError(f"the weight format {name!r} is not known: use none")
