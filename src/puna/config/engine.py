"""EngineConfig: how much an engine holds at once, and how it shares its cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises ValueError for values out of range.

    max_model_len: the most tokens of prompt and output together; None means the model's context.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens of one step, over all sequences.
    kv_cache_memory: bytes for cached keys and values; None means what all sequences can need, as far as it fits.
    max_waiting: requests that may wait before others are refused; None means any number.
    max_skips: plans that a request may be passed over before it comes first (see scheduling/scheduler.py).
    seed: what the seeds of requests without one are drawn from.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory: int | None = None
    enable_prefix_caching: bool = True
    max_waiting: int | None = None
    max_skips: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("max_model_len", "kv_cache_memory", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1, or None")
