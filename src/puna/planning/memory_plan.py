"""MemoryPlan: whether weights, workspace and cache fit into memory, decided before anything is allocated."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass

from puna.config import CacheDtype, LLaMAConfig
from puna.mapping import Mapping
from puna.planning.memory import DTYPE_BYTES, cached_head_bytes, parameter_counts
from puna.scheduling.block_manager import most_blocks

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
    kv_cache_dtype: CacheDtype = "auto"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by what they are for; and for each of the config's `windows` the cache's blocks, the dummy included."""

    weights: int
    workspace: int
    cache: int
    num_blocks: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.cache


def plan_memory(
    config: LLaMAConfig,
    mapping: Mapping,
    capacity: Capacity,
    available: int,
    kv_cache_memory: int | None = None,
    weights: int | None = None,
    *,
    workspace: int | None = None,
    cache_share: float | None = None,
) -> MemoryPlan:
    """Sums up a rank's memory and sizes its cache: as `kv_cache_memory` says, or what all sequences can need at once
    if that fits into most of what is left. All ranks get the same plan, which is that of the fullest one.

    Where layers have different windows, each has as many blocks as the others while that is of use: so there are never
    fewer of any than if all layers shared one table, and what windowed layers can't use goes to the others.

    `available`, `kv_cache_memory`, `weights` and `workspace` are bytes; `weights` None means those of a model that is
    not quantised, `workspace` None an upper estimate. `cache_share` is what the cache may take at most of what is left.
    Raises ValueError, with the sums and the largest context and batch that
    would fit, where not even one sequence of `max_model_len` tokens does.
    """
    weights = _weights(config, mapping) if weights is None else weights
    workspace = _workspace(config, capacity) if workspace is None else workspace
    left = available - weights - workspace
    if left <= 0:
        raise ValueError(
            f"the model does not fit: weights of {_gib(weights)} and a workspace of {_gib(workspace)} are more than "
            f"the {_gib(available)} that are free: use a smaller model or dtype, or a smaller max_num_batched_tokens"
        )
    if kv_cache_memory is not None:
        budget, source = kv_cache_memory, "kv_cache_memory"
        if kv_cache_memory > left:
            raise ValueError(
                f"kv_cache_memory is {_gib(kv_cache_memory)}, but beside weights of {_gib(weights)} and a workspace of "
                f"{_gib(workspace)} only {_gib(max(left, 0))} of {_gib(available)} are free: ask for less"
            )
    else:
        budget, source = int(left * (_CACHE_SHARE if cache_share is None else cache_share)), "the cache"
    needed = _cache_bytes(config, mapping, _num_blocks(config, capacity, 1), capacity)
    if needed > budget:
        longest = longest_context(config, mapping, capacity, budget)
        raise ValueError(
            f"max_model_len is {capacity.max_model_len}, whose keys and values take {_gib(needed)}, but {source} has "
            f"{_gib(budget)} (free {_gib(available)}, weights {_gib(weights)}, workspace {_gib(workspace)}): the "
            f"largest context that fits is {longest} tokens, for one sequence at a time"
        )
    num_blocks = _largest_that_fits(config, mapping, capacity, budget)
    cache = _cache_bytes(config, mapping, num_blocks, capacity)
    return MemoryPlan(weights=weights, workspace=workspace, cache=cache, num_blocks=num_blocks)


def longest_context(config: LLaMAConfig, mapping: Mapping, capacity: Capacity, budget: int) -> int:
    """The most tokens, up to `capacity.max_model_len`, that one sequence can have with a cache of `budget` bytes."""

    def takes(num_tokens: int) -> int:
        shorter = dataclasses.replace(capacity, max_model_len=num_tokens)
        return _cache_bytes(config, mapping, _num_blocks(config, shorter, 1), capacity)

    size = capacity.block_size
    blocks = bisect.bisect_right(
        range(1, -(-capacity.max_model_len // size) + 1), budget, key=lambda n: takes(n * size)
    )
    return min(blocks * size, capacity.max_model_len)


def _num_blocks(config: LLaMAConfig, capacity: Capacity, num_sequences: int) -> tuple[int, ...]:
    """For each window, the most blocks that so many sequences hold at once, and the dummy block."""
    length, step, size = capacity.max_model_len, capacity.max_num_batched_tokens, capacity.block_size
    return tuple(most_blocks(window, length, num_sequences, step, size) + 1 for window in config.windows)


def _cache_bytes(config: LLaMAConfig, mapping: Mapping, num_blocks: tuple[int, ...], capacity: Capacity) -> int:
    """Bytes of the fullest rank's keys and values."""
    # A rank holds a share of the heads, but at least one of them.
    heads = -(-config.num_kv_heads // mapping.tp_size)
    per_block = 2 * heads * capacity.block_size * cached_head_bytes(config, capacity.kv_cache_dtype)
    stages = (dataclasses.replace(mapping, rank=stage * mapping.tp_size) for stage in range(mapping.pp_size))
    blocks_of = dict(zip(config.windows, num_blocks, strict=True))
    held = (stage.pp_layers(config.num_layers) for stage in stages)
    return per_block * max(sum(blocks_of[config.layer_window(layer)] for layer in layers) for layers in held)


def _largest_that_fits(config: LLaMAConfig, mapping: Mapping, capacity: Capacity, budget: int) -> tuple[int, ...]:
    """Equally many blocks for each window, but no fewer than one sequence needs, and no more than all can use."""
    bounds = list(
        zip(_num_blocks(config, capacity, 1), _num_blocks(config, capacity, capacity.max_num_seqs), strict=True)
    )

    def at(count: int) -> tuple[int, ...]:
        return tuple(min(max(count, least), most) for least, most in bounds)

    counts = range(1, max(most for _, most in bounds) + 1)
    fitting = bisect.bisect_right(counts, budget, key=lambda count: _cache_bytes(config, mapping, at(count), capacity))
    return at(fitting)


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
