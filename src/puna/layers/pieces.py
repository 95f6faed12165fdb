"""Piece: which part of which checkpoint tensor a layer holds, and how to put it there; the loader knows no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.ops import OpSpec, OpTable, dense_layout, table
from puna.quantization import Quantized, WeightFormat, weight_format


@dataclass(frozen=True)
class Piece:
    """One tensor as checkpoints have it: unfused and unsharded.

    `name` is relative to the layer ("q.weight" of a fused q/k/v projection), `full_shape` is the shape in a checkpoint,
    `source` the slices of it that this rank holds. `write` takes the tensor at those slices and puts it in place,
    padding included; `read` gives it back. Weights that a format holds also have `write_quantized`, which takes what
    a checkpoint holds quantised, and `store_as`, which chooses the format by name before the weight has storage.
    """

    name: str
    full_shape: tuple[int, ...]
    source: tuple[slice, ...]
    write: Callable[[Tensor], None]
    read: Callable[[], Tensor]
    write_quantized: Callable[[Quantized], None] | None = None
    store_as: Callable[[str], None] | None = None


class PiecewiseModule(nn.Module, ABC):
    """A layer with parameters of its own, which says what pieces of a checkpoint they are made of."""

    @abstractmethod
    def pieces(self) -> list[Piece]: ...


def parameter_piece(name: str, parameter: Tensor, full_size: int, source: slice, target: slice) -> Piece:
    """The piece that is the rows `target` of a parameter, whose first axis is `full_size` long in a checkpoint."""

    def write(tensor: Tensor) -> None:
        with torch.no_grad():
            parameter[target].copy_(tensor)

    rest = tuple(parameter.shape[1:])
    return Piece(
        name=name,
        full_shape=(full_size, *rest),
        source=(source, *(slice(0, size) for size in rest)),
        write=write,
        read=lambda: parameter.detach()[target],
    )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's dtype name."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes[name]


def layer_format(name: str, outputs: int, inputs: int, config: LLaMAConfig, comm: Communicator) -> WeightFormat:
    """The weight format of that name as this rank's device wants it; see `weight_format`."""
    return weight_format(name, torch_dtype(config.dtype), outputs, inputs, weight_layout(comm))


def weight_layout(comm: Communicator) -> Literal["panels", "rows"]:
    """How this rank's device wants weights that are not in groups; what has them in panels, the CPU, has no FP8."""
    return dense_layout(comm.device)


def op_table(config: LLaMAConfig, comm: Communicator) -> OpTable:
    """The ops that a layer of this model calls on this rank's device: differentiable ones where the weights are."""
    differentiable = config.quant == "none"
    dtype, size = torch_dtype(config.dtype), config.head_size
    return table(
        OpSpec(
            device=comm.device,
            dtype=dtype,
            head_size=size,
            differentiable=differentiable,
            deterministic=config.deterministic,
        )
    )
