"""GatedMLP: the feed-forward part of a layer, proj(activation(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.linear import ColumnLinear, RowLinear, Segment


class GatedMLP(nn.Module):
    """x [..., hidden_size] -> [..., hidden_size]; with `reduce_output` off, this rank's share of the sum."""

    def __init__(self, config: LLaMAConfig, comm: Communicator, reduce_output: bool = True) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.mlp_hidden_size, config.mlp_bias
        self.gate_up = ColumnLinear(hidden, (Segment("gate", inner), Segment("up", inner)), bias, config, comm)
        self.proj = RowLinear(inner, hidden, bias, config, comm, reduce_output)
        self.activation = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(self.gate_up.gated(x, self.activation))
        return y
