"""RmsNorm: root-mean-square normalisation with a learned scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.pieces import Piece, PiecewiseModule, op_table, parameter_piece, torch_dtype
from puna.ops.scaled import InputScaling, ScaledRows


class RmsNorm(PiecewiseModule):
    """x [..., size] -> [..., size], normalised over the last axis; the same on every rank."""

    def __init__(self, size: int, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch_dtype(config.dtype)))
        self.epsilon = config.rms_norm_eps
        self.ops = op_table(config, comm)

    def forward(self, x: Tensor, scaling: InputScaling | None = None) -> Tensor | ScaledRows:
        """With `scaling`, the result comes rounded for the linear layer that takes it."""
        if scaling is not None:
            return self.ops.rms_norm_scaled(x, self.weight, self.epsilon, scaling)
        return self.ops.rms_norm(x, self.weight, self.epsilon)

    def after_adding(
        self, x: Tensor, residual: Tensor, scaling: InputScaling | None = None
    ) -> tuple[Tensor, Tensor | ScaledRows]:
        """x + residual, and that sum normalised."""
        if scaling is not None:
            return self.ops.add_rms_norm_scaled(x, residual, self.weight, self.epsilon, scaling)
        return self.ops.add_rms_norm(x, residual, self.weight, self.epsilon)

    def pieces(self) -> list[Piece]:
        rows = slice(0, self.weight.shape[0])
        return [parameter_piece("weight", self.weight, self.weight.shape[0], rows, rows)]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, epsilon={self.epsilon}"
