"""GatedMLP: the feed-forward part of a layer, proj(activation(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.linear import ColumnLinear, RowLinear, Segment
from puna.ops.scaled import InputScaling, ScaledRows


class FeedForward(nn.Module):
    """What a layer has after its attention: x [..., hidden_size] -> [..., hidden_size]."""

    @property
    def input_scaling(self) -> InputScaling | None:
        """How inputs may come rounded; None where only tensors do."""
        return None


class GatedMLP(FeedForward):
    """x [..., hidden_size] -> [..., hidden_size]; with `reduce_output` off, this rank's share of the sum."""

    def __init__(self, config: LLaMAConfig, comm: Communicator, reduce_output: bool = True) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.mlp_hidden_size, config.mlp_bias
        self.gate_up = ColumnLinear(hidden, (Segment("gate", inner), Segment("up", inner)), bias, config, comm)
        self.proj = RowLinear(inner, hidden, bias, config, comm, reduce_output)
        self.activation = config.hidden_act

    @property
    def input_scaling(self) -> InputScaling | None:
        return self.gate_up.input_scaling

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        y: Tensor = self.proj(self.gate_up.gated(x, self.activation, self.proj.input_scaling))
        return y
