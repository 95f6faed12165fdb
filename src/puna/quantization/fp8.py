"""Fp8Format: weights in FP8 (e4m3) with a scale for each output or block, whose inputs are rounded to FP8 as well."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.ops import OpTable
from puna.ops.panels import Panels
from puna.ops.scaled import FP8, FP8_MAX, SCALE_BLOCK, InputScaling, ScaledRows, ScaledWeight
from puna.quantization.quantized import Fp8Quantized, Quantized


class Fp8Format:
    """`weight` e4m3 [N, E] and `scales` float32: [N, 1], or with `blocks` one for each 128 x 128 of the weight.

    Inputs are rounded with a scale for each row, or for each 128 inputs of a row where the weight has blocks; with
    `static`, by the one in `input_scale` float32 [1], which comes with the checkpoint. Where a checkpoint has one scale
    for a tensor, each of its outputs gets that scale, which changes nothing.
    """

    def __init__(self, name: str, outputs: int, inputs: int, blocks: bool = False, static: bool = False) -> None:
        self.name = name
        self.outputs, self.inputs = outputs, inputs
        self.blocks, self.static = blocks, static

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("weight", "scales", "input_scale") if self.static else ("weight", "scales")

    def create_parameters(self) -> dict[str, nn.Parameter]:
        shape = (_blocks(self.outputs), _blocks(self.inputs)) if self.blocks else (self.outputs, 1)
        tensors = {
            "weight": torch.empty(self.outputs, self.inputs, dtype=FP8),
            "scales": torch.empty(shape, dtype=torch.float32),
        }
        if self.static:
            tensors["input_scale"] = torch.empty(1, dtype=torch.float32)
        return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}

    def weight(self, parameters: Mapping[str, Tensor]) -> ScaledWeight:
        return ScaledWeight(parameters["weight"].detach(), parameters["scales"].detach())

    def input_scaling(self, parameters: Mapping[str, Tensor]) -> InputScaling:
        return InputScaling(parameters["input_scale"].detach() if self.static else None, self.blocks)

    def write(self, parameters: Mapping[str, Tensor], rows: slice, dense: Tensor) -> None:
        """Rounds each output, or block, so that its highest absolute value becomes 448.

        Raises ValueError where blocks would be cut, and for a format whose input scale only a checkpoint can tell.
        """
        if self.static:
            raise ValueError(
                f"{self.name} needs a checkpoint with input scales: use 'fp8', which takes them as they come"
            )
        dense = dense.to(parameters["weight"].device, torch.float32)
        if not self.blocks:
            scales = (dense.abs().amax(1, keepdim=True).clamp(min=1e-12)) / FP8_MAX
            self.write_scaled(parameters, rows, ScaledWeight((dense / scales).to(FP8), scales))
            return
        padded = F.pad(dense, (0, -self.inputs % SCALE_BLOCK, 0, -dense.shape[0] % SCALE_BLOCK))
        tiles = padded.view(-1, SCALE_BLOCK, padded.shape[1] // SCALE_BLOCK, SCALE_BLOCK)
        scales = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_MAX
        values = (tiles / scales[:, None, :, None]).flatten(2).flatten(0, 1)
        self.write_scaled(parameters, rows, ScaledWeight(values[: dense.shape[0], : self.inputs].to(FP8), scales))

    def write_scaled(self, parameters: Mapping[str, Tensor], rows: slice, weight: ScaledWeight) -> None:
        """Puts rows in place that a checkpoint has in FP8; its scales are [1], [n, 1], or of this format's blocks.

        Raises ValueError where blocks would be cut.
        """
        with torch.no_grad():
            parameters["weight"][rows].copy_(weight.values)
            if not self.blocks:
                parameters["scales"][rows].copy_(weight.scales.expand(rows.stop - rows.start, 1))
                return
            if rows.start % SCALE_BLOCK or (rows.stop % SCALE_BLOCK and rows.stop != self.outputs):
                raise ValueError(
                    f"outputs {rows.start} to {rows.stop} cut blocks of {SCALE_BLOCK}: use 'fp8', a scale an output"
                )
            parameters["scales"][rows.start // SCALE_BLOCK : _blocks(rows.stop)].copy_(weight.scales)

    def write_quantized(self, parameters: Mapping[str, Tensor], rows: slice, quantized: Quantized) -> None:
        """As it is, if it comes in FP8 with scales of this format's kind. Rows must come in their order: those that
        begin at 0 set the inputs' scale anew, the others can only make it larger."""
        if not isinstance(quantized, Fp8Quantized) or quantized.weight.has_blocks != self.blocks:
            self.write(parameters, rows, quantized.dequantize())
            return
        self.write_scaled(parameters, rows, quantized.weight)
        if self.static and quantized.input_scale is not None:
            # Segments of a fused layer see the same inputs, which then have one scale: the one that fits all of them.
            known, new = parameters["input_scale"].detach(), quantized.input_scale.to(parameters["input_scale"].device)
            known.copy_(torch.maximum(known, new) if rows.start else new)

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        return self.weight(parameters).dequantize()[rows]

    def panels(self, parameters: Mapping[str, Tensor]) -> Panels | None:
        return None

    def matrix(self, parameters: Mapping[str, Tensor]) -> ScaledWeight:
        return self.weight(parameters)

    def linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return ops.scaled_linear(self._rounded(ops, x, parameters), self.weight(parameters), bias, dtype)

    def gated_linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        activation: str,
        scaling: InputScaling | None,
    ) -> Tensor | ScaledRows:
        return ops.scaled_gated_linear(
            self._rounded(ops, x, parameters), self.weight(parameters), bias, activation, scaling
        )

    def _rounded(self, ops: OpTable, x: Tensor | ScaledRows, parameters: Mapping[str, Tensor]) -> ScaledRows:
        return x if isinstance(x, ScaledRows) else ops.quantize_rows(x, self.input_scaling(parameters))

    def embedding(
        self, ops: OpTable, token_ids: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        weight = self.weight(parameters)
        scales = weight.scales
        if weight.has_blocks:
            scales = scales.repeat_interleave(SCALE_BLOCK, 0).repeat_interleave(SCALE_BLOCK, 1)[:, : self.inputs]
        return (weight.values[token_ids].float() * scales[token_ids]).to(dtype)


def _blocks(size: int) -> int:
    return -(-size // SCALE_BLOCK)
