"""Attention: grouped-query self-attention with rotary positions, over dense presents or a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.linear import ColumnLinear, RowLinear, Segment
from puna.layers.norm import RmsNorm
from puna.layers.params import AttentionParams, KeyValueCacheParams
from puna.layers.pieces import op_table
from puna.layers.rotary import RotaryEmbedding
from puna.ops.scaled import FP8

Present = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Hidden states in, hidden states out, of the same shape: [B, S, E] dense, [T, E] packed.

    Each rank holds its share of the query heads and of the key/value heads (at least one of these). Raises ValueError
    where the query heads can't be split evenly.
    """

    def __init__(self, config: LLaMAConfig, layer_idx: int, comm: Communicator) -> None:
        super().__init__()
        heads, kv_heads, head_size = config.num_heads, config.num_kv_heads, config.head_size
        if heads % comm.mapping.tp_size != 0:
            raise ValueError(f"tp_size is {comm.mapping.tp_size}: it must divide the {heads} attention heads")
        self.head_size = head_size
        self.scale = head_size**-0.5
        self.sliding_window = config.layer_window(layer_idx)
        self.window_idx = config.window_idx(layer_idx)
        self.local_layer_idx = layer_idx - comm.mapping.pp_layers(config.num_layers).start
        self.qkv = ColumnLinear(
            config.hidden_size,
            (Segment("q", heads, head_size), Segment("k", kv_heads, head_size), Segment("v", kv_heads, head_size)),
            config.attn_bias,
            config,
            comm,
        )
        self.q_norm = RmsNorm(head_size, config, comm) if config.qk_norm else None
        self.k_norm = RmsNorm(head_size, config, comm) if config.qk_norm else None
        self.rotary = RotaryEmbedding(config)
        # What keys and values are divided by before an FP8 cache holds them, so that they fit its range.
        self.cache_scales = (1.0, 1.0)
        self.dense = RowLinear(heads * head_size, config.hidden_size, config.attn_output_bias, config, comm)
        self.ops = op_table(config, comm)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
    ) -> tuple[Tensor, Present | None]:
        """The output, and for the dense form the keys and values of all tokens so far, each [B, K, L, D].

        attention_mask: bool [B, L], true where a token is real; dense only.
        """
        query, key, value = (part.view(*part.shape[:-1], -1, self.head_size) for part in self.qkv.split(hidden_states))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = self._angles(position_ids, attention_params)
        if attention_params is not None:
            return self.dense(self._packed(query, key, value, (cos, sin), kv_cache_params, attention_params)), None
        query, key = self.ops.rotary(query, cos, sin), self.ops.rotary(key, cos, sin)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if kv_cache_params is not None and kv_cache_params.past_key_value is not None:
            past_key, past_value = kv_cache_params.past_key_value[self.local_layer_idx]
            key, value = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        context = self.ops.attention(query.transpose(1, 2), key, value, attention_mask, self.scale, self.sliding_window)
        return self.dense(context.transpose(1, 2).flatten(2)), (key, value)

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        kv_cache_params: KeyValueCacheParams | None,
        params: AttentionParams,
    ) -> Tensor:
        """Rotates query [T, H, D] and key [T, K, D], stores key and value, and attends to the pool -> [T, H * D]."""
        if kv_cache_params is None or kv_cache_params.key_caches is None or kv_cache_params.value_caches is None:
            raise ValueError("packed tokens need a paged cache: pass kv_cache_params with key_caches and value_caches")
        key_cache = kv_cache_params.key_caches[self.local_layer_idx]
        value_cache = kv_cache_params.value_caches[self.local_layer_idx]
        tables = params.cache_tables[self.window_idx]
        scale, value_scale = self.scale, 1.0
        if self.cache_scales != (1.0, 1.0) and key_cache.dtype == FP8:
            # The ops know of no scales: q @ (s k) = s (q @ k), and what weights sum up of values comes back scaled.
            key_scale, value_scale = self.cache_scales
            key, value, scale = key / key_scale, value / value_scale, scale * key_scale
        query, key = self.ops.rotate_and_store(query, key, value, cos_sin, key_cache, value_cache, tables.slot_mapping)
        if params.prompt_lengths is not None:
            context = self.ops.prompt_attention(query, key, value, params.prompt_lengths, scale, self.sliding_window)
            return self._scaled_back(context, value_scale)
        context = self.ops.paged_attention(
            query,
            key_cache,
            value_cache,
            tables.block_tables,
            params.query_starts,
            params.sequence_lengths,
            scale,
            self.sliding_window,
        )
        return self._scaled_back(context, value_scale)

    @staticmethod
    def _scaled_back(context: Tensor, value_scale: float) -> Tensor:
        """[T, H, D] -> [T, H * D]"""
        return context.flatten(1) if value_scale == 1.0 else context.flatten(1) * value_scale

    def _angles(self, position_ids: Tensor, params: AttentionParams | None) -> tuple[Tensor, Tensor]:
        if params is not None:
            return params.cos_sin if params.cos_sin is not None else self.rotary(position_ids, params.rotary_lengths)
        lengths = position_ids.amax(dim=-1, keepdim=True) + 1 if self.rotary.depends_on_length else None
        angles: tuple[Tensor, Tensor] = self.rotary(position_ids, lengths)
        return angles
