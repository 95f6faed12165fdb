"""packed_ops: the names of the ops that a model calls in its packed form, as far as its weights' types tell."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from puna.layers.linear import ColumnLinear, RowLinear
from puna.layers.mlp import GatedMLP
from puna.layers.moe import MoE, Router
from puna.models.llama import LLaMAForCausalLM
from puna.ops.scaled import FP8

_ALWAYS: Final = ("add", "embedding", "paged_attention", "rms_norm", "rotate_and_store")
# Of a linear layer, of one with gates, and of experts, by the type of the weight; plain matrices have the others.
_IN_ROWS: Final = ("linear", "gated_linear", "experts")
_OTHERS: Final = MappingProxyType(
    {
        torch.uint8: ("panel_linear", "panel_gated_linear", "panel_experts"),
        FP8: ("scaled_linear", "scaled_gated_linear", "experts"),
    }
)


def packed_ops(model: LLaMAForCausalLM, reports_prompts: bool) -> frozenset[str]:
    """`reports_prompts`: steps of nothing but whole prompts are told to be such. The model needs no storage."""
    found = set(_ALWAYS) | ({"prompt_attention"} if reports_prompts else set())
    has_experts = any(isinstance(module, MoE) for module in model.modules())
    linears: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, GatedMLP):
            ops = (_OTHERS.get(dtype, _IN_ROWS) for dtype in _weight_dtypes(module.gate_up))
            found |= {experts if has_experts else gated for _, gated, experts in ops}
        elif isinstance(module, (ColumnLinear, RowLinear, Router)):
            linears |= _weight_dtypes(module)
    found |= {_OTHERS.get(dtype, _IN_ROWS)[0] for dtype in linears}
    if FP8 in linears:  # whose inputs are rounded by the norm before them, or by themselves
        found |= {"quantize_rows", "rms_norm_scaled"}
    found.add("add_rms_norm_scaled" if FP8 in linears and not has_experts else "add_rms_norm")
    if model.vocab_embedding is not None and torch.uint8 in _weight_dtypes(model.vocab_embedding):
        found.add("panel_embedding")
    return frozenset(found)


def _weight_dtypes(module: nn.Module) -> set[torch.dtype]:
    return {one.dtype for name, one in module.named_parameters(recurse=False) if name.startswith("weight")}
