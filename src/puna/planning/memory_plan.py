"""MemoryPlan: whether weights, workspace and cache fit into memory, decided before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from puna.config import LLaMAConfig
from puna.mapping import Mapping
from puna.planning.memory import DTYPE_BYTES, key_value_bytes_per_token, parameter_counts

# Of what is left after weights and workspace, the share that the cache may take if nobody says how much. Other
# processes, and the pages of the checkpoint's files, want the rest.
_CACHE_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What an engine is asked to hold at once. Tokens, but for `max_num_seqs`."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    max_scored_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by what they are for, and the cache's blocks (the dummy block included)."""

    weights: int
    workspace: int
    cache: int
    num_blocks: int

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.cache


def plan_memory(
    config: LLaMAConfig, mapping: Mapping, capacity: Capacity, available: int, kv_cache_memory: int | None = None
) -> MemoryPlan:
    """Sums up a rank's memory and sizes its cache: as `kv_cache_memory` says, or what all sequences can need at once
    if that fits into most of what is left. All ranks get the same plan, which is that of the fullest one.

    `available` and `kv_cache_memory` are bytes. Raises ValueError, with the sums and the largest context and batch that
    would fit, where not even one sequence of `max_model_len` tokens does.
    """
    weights = _weights(config, mapping)
    workspace = _workspace(config, capacity)
    left = available - weights - workspace
    if left <= 0:
        raise ValueError(
            f"the model does not fit: weights of {_gib(weights)} and a workspace of {_gib(workspace)} are more than "
            f"the {_gib(available)} that are free: use a smaller model or dtype, or a smaller max_num_batched_tokens"
        )
    bytes_per_block = key_value_bytes_per_token(config) * capacity.block_size
    # A rank holds a share of the heads, but at least one of them, and of the layers.
    bytes_per_block = bytes_per_block // (config.num_kv_heads * config.num_layers)
    bytes_per_block *= -(-config.num_kv_heads // mapping.tp_size) * _held_layers(config, mapping)
    blocks_per_sequence = -(-capacity.max_model_len // capacity.block_size)
    wanted = blocks_per_sequence * capacity.max_num_seqs + 1
    if kv_cache_memory is not None:
        budget, source = kv_cache_memory, "kv_cache_memory"
        if kv_cache_memory > left:
            raise ValueError(
                f"kv_cache_memory is {_gib(kv_cache_memory)}, but beside weights of {_gib(weights)} and a workspace of "
                f"{_gib(workspace)} only {_gib(max(left, 0))} of {_gib(available)} are free: ask for less"
            )
    else:
        budget, source = int(left * _CACHE_SHARE), "the cache"
    num_blocks = min(wanted, budget // bytes_per_block)
    if num_blocks < blocks_per_sequence + 1:
        longest = max(0, num_blocks - 1) * capacity.block_size
        raise ValueError(
            f"max_model_len is {capacity.max_model_len}, whose keys and values take "
            f"{_gib((blocks_per_sequence + 1) * bytes_per_block)}, but {source} has {_gib(budget)} (free "
            f"{_gib(available)}, weights {_gib(weights)}, workspace {_gib(workspace)}): the largest context that fits "
            f"is {longest} tokens, for one sequence at a time"
        )
    return MemoryPlan(weights=weights, workspace=workspace, cache=num_blocks * bytes_per_block, num_blocks=num_blocks)


def _held_layers(config: LLaMAConfig, mapping: Mapping) -> int:
    """Those of the fullest stage."""
    return -(-config.num_layers // mapping.pp_size)


def _weights(config: LLaMAConfig, mapping: Mapping) -> int:
    """Bytes of the fullest rank's weights: an upper bound that counts what every rank of a stage repeats."""
    counts, tp = parameter_counts(config), mapping.tp_size
    # Key and value heads are repeated where there are fewer than ranks.
    repeated = (
        2
        * (config.hidden_size + config.attn_bias)
        * config.head_size
        * max(0, tp - config.num_kv_heads)
        * config.num_layers
    )
    split = -(-(counts.attention + repeated + counts.mlp + counts.experts) // tp)
    layers = -(-(split + counts.norms + counts.router) * _held_layers(config, mapping) // config.num_layers)
    ends = counts.embedding + counts.head
    if mapping.pp_size > 1:  # the first stage has the embedding, the last the head, which may be a copy of it
        ends = max(counts.embedding, counts.head)
    return (layers + -(-ends // tp)) * DTYPE_BYTES[config.dtype]


def _workspace(config: LLaMAConfig, capacity: Capacity) -> int:
    """An upper estimate of what a step holds beside weights and cache.

    Hidden states and their normalised copies, q/k/v, the MLP's gate, up and product; logits three times over (as they
    come, in float32, and as probabilities); and the keys and values of one sequence, gathered by the reference op.
    """
    size = DTYPE_BYTES[config.dtype]
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    per_token = 4 * config.hidden_size + 2 * qkv + 3 * config.mlp_hidden_size * max(1, config.experts_per_token)
    gathered = 2 * capacity.max_model_len * config.num_kv_heads * config.head_size
    logits = 3 * 4 * (capacity.max_num_seqs + capacity.max_scored_tokens) * config.vocab_size
    return (capacity.max_num_batched_tokens * per_token + gathered) * size + logits


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
