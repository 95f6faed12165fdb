"""AttentionParams and KeyValueCacheParams: what a step knows about its tokens and where their keys and values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CacheTables:
    """Where the layers of one window have the keys and values of a step's sequences.

    block_tables int32 [B, blocks]: the cache blocks of each sequence, in order; entries past its end, and those whose
        tokens the window has left behind, name any.
    slot_mapping int64 [T]: where each token's key and value go, block * block size + offset.
    """

    block_tables: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionParams:
    """The packed tokens of a step: T tokens in one row, the newest ones of B sequences, each with some already cached.

    query_starts int32 [B + 1]: sequence b has the rows query_starts[b] .. query_starts[b + 1].
    sequence_lengths int32 [B]: tokens of each sequence, this step's included.
    cache_tables: one for each of `LLaMAConfig.windows`, nearly always a single one.
    rotary_lengths int64 [T]: the length by which dynamic and longrope choose frequencies: the prompt's, or the token's
        position + 1 where it comes after the prompt. So it does not depend on how the prompt was chunked.
    prompt_lengths: where all tokens of all sequences are in this step (whole prompts, nothing cached before), how many
        each has, so that devices which know how may attend without the cache; None elsewhere.
    cos_sin: the rotary angles of the tokens, float32 [T, D / 2] each; the model fills them in, once for all its layers.
    """

    query_starts: Tensor
    sequence_lengths: Tensor
    cache_tables: tuple[CacheTables, ...]
    rotary_lengths: Tensor
    prompt_lengths: tuple[int, ...] | None = None
    cos_sin: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class KeyValueCacheParams:
    """The cached keys and values of this rank's layers, in one of two forms.

    past_key_value: dense, the presents of the last call: a layer's (key, value), each [B, K, L, D].
    key_caches, value_caches: the paged pool, a tensor [blocks, K, block size, D] for each layer, written in place.
    """

    past_key_value: Sequence[tuple[Tensor, Tensor]] | None = None
    key_caches: Sequence[Tensor] | None = None
    value_caches: Sequence[Tensor] | None = None

    @property
    def past_length(self) -> int:
        """How many tokens the dense form holds."""
        return self.past_key_value[0][0].shape[2] if self.past_key_value else 0
