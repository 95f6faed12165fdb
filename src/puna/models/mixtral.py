"""Mixtral: LLaMA whose feed-forward part is made of experts (Jiang et al., 2024)."""

from __future__ import annotations

from typing import ClassVar

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.mlp import FeedForward
from puna.layers.moe import MoE
from puna.models.llama import LLaMADecoderLayer, LLaMAForCausalLM
from puna.models.names import LLAMA_NAMES, NameMap


class MixtralDecoderLayer(LLaMADecoderLayer):
    """A decoder layer with a mixture of experts in place of the MLP."""

    def build_mlp(self, config: LLaMAConfig, comm: Communicator) -> FeedForward:
        return MoE(config, comm)


class MixtralForCausalLM(LLaMAForCausalLM):
    """Checkpoints call the gate, up and down projections of an expert w1, w3 and w2."""

    architecture: ClassVar[str] = "MixtralForCausalLM"
    layer_class: ClassVar[type[LLaMADecoderLayer]] = MixtralDecoderLayer
    names: ClassVar[NameMap] = NameMap(
        (
            (".mlp.router.", ".block_sparse_moe.gate."),
            (".mlp.experts.", ".block_sparse_moe.experts."),
            (".gate_up.gate.", ".w1."),
            (".gate_up.up.", ".w3."),
            (".proj.", ".w2."),
            *LLAMA_NAMES.rules,
        )
    )
