"""DensePanels, GroupPanels: weights in the layout of the compiled kernels, for inference only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from puna.ops import OpTable
from puna.ops.packing import can_round, round_rows
from puna.ops.panels import BLOCK, LANES, PanelFormat, Panels
from puna.ops.scaled import InputScaling, ScaledRows, plain
from puna.quantization.groups import GroupQuantized
from puna.quantization.quantized import Quantized
from puna.quantization.rounding import round_to_groups

# Weights that are converted at a time: 4 MiB in float32, and a few times that with what the conversion makes.
_CHUNK = 1 << 20


def is_on_host(data: Tensor) -> bool:
    return data.device.type == "cpu"


def _rows_at_a_time(inputs: int) -> int:
    return max(1, _CHUNK // inputs // BLOCK) * BLOCK


class _PanelFormat(ABC):
    """What both share: one uint8 parameter, `weight`, of whole panels."""

    parameter_names = ("weight",)

    def __init__(self, name: str, form: PanelFormat, outputs: int, inputs: int) -> None:
        self.name = name
        self.form = form
        self.outputs, self.inputs = outputs, inputs

    def create_parameters(self) -> dict[str, nn.Parameter]:
        empty = torch.empty(self.form.buffer_shape(self.outputs, self.inputs), dtype=torch.uint8)
        return {"weight": nn.Parameter(empty, requires_grad=False)}

    def input_scaling(self, parameters: Mapping[str, Tensor]) -> InputScaling | None:
        return None

    def panels(self, parameters: Mapping[str, Tensor]) -> Panels:
        return Panels(parameters["weight"].detach(), self.form, self.outputs, self.inputs)

    def matrix(self, parameters: Mapping[str, Tensor]) -> None:
        return None

    def write(self, parameters: Mapping[str, Tensor], rows: slice, dense: Tensor) -> None:
        step = _rows_at_a_time(self.inputs)
        with self._on_host(parameters, rows) as (panels, first):
            for start in range(0, dense.shape[0], step):
                self._write(panels, first + start, dense[start : start + step].to(panels.data.device))
            self._clear_padding(panels, rows)

    def write_quantized(self, parameters: Mapping[str, Tensor], rows: slice, quantized: Quantized) -> None:
        self.write(parameters, rows, quantized.dequantize())

    @contextmanager
    def _on_host(
        self, parameters: Mapping[str, Tensor], rows: slice, codes: Tensor | None = None
    ) -> Iterator[tuple[Panels, int]]:
        """The panels that rows are written to, and the place of the first row in them. What is packed on the CPU is
        packed there for other devices too: in a copy of the panels that hold these rows, which goes back at the end.
        Only codes that are on such a device already, as random ones may be, are packed where they are."""
        whole = self.panels(parameters)
        if is_on_host(whole.data) or (codes is not None and codes.is_cuda):
            yield whole, rows.start
            return
        touched = slice(rows.start // LANES, -(-rows.stop // LANES))
        start = touched.start * LANES
        copy = whole.data[touched].to("cpu", copy=True)
        yield Panels(copy, self.form, min(touched.stop * LANES, self.outputs) - start, self.inputs), rows.start - start
        whole.data[touched].copy_(copy)

    @abstractmethod
    def _write(self, panels: Panels, first: int, dense: Tensor) -> None: ...

    def _clear_padding(self, panels: Panels, rows: slice) -> None:
        # Storage comes unset, and the kernels multiply whole panels.
        if rows.stop == self.outputs:
            panels.clear_padding()

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        return self.panels(parameters).dequantize(rows.start, rows.stop - rows.start)

    def linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return ops.panel_linear(plain(x), self.panels(parameters), bias, dtype)

    def gated_linear(
        self,
        ops: OpTable,
        x: Tensor | ScaledRows,
        parameters: Mapping[str, Tensor],
        bias: Tensor | None,
        activation: str,
        scaling: InputScaling | None,
    ) -> Tensor | ScaledRows:
        if scaling is not None:
            return ops.gated_activation_scaled(self.linear(ops, x, parameters, bias, x.dtype), activation, scaling)
        return ops.panel_gated_linear(plain(x), self.panels(parameters), bias, activation)

    def embedding(
        self, ops: OpTable, token_ids: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        return ops.panel_embedding(token_ids, self.panels(parameters), dtype)


class DensePanels(_PanelFormat):
    """The numbers themselves, in float32, bfloat16 or float16."""

    def __init__(self, dtype: torch.dtype, outputs: int, inputs: int) -> None:
        super().__init__(str(dtype).removeprefix("torch."), PanelFormat(dtype), outputs, inputs)

    def _write(self, panels: Panels, first: int, dense: Tensor) -> None:
        panels.write_dense(first, dense)

    def read(self, parameters: Mapping[str, Tensor], rows: slice) -> Tensor:
        return self.panels(parameters).read_dense(rows.start, rows.stop - rows.start)


class GroupPanels(_PanelFormat):
    """Codes of 8 or 4 bits; each group of 16 or 32 inputs has a float16 scale, and perhaps a float16 minimum."""

    def _write(self, panels: Panels, first: int, dense: Tensor) -> None:
        if can_round(dense, panels):
            round_rows(dense, panels, first)
            return
        padding = -self.inputs % BLOCK
        if padding:
            dense = nn.functional.pad(dense, (0, padding))
        panels.write_groups(first, *round_to_groups(dense, self.form))

    def write_quantized(self, parameters: Mapping[str, Tensor], rows: slice, quantized: Quantized) -> None:
        if not isinstance(quantized, GroupQuantized):
            super().write_quantized(parameters, rows, quantized)
            return
        step = _rows_at_a_time(self.inputs)
        with self._on_host(parameters, rows, quantized.codes) as (panels, first):
            for start in range(0, quantized.shape[0], step):
                part = quantized.rows(slice(start, start + step))
                fitting = self._fitting(part)
                if fitting is None:
                    self._write(panels, first + start, part.dequantize())
                else:
                    panels.write_groups(first + start, *fitting)
            self._clear_padding(panels, rows)

    def _fitting(self, groups: GroupQuantized) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Codes, scales and minimums as this format has them, or None where it can't hold these groups as they are."""
        form = self.form
        if groups.group_size % form.group_size or groups.shape[1] != self.inputs or self.inputs % BLOCK:
            return None
        codes, scales, minimums = groups.codes, groups.scales, groups.minimums
        if not form.minimums:
            if minimums is not None:
                return None
            codes = codes + (form.zero - groups.zero)  # uint8 wraps around, and back where the zero was the larger one
        else:
            offset = scales * -float(groups.zero)
            minimums = offset if minimums is None else minimums + offset
        repeats = groups.group_size // form.group_size
        if repeats > 1:  # larger groups, as AWQ's and GPTQ's: each of ours has the same scale
            scales = scales.repeat_interleave(repeats, dim=1)
            minimums = None if minimums is None else minimums.repeat_interleave(repeats, dim=1)
        if form.bits == 4 and int(codes.max()) > 15:
            return None
        return codes, scales, minimums
