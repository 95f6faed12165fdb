"""MoE: a feed-forward part made of experts, of which each token uses the few that a router picks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.mlp import GatedMLP
from puna.layers.pieces import Piece, PiecewiseModule, op_table, parameter_piece, torch_dtype
from puna.quantization.dense import random_matrix


class Router(PiecewiseModule):
    """x [T, hidden_size] -> weights and indices of the chosen experts, [T, experts_per_token] each.

    Its weight is whole and dense on every rank: a rank that chose other experts would spoil the sum.
    """

    def __init__(self, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.weight = random_matrix(config.num_experts, config.hidden_size, torch_dtype(config.dtype))
        self.experts_per_token = config.experts_per_token
        self.ops = op_table(config, comm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.route_experts(self.ops.linear(x, self.weight, None), self.experts_per_token)

    def pieces(self) -> list[Piece]:
        rows = slice(0, self.weight.shape[0])
        return [parameter_piece("weight", self.weight, self.weight.shape[0], rows, rows)]


class MoE(nn.Module):
    """x [..., hidden_size] -> [..., hidden_size]: the weighted sum of the chosen experts (Mixtral, Jiang et al., 2024).

    Every rank holds a slice of every expert, so that the work is even whatever the router picks.
    """

    def __init__(self, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.router = Router(config, comm)
        self.experts = nn.ModuleList(GatedMLP(config, comm, reduce_output=False) for _ in range(config.num_experts))
        self.comm = comm

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, indices = self.router(tokens)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(indices == number)
            if rows.numel():
                weighted = expert(tokens[rows]) * weights[rows, place].unsqueeze(-1)
                output = output.index_add(0, rows, weighted.to(output.dtype))
        return self.comm.all_reduce(output).view_as(x)
