"""DenseFormat: weights as plain float32, bfloat16 or float16 matrices, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.ops import OpTable
from puna.ops.panels import Panels
from puna.quantization.groups import GroupQuantized


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
    outputs: int
    inputs: int
    name = "none"
    parameter_names = ("weight",)

    def create_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": random_matrix(self.outputs, self.inputs, self.dtype)}

    def write(self, parameters: Mapping[str, Tensor], rows: slice, dense: Tensor) -> None:
        with torch.no_grad():
            parameters["weight"][rows].copy_(dense)

    def write_groups(self, parameters: Mapping[str, Tensor], rows: slice, groups: GroupQuantized) -> None:
        self.write(parameters, rows, groups.dequantize())

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        return parameters["weight"].detach()[rows]

    def panels(self, parameters: Mapping[str, Tensor]) -> Panels | None:
        return None

    def linear(
        self, ops: OpTable, x: Tensor, parameters: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return ops.linear(x, parameters["weight"], bias).to(dtype)

    def gated_linear(
        self, ops: OpTable, x: Tensor, parameters: Mapping[str, Tensor], bias: Tensor | None, activation: str
    ) -> Tensor:
        return ops.gated_activation(ops.linear(x, parameters["weight"], bias), activation)

    def embedding(
        self, ops: OpTable, token_ids: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        return ops.embedding(token_ids, parameters["weight"]).to(dtype)
