"""ColumnLinear and RowLinear: linear layers split over the tensor-parallel ranks by their outputs or their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.embedding import Embedding
from puna.layers.pieces import Piece, PiecewiseModule, layer_format, op_table, parameter_piece, torch_dtype
from puna.mapping import Mapping
from puna.ops.panels import Panels
from puna.ops.scaled import InputScaling, ScaledRows, ScaledWeight
from puna.quantization import Quantized, WeightFormat, row_multiple


@dataclass(frozen=True)
class Segment:
    """A run of outputs of a ColumnLinear that checkpoints keep as a tensor of their own, such as q of q/k/v.

    It is `units` x `unit_size` outputs, and is split over the ranks between units (heads). Where there are fewer units
    than ranks, each unit is held by several ranks. `padded` lets the units be any number: the last ranks hold padding.
    """

    name: str
    units: int
    unit_size: int = 1
    padded: bool = False

    def local_units(self, mapping: Mapping) -> int:
        """How many units each rank holds. Raises ValueError where they can't be split evenly."""
        size = mapping.tp_size
        if self.units % size == 0 or self.padded:
            return -(-self.units // size)
        if size % self.units == 0:
            return 1
        raise ValueError(
            f"{self.name or 'the layer'} has {self.units} parts, which {size} ranks can't share evenly: choose a "
            f"tp_size that divides {self.units}"
        )

    def source(self, mapping: Mapping) -> slice:
        """The outputs, in the checkpoint's tensor, that this rank holds."""
        local = self.local_units(mapping)
        if mapping.tp_size > self.units and not self.padded:
            first = mapping.tp_rank * self.units // mapping.tp_size
        else:
            first = mapping.tp_rank * local
        stop = min(first + local, self.units)
        return slice(min(first, self.units) * self.unit_size, stop * self.unit_size)


@dataclass(frozen=True)
class _Part:
    """Some of a layer's outputs, stored in one format under these names; nearly always there is one part of all."""

    rows: slice
    format: WeightFormat
    names: ReadOnlyDict[str, str]  # of the layer's parameters, by the format's own names


class _Linear(PiecewiseModule):
    """What both kinds share: a weight in some WeightFormat, or its segments in several, and a bias."""

    def __init__(
        self, sizes: tuple[int, ...], inputs: int, bias: bool, config: LLaMAConfig, comm: Communicator
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = sum(sizes), inputs
        self.local_sizes = sizes
        self.config, self.comm = config, comm
        self.ops = op_table(config, comm)
        self.dtype = torch_dtype(config.dtype)
        self._format_names = [config.quant] * len(sizes)
        self.parts: tuple[_Part, ...] = ()
        self._build_parts()
        self.bias = nn.Parameter(torch.zeros(self.outputs, dtype=self.dtype)) if bias else None

    def _build_parts(self) -> None:
        """Registers the parameters for the formats of the segments; neighbours of one format share theirs, where the
        first ones are whole blocks of those that have blocks."""
        for part in self.parts:
            for name in part.names.values():
                delattr(self, name)
        ends = [0]
        runs: list[tuple[slice, str]] = []
        for size, name in zip(self.local_sizes, self._format_names, strict=True):
            ends.append(ends[-1] + size)
            if runs and runs[-1][1] == name and (ends[-2] - runs[-1][0].start) % row_multiple(name) == 0:
                runs[-1] = (slice(runs[-1][0].start, ends[-1]), name)
            else:
                runs.append((slice(ends[-2], ends[-1]), name))
        parts = []
        for i, (rows, name) in enumerate(runs):
            form = layer_format(name, rows.stop - rows.start, self.inputs, self.config, self.comm)
            suffix = f"_{i}" if len(runs) > 1 else ""
            created = form.create_parameters()
            for own, parameter in created.items():
                self.register_parameter(own + suffix, parameter)
            parts.append(_Part(rows, form, {own: own + suffix for own in created}))
        self.parts = tuple(parts)

    def _weights(self, part: _Part) -> dict[str, nn.Parameter]:
        # Not get_parameter, which takes names apart for 3 us: there are hundreds in a step.
        return {own: getattr(self, name) for own, name in part.names.items()}

    def panels(self) -> Panels | None:
        """The weight as compiled kernels take it, where it is in one format that is in panels, and there is no bias."""
        if len(self.parts) > 1 or self.bias is not None:
            return None
        return self.parts[0].format.panels(self._weights(self.parts[0]))

    def matrix(self) -> Tensor | ScaledWeight | None:
        """The weight in rows, where it is in one format that is, takes no gradients, and there is no bias."""
        if len(self.parts) > 1 or self.bias is not None:
            return None
        return self.parts[0].format.matrix(self._weights(self.parts[0]))

    @property
    def input_scaling(self) -> InputScaling | None:
        """How inputs may come rounded, which saves a pass over them: as the weight's format would round them itself."""
        scalings = [part.format.input_scaling(self._weights(part)) for part in self.parts]
        first = scalings[0]
        if len(scalings) == 1 or first is None:
            return first if len(scalings) == 1 else None
        alike = all(one is not None and one.static is None and one.blocks == first.blocks for one in scalings)
        return first if alike else None

    def _multiply(self, x: Tensor | ScaledRows, bias: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The outputs of each part, in the model's dtype if no other is asked for."""
        return [
            part.format.linear(
                self.ops, x, self._weights(part), None if bias is None else bias[part.rows], dtype or self.dtype
            )
            for part in self.parts
        ]

    def share_weight(self, other: Embedding) -> None:
        """Takes the weight of an embedding of the same shape for its own."""
        self._format_names = [other.format.name] * len(self.local_sizes)
        self._build_parts()
        for name, parameter in other.weights().items():
            self.register_parameter(name, parameter)

    def _weight_piece(
        self, name: str, full_shape: tuple[int, int], source: tuple[slice, slice], rows: slice, segment: int = 0
    ) -> Piece:
        def place() -> tuple[_Part, slice]:
            part = next(part for part in self.parts if part.rows.start <= rows.start and rows.stop <= part.rows.stop)
            return part, slice(rows.start - part.rows.start, rows.stop - part.rows.start)

        def write(dense: Tensor) -> None:
            part, inside = place()
            part.format.write(self._weights(part), inside, dense)

        def write_quantized(quantized: Quantized) -> None:
            part, inside = place()
            part.format.write_quantized(self._weights(part), inside, quantized)

        def read() -> Tensor:
            part, inside = place()
            return part.format.read(self._weights(part), inside)

        def store_as(format_name: str) -> None:
            self._format_names[segment] = format_name
            self._build_parts()

        return Piece(name, full_shape, source, write, read, write_quantized, store_as)

    def extra_repr(self) -> str:
        formats = ", ".join(part.format.name for part in self.parts)
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}, format={formats}"


class ColumnLinear(_Linear):
    """x [..., in_features] -> [..., this rank's outputs], or all of them with `gather_output`.

    The outputs are the segments one after another; each rank holds its part of every segment.
    """

    def __init__(
        self,
        in_features: int,
        segments: tuple[Segment, ...],
        bias: bool,
        config: LLaMAConfig,
        comm: Communicator,
        gather_output: bool = False,
    ) -> None:
        local_sizes = tuple(segment.local_units(comm.mapping) * segment.unit_size for segment in segments)
        super().__init__(local_sizes, in_features, bias, config, comm)
        self.segments = segments
        self.gather_output = gather_output

    def forward(self, x: Tensor | ScaledRows, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype` is the result's, None for the model's."""
        outputs = self._multiply(x, self.bias, dtype)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if not self.gather_output:
            return y
        return self.comm.all_gather(y)[..., : sum(segment.units * segment.unit_size for segment in self.segments)]

    def split(self, x: Tensor | ScaledRows) -> tuple[Tensor, ...]:
        """This rank's outputs of each segment, [..., its size] each, as views where they are computed together."""
        outputs = iter(self._multiply(x, self.bias))
        found: list[Tensor] = []
        for part in self.parts:
            sizes: list[int] = []
            while sum(sizes) < part.rows.stop - part.rows.start:
                sizes.append(self.local_sizes[len(found) + len(sizes)])
            found.extend(torch.split(next(outputs), sizes, dim=-1))
        return tuple(found)

    def gated(
        self, x: Tensor | ScaledRows, activation: str, scaling: InputScaling | None = None
    ) -> Tensor | ScaledRows:
        """activation(gate) * up of a layer of two segments, gate and up; with `scaling`, rounded for the next layer."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return part.format.gated_linear(self.ops, x, self._weights(part), self.bias, activation, scaling)
        if scaling is not None:
            return self.ops.gated_activation_scaled(self(x), activation, scaling)
        return self.ops.gated_activation(self(x), activation)

    def pieces(self) -> list[Piece]:
        pieces = []
        start = 0
        for number, (segment, size) in enumerate(zip(self.segments, self.local_sizes, strict=True)):
            prefix = f"{segment.name}." if segment.name else ""
            source = segment.source(self.comm.mapping)
            rows = slice(start, start + source.stop - source.start)
            full = segment.units * segment.unit_size
            columns = slice(0, self.inputs)
            name, shape, sources = f"{prefix}weight", (full, self.inputs), (source, columns)
            weight = self._weight_piece(name, shape, sources, rows, number)
            padding = start + size - rows.stop
            if padding:
                whole = self._weight_piece(name, shape, sources, slice(start, start + size), number)
                weight = _padded(weight, whole, padding)
            pieces.append(weight)
            if self.bias is not None:
                pieces.append(parameter_piece(f"{prefix}bias", self.bias, full, source, rows))
            start += size
        return pieces


def _padded(piece: Piece, whole: Piece, count: int) -> Piece:
    """The piece, written as the `whole` of the rows that it has with `count` rows of zeros behind its own: formats
    whose scales belong to several rows want all of these at once."""

    def write(dense: Tensor) -> None:
        whole.write(F.pad(dense, (0, 0, 0, count)))

    def write_quantized(quantized: Quantized) -> None:
        assert whole.write_quantized is not None  # weights have it
        whole.write_quantized(quantized.padded(count))

    return dataclasses.replace(piece, write=write, write_quantized=write_quantized)


class RowLinear(_Linear):
    """x [..., this rank's inputs] -> [..., out_features], summed over the ranks unless `reduce_output` is off.

    The bias is added once, on the first rank of the group. `in_features` counts the inputs of all ranks. Raises
    ValueError where they can't be split evenly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: LLaMAConfig,
        comm: Communicator,
        reduce_output: bool = True,
    ) -> None:
        if in_features % comm.mapping.tp_size != 0:
            raise ValueError(
                f"{in_features} inputs can't be split evenly over {comm.mapping.tp_size} ranks: choose a tp_size that "
                f"divides {in_features}"
            )
        super().__init__((out_features,), in_features // comm.mapping.tp_size, bias, config, comm)
        self.in_features = in_features
        self.reduce_output = reduce_output

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        bias = self.bias if self.comm.mapping.tp_rank == 0 else None
        (y,) = self._multiply(x, bias)
        return self.comm.all_reduce(y) if self.reduce_output else y

    def pieces(self) -> list[Piece]:
        rows = slice(0, self.outputs)
        first = self.comm.mapping.tp_rank * self.inputs
        columns = slice(first, first + self.inputs)
        pieces = [self._weight_piece("weight", (self.outputs, self.in_features), (rows, columns), rows)]
        if self.bias is not None:
            pieces.append(parameter_piece("bias", self.bias, self.outputs, rows, rows))
        return pieces
