"""MoE: a feed-forward part made of experts, of which each token uses the few that a router picks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.mlp import FeedForward, GatedMLP
from puna.layers.pieces import Piece, PiecewiseModule, layer_format, op_table, torch_dtype
from puna.ops.panels import LANES, Panels
from puna.ops.scaled import ScaledWeight


class Router(PiecewiseModule):
    """x [T, hidden_size] -> how well each expert suits each token, logits [T, experts].

    Its weight is whole and never quantised, on every rank: a rank that chose other experts would spoil the sum.
    """

    def __init__(self, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.dtype = torch_dtype(config.dtype)
        name = "none" if config.quant == "none" else "panels"
        self.format = layer_format(name, config.num_experts, config.hidden_size, config, comm)
        for own, parameter in self.format.create_parameters().items():
            self.register_parameter(own, parameter)
        self.ops = op_table(config, comm)

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in self.format.parameter_names}

    def forward(self, x: Tensor) -> Tensor:
        return self.format.linear(self.ops, x, self.weights(), None, self.dtype)

    def pieces(self) -> list[Piece]:
        rows, columns = slice(0, self.format.outputs), slice(0, self.format.inputs)
        return [
            Piece(
                name="weight",
                full_shape=(self.format.outputs, self.format.inputs),
                source=(rows, columns),
                write=lambda dense: self.format.write(self.weights(), rows, dense),
                read=lambda: self.format.read(self.weights(), rows),
            )
        ]


class MoE(FeedForward):
    """x [..., hidden_size] -> [..., hidden_size]: the weighted sum of the chosen experts (Mixtral, Jiang et al., 2024).

    Every rank holds a slice of every expert, so that the work is even whatever the router picks.
    """

    def __init__(self, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.router = Router(config, comm)
        self.experts = nn.ModuleList(GatedMLP(config, comm, reduce_output=False) for _ in range(config.num_experts))
        self.experts_per_token = config.experts_per_token
        self.activation = config.hidden_act
        self.ops = op_table(config, comm)
        self.comm = comm
        self.dtype = torch_dtype(config.dtype)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        logits = self.router(tokens)
        if (panels := self._panels()) is not None:
            output = self.ops.panel_experts(tokens, logits, *panels, self.experts_per_token, self.activation)
        elif (matrices := self._matrices()) is not None:
            output = self.ops.experts(tokens, logits, *matrices, self.experts_per_token, self.activation)
        else:
            output = self._one_by_one(tokens, logits)
        return self.comm.all_reduce(output).view_as(x)

    def _one_by_one(self, tokens: Tensor, logits: Tensor) -> Tensor:
        weights, indices = self.ops.route_experts(logits, self.experts_per_token)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(indices == number)
            if rows.numel():
                weighted = expert(tokens[rows]) * weights[rows, place].unsqueeze(-1)
                output = output.index_add(0, rows, weighted.to(output.dtype))
        return output

    def _panels(self) -> tuple[list[Panels], list[Panels]] | None:
        """The experts' weights where one op can run them all: in panels, all in one format, without biases."""
        experts = [expert for expert in self.experts if isinstance(expert, GatedMLP)]
        gate_up = [expert.gate_up.panels() for expert in experts]
        proj = [expert.proj.panels() for expert in experts]
        found = [part for part in (*gate_up, *proj) if part is not None]
        if len(found) < 2 * len(gate_up) or len({(part.format, part.outputs) for part in found}) > 2:
            return None
        if found[0].outputs // 2 % LANES:
            return None
        return found[: len(gate_up)], found[len(gate_up) :]

    def _matrices(self) -> tuple[list[Tensor | ScaledWeight], list[Tensor | ScaledWeight]] | None:
        """The same of weights in rows: all in FP8 (whose inputs are rounded as they come), or all in the dtype of x."""
        experts = [expert for expert in self.experts if isinstance(expert, GatedMLP)]
        sides = [expert.gate_up.matrix() for expert in experts], [expert.proj.matrix() for expert in experts]
        found = [[weight for weight in side if weight is not None] for side in sides]
        kinds = {weight.dtype if isinstance(weight, Tensor) else weight.has_blocks for side in found for weight in side}
        whole = all(len(side) == len(experts) for side in found) and kinds in ({self.dtype}, {True}, {False})
        return (found[0], found[1]) if whole else None
