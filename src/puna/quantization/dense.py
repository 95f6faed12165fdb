"""DenseFormat: weights as plain float32, bfloat16 or float16 matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.ops import OpTable


def random_matrix(rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
    """A matrix as training starts with it: normal, with the deviation 0.02 of LLaMA's."""
    weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))
    # On the meta device there is nothing to fill, and random numbers there make torch import its compiler: 80 MB.
    if not weight.is_meta:
        nn.init.normal_(weight, std=0.02)
    return weight


@dataclass(frozen=True)
class DenseFormat:
    """One parameter, `weight` [N, E], in the model's dtype."""

    dtype: torch.dtype
    name = "none"
    parameter_names = ("weight",)

    def create_parameters(self, outputs: int, inputs: int) -> dict[str, nn.Parameter]:
        return {"weight": random_matrix(outputs, inputs, self.dtype)}

    def write(self, parameters: Mapping[str, Tensor], rows: slice, dense: Tensor) -> None:
        with torch.no_grad():
            parameters["weight"][rows].copy_(dense)

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        return parameters["weight"].detach()[rows]

    def linear(self, ops: OpTable, x: Tensor, parameters: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return ops.linear(x, parameters["weight"], bias)
