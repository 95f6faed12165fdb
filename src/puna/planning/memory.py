"""Parameters by part of the model, and the bytes that they and the cached keys and values take."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from puna.config import CacheDtype, LLaMAConfig

DTYPE_BYTES: Final = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """How many numbers each part of a model holds. `head` is 0 where it shares the embedding's weight.

    `mlp` is 0 in a model of experts, `router` and `experts` in one without. `norms` counts those of q and k too.
    """

    embedding: int
    attention: int
    mlp: int
    router: int
    experts: int
    norms: int
    head: int
    active_expert_share: float = 1.0

    @property
    def by_part(self) -> dict[str, int]:
        """The parts that the model has, in the order in which a token meets them."""
        names = ("embedding", "attention", "mlp", "router", "experts", "norms", "head")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def total(self) -> int:
        return sum(self.by_part.values())

    @property
    def active(self) -> int:
        """Those that take part in computing one token: all but the experts that the router does not pick."""
        return self.total - self.experts + round(self.experts * self.active_expert_share)


def parameter_counts(config: LLaMAConfig) -> ParameterCounts:
    """The parameters of the whole model, unsharded and unpadded."""
    hidden, size = config.hidden_size, config.head_size
    query, key_value = config.num_heads * size, config.num_kv_heads * size
    attention = hidden * (2 * query + 2 * key_value)
    if config.attn_bias:
        attention += query + 2 * key_value
    if config.attn_output_bias:
        attention += hidden
    mlp = 3 * hidden * config.mlp_hidden_size
    if config.mlp_bias:
        mlp += 2 * config.mlp_hidden_size + hidden
    norms = 2 * hidden + (2 * size if config.qk_norm else 0)
    has_experts = config.num_experts > 0
    return ParameterCounts(
        embedding=config.vocab_size * hidden,
        attention=config.num_layers * attention,
        mlp=0 if has_experts else config.num_layers * mlp,
        router=config.num_layers * hidden * config.num_experts,
        experts=config.num_layers * config.num_experts * mlp,
        norms=config.num_layers * norms + hidden,
        head=0 if config.tie_embeddings else config.vocab_size * hidden,
        active_expert_share=config.experts_per_token / config.num_experts if has_experts else 1.0,
    )


def cached_head_bytes(config: LLaMAConfig, dtype: CacheDtype = "auto") -> int:
    """Bytes of one head's key, or value, of one token in the cache; int8 has a float32 scale beside the codes."""
    if dtype == "int8":
        return config.head_size + 4
    if dtype == "fp8":
        return config.head_size
    return config.head_size * DTYPE_BYTES[config.dtype if dtype == "auto" else dtype]


def key_value_bytes_per_token(config: LLaMAConfig, dtype: CacheDtype = "auto") -> int:
    """Bytes of keys and values that one token leaves in the caches of all layers."""
    return 2 * config.num_layers * config.num_kv_heads * cached_head_bytes(config, dtype)
