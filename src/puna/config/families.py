"""FAMILIES: what each architecture's config.json means where it differs from LLaMA's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. The defaults are those of transformers' config class, for fields that a file leaves out.

    `window`: whether `sliding_window` is ignored ("none"), holds for all layers, or is chosen layer by layer.
    `default_head_size` None means hidden_size / num_heads, and `default_kv_heads` None means num_heads.
    """

    model_type: str
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "all_layers", "by_layer"] = "none"
    has_experts: bool = False
    default_head_size: int | None = None
    default_kv_heads: int | None = None
    default_max_positions: int = 2048
    default_rms_norm_eps: float = 1e-6
    default_rotary_base: float = 10000.0
    default_window: int | None = None


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(model_type="llama", reads_attention_bias=True, reads_mlp_bias=True),
        "MistralForCausalLM": Family(
            model_type="mistral",
            window="all_layers",
            default_kv_heads=8,
            default_max_positions=131072,
            default_window=4096,
        ),
        "Qwen2ForCausalLM": Family(
            model_type="qwen2",
            qkv_bias=True,
            window="by_layer",
            default_kv_heads=32,
            default_max_positions=32768,
            default_window=4096,
        ),
        "Qwen3ForCausalLM": Family(
            model_type="qwen3",
            reads_attention_bias=True,
            qk_norm=True,
            window="by_layer",
            default_head_size=128,
            default_kv_heads=32,
            default_max_positions=32768,
            default_window=4096,
        ),
        "MixtralForCausalLM": Family(
            model_type="mixtral",
            window="all_layers",
            has_experts=True,
            default_kv_heads=8,
            default_max_positions=131072,
            default_rms_norm_eps=1e-5,
            default_rotary_base=1e6,
        ),
    }
)
