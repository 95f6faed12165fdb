"""WeightFormat: how the weight of a linear layer is stored and multiplied, and which format a name stands for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, Protocol

import torch
from torch import Tensor, nn

from puna.ops import OpTable
from puna.ops.panels import PANEL_LAYOUT, PanelFormat, Panels
from puna.ops.scaled import SCALE_BLOCK, InputScaling, ScaledRows, ScaledWeight
from puna.quantization.dense import DenseFormat
from puna.quantization.fp8 import Fp8Format
from puna.quantization.groups import GroupQuantized
from puna.quantization.panels import DensePanels, GroupPanels
from puna.quantization.quantized import Fp8Quantized, Quantized


class WeightFormat(Protocol):
    """Owns the parameters of one layer's weight [N outputs, E inputs]; the layer itself knows none of this.

    The layer registers the parameters under the names that `create_parameters` gives them, and hands them back as
    `parameters` to the other methods.
    """

    @property
    def name(self) -> str: ...

    @property
    def parameter_names(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> int: ...

    @property
    def inputs(self) -> int: ...

    def create_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters on torch's default device: small random values, or nothing in particular where no gradients
        flow."""
        ...

    def write(self, parameters: Mapping[str, Tensor], rows: slice, dense: Tensor) -> None:
        """Converts the dense rows [n, E] and puts them in place."""
        ...

    def write_quantized(self, parameters: Mapping[str, Tensor], rows: slice, quantized: Quantized) -> None:
        """Puts rows in place that a checkpoint holds quantised, without another rounding where the format allows."""
        ...

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        """The dense rows [n, E] back, exact but for the rounding of the format."""
        ...

    def panels(self, parameters: Mapping[str, Tensor]) -> Panels | None:
        """The weight in panels, or None for a format in another layout."""
        ...

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor | ScaledWeight | None:
        """The weight in rows, without gradients, or None for a format in another layout."""
        ...

    def input_scaling(self, parameters: Mapping[str, Tensor]) -> InputScaling | None:
        """How inputs may come rounded already, as ScaledRows; None where the format takes only tensors."""
        ...

    def linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """x [..., E] times the transposed weight, plus bias [N] -> [..., N] in `dtype`."""
        ...

    def gated_linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        activation: str,
        scaling: InputScaling | None,
    ) -> Tensor | ScaledRows:
        """activation(gate) * up of a weight whose first N / 2 outputs are gate, the others up -> [..., N / 2], rounded
        for the next layer where that says how."""
        ...

    def embedding(
        self, ops: OpTable, token_ids: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The rows for token_ids [...] -> [..., E] in `dtype`."""
        ...


_DENSE: Final = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "bf16": torch.bfloat16}
)
_GROUPS: Final = MappingProxyType(
    {
        "int8": PanelFormat(bits=8),
        "int8-16": PanelFormat(bits=8, group_size=16),
        "int8-min": PanelFormat(bits=8, minimums=True),
        "int4": PanelFormat(bits=4),
        "int4-16": PanelFormat(bits=4, group_size=16),
        "int4-min": PanelFormat(bits=4, minimums=True),
        "int4-min-16": PanelFormat(bits=4, group_size=16, minimums=True),
    }
)

# What a checkpoint's own types of tensors are kept as where its numbers are not to be rounded again.
_STORED: Final = MappingProxyType(
    {
        "Q4_0": "int4",
        "Q4_1": "int4-min",
        "Q5_0": "int8",
        "Q5_1": "int8-min",
        "Q8_0": "int8",
        "Q2_K": "int4-min-16",
        "Q3_K": "int4-16",
        "Q4_K": "int4-min",
        "Q5_K": "int8-min",
        "Q6_K": "int8-16",
    }
)

# What a user may ask for; "stored" keeps every tensor as the checkpoint has it.
QUANTIZATIONS: Final = ("bf16", "int8", "int4", "fp8")


def weight_format(
    name: str, dtype: torch.dtype, outputs: int, inputs: int, layout: Literal["panels", "rows"] = "panels"
) -> WeightFormat:
    """The format of that name for a weight of a model whose activations have `dtype`.

    "none" is the plain matrix in that dtype, the only one with gradients. "panels" is the same numbers in the layout
    of the compiled kernels, and "float32", "bfloat16" (or "bf16") and "float16" another dtype's; "int8" and "int4"
    are codes in groups of 32 inputs with a scale, "-16" in groups of 16, "-min" with a minimum as well. With the layout
    "rows" (of GPUs) what is not in groups is a plain matrix too, without gradients.

    Raises ValueError for any other name.
    """
    if name == "none":
        return DenseFormat(dtype, outputs, inputs)
    if name in ("panels", "stored") or name in _DENSE:
        dtype = _DENSE.get(name, dtype)
        if layout == "rows":
            return DenseFormat(dtype, outputs, inputs, trainable=False)
        return DensePanels(dtype, outputs, inputs)
    if name in _GROUPS:
        return GroupPanels(name, _GROUPS[name], outputs, inputs)
    if name in ("fp8", "fp8-static", "fp8-block"):
        return Fp8Format(name, outputs, inputs, blocks=name == "fp8-block", static=name == "fp8-static")
    known = ", ".join(("none", "panels", *_DENSE, *_GROUPS, "fp8", "fp8-static", "fp8-block"))
    raise ValueError(f"the weight format {name!r} is not known: use one of {known}")


def vocabulary_format(name: str) -> str:
    """The format of the embedding and of lm_head in a model of that `quant`: what FP8 does to logits is not worth the
    bytes that it would save there (a sixteenth of an 8B model), and so no published FP8 checkpoint has them in it."""
    return "panels" if name.startswith("fp8") else name


def row_multiple(name: str) -> int:
    """Rows that segments of a fused layer must be a multiple of to share parameters in this format."""
    return SCALE_BLOCK if name == "fp8-block" else 1


def stored_format(dtype: str) -> str:
    """The name of the format for a checkpoint's tensor of that type: nothing is rounded but scales, to float16."""
    return _STORED.get(dtype, dtype)


__all__ = [
    "PANEL_LAYOUT",
    "QUANTIZATIONS",
    "Fp8Quantized",
    "GroupQuantized",
    "Quantized",
    "WeightFormat",
    "row_multiple",
    "stored_format",
    "vocabulary_format",
    "weight_format",
]
