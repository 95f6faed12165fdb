"""ColumnLinear and RowLinear: linear layers split over the tensor-parallel ranks by their outputs or their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.pieces import Piece, PiecewiseModule, op_table, parameter_piece, torch_dtype
from puna.mapping import Mapping
from puna.quantization import weight_format


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


class _Linear(PiecewiseModule):
    """What both kinds share: a weight in some WeightFormat, and a bias."""

    def __init__(self, outputs: int, inputs: int, bias: bool, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.comm = comm
        self.ops = op_table(config, comm)
        self.format = weight_format(config.quant, torch_dtype(config.dtype))
        for name, parameter in self.format.create_parameters(outputs, inputs).items():
            self.register_parameter(name, parameter)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch_dtype(config.dtype))) if bias else None

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in self.format.parameter_names}

    def _weight_piece(self, name: str, full_shape: tuple[int, int], source: tuple[slice, slice], rows: slice) -> Piece:
        def write(dense: Tensor) -> None:
            self.format.write(self.weights(), rows, dense)

        read: Callable[[], Tensor] = lambda: self.format.read(self.weights(), rows)  # noqa: E731
        return Piece(name, full_shape, source, write, read)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}, format={self.format.name}"


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
        super().__init__(sum(local_sizes), in_features, bias, config, comm)
        self.segments = segments
        self.local_sizes = local_sizes
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        y = self.format.linear(self.ops, x, self.weights(), self.bias)
        if not self.gather_output:
            return y
        return self.comm.all_gather(y)[..., : sum(segment.units * segment.unit_size for segment in self.segments)]

    def pieces(self) -> list[Piece]:
        pieces = []
        start = 0
        for segment, size in zip(self.segments, self.local_sizes, strict=True):
            prefix = f"{segment.name}." if segment.name else ""
            source = segment.source(self.comm.mapping)
            rows = slice(start, start + source.stop - source.start)
            full = segment.units * segment.unit_size
            weight = self._weight_piece(f"{prefix}weight", (full, self.inputs), (source, slice(0, self.inputs)), rows)
            pieces.append(self._with_padding(weight, slice(rows.stop, start + size)))
            if self.bias is not None:
                pieces.append(parameter_piece(f"{prefix}bias", self.bias, full, source, rows))
            start += size
        return pieces

    def _with_padding(self, piece: Piece, padding: slice) -> Piece:
        """The piece with the rows `padding` of the weight set to zero when it is written."""
        count = padding.stop - padding.start
        if count == 0:
            return piece

        def write(dense: Tensor) -> None:
            piece.write(dense)
            self.format.write(self.weights(), padding, torch.zeros(count, self.inputs, device=dense.device))

        return Piece(piece.name, piece.full_shape, piece.source, write, piece.read)


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
        super().__init__(out_features, in_features // comm.mapping.tp_size, bias, config, comm)
        self.in_features = in_features
        self.reduce_output = reduce_output

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.comm.mapping.tp_rank == 0 else None
        y = self.format.linear(self.ops, x, self.weights(), bias)
        return self.comm.all_reduce(y) if self.reduce_output else y

    def pieces(self) -> list[Piece]:
        rows = slice(0, self.outputs)
        first = self.comm.mapping.tp_rank * self.inputs
        columns = slice(first, first + self.inputs)
        pieces = [self._weight_piece("weight", (self.outputs, self.in_features), (rows, columns), rows)]
        if self.bias is not None:
            pieces.append(parameter_piece("bias", self.bias, self.outputs, rows, rows))
        return pieces
