"""DenseFormat: weights as plain float32, bfloat16 or float16 matrices, with gradients or for inference only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.ops import OpTable
from puna.ops.panels import Panels
from puna.ops.scaled import InputScaling, ScaledRows, plain
from puna.quantization.quantized import Quantized


def random_matrix(rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
    """A matrix as training starts with it: normal, with the deviation 0.02 of LLaMA's."""
    weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))
    # On the meta device there is nothing to fill, and random numbers there make torch import its compiler: 80 MB.
    if not weight.is_meta:
        nn.init.normal_(weight, std=0.02)
    return weight


@dataclass(frozen=True)
class DenseFormat:
    """One parameter, `weight` [N, E], in `dtype`: the model's where it has gradients."""

    dtype: torch.dtype
    outputs: int
    inputs: int
    trainable: bool = True
    parameter_names = ("weight",)

    @property
    def name(self) -> str:
        return "none" if self.trainable else str(self.dtype).removeprefix("torch.")

    def create_parameters(self) -> dict[str, nn.Parameter]:
        if not self.trainable:
            empty = torch.empty(self.outputs, self.inputs, dtype=self.dtype)
            return {"weight": nn.Parameter(empty, requires_grad=False)}
        return {"weight": random_matrix(self.outputs, self.inputs, self.dtype)}

    def write(self, parameters: Mapping[str, Tensor], rows: slice, dense: Tensor) -> None:
        with torch.no_grad():
            parameters["weight"][rows].copy_(dense)

    def write_quantized(self, parameters: Mapping[str, Tensor], rows: slice, quantized: Quantized) -> None:
        self.write(parameters, rows, quantized.dequantize())

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        return parameters["weight"].detach()[rows]

    def input_scaling(self, parameters: Mapping[str, Tensor]) -> InputScaling | None:
        return None

    def panels(self, parameters: Mapping[str, Tensor]) -> Panels | None:
        return None

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        return None if self.trainable else parameters["weight"].detach()

    def linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        own = plain(x)
        if own.dtype != self.dtype:  # where a checkpoint keeps some tensors in another one than the model's
            own, bias = own.to(self.dtype), None if bias is None else bias.to(self.dtype)
        return ops.linear(own, parameters["weight"], bias, dtype)

    def gated_linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        activation: str,
        scaling: InputScaling | None,
    ) -> Tensor | ScaledRows:
        if scaling is None and x.dtype == self.dtype:
            return ops.gated_linear(plain(x), parameters["weight"], bias, activation)
        whole = self.linear(ops, x, parameters, bias, x.dtype)
        if scaling is None:
            return ops.gated_activation(whole, activation)
        return ops.gated_activation_scaled(whole, activation, scaling)

    def embedding(
        self, ops: OpTable, token_ids: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        return ops.embedding(token_ids, parameters["weight"]).to(dtype)
