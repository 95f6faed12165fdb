"""EngineConfig: how much an engine holds at once, and how it shares its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
Capture = Literal["lazy", "eager"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises ValueError for values out of range.

    max_model_len: the most tokens of prompt and output together; None means the model's context.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens of one step, over all sequences.
    kv_cache_memory: bytes for cached keys and values; None means what all sequences can need, as far as it fits.
    max_waiting: requests that may wait before others are refused; None means any number.
    max_skips: plans that a request may be passed over before it comes first (see scheduling/scheduler.py).
    seed: what the seeds of requests without one are drawn from.
    kv_cache_dtype: what keys and values are kept in; "auto" is the model's dtype, or fp8 where the checkpoint says so
        and there are kernels for it; int8 is for compiled kernels, fp8 (e4m3, times the scales that a checkpoint may
        have for them) for those of GPUs.
    threads: of the compiled CPU kernels, for the whole process; None means what this process may use.
    step_timeout: seconds after which a step counts as hanging, and the engine fails; None means that it may last.
    enforce_eager: run every step in Python instead of replaying recorded ones.
    capture: whether steps are captured on GPUs when they first come ("lazy") or all at the start ("eager").
    gpu_memory_utilization: the part of a GPU's memory that weights, workspace and cache may take together.
    deterministic: no result depends, in any bit, on what is computed beside it; costs time on GPUs, and holds on the
        compiled CPU kernels anyway.
    overlap_kernels: our kernels start before the ones ahead of them have ended; for GPUs from compute capability 9 on.
    tuning_dir: the folder of a file with what was measured of variants of a GPU's kernels; None means ~/.cache/puna.
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
    kv_cache_dtype: CacheDtype = "auto"
    threads: int | None = None
    step_timeout: float | None = None
    enforce_eager: bool = False
    capture: Capture = "lazy"
    gpu_memory_utilization: float = 0.9
    deterministic: bool = False
    overlap_kernels: bool = False
    tuning_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.kv_cache_dtype not in get_args(CacheDtype):
            known = ", ".join(get_args(CacheDtype))
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype!r}: use one of {known}")
        for name in ("max_model_len", "kv_cache_memory", "max_waiting", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1, or None")
        if self.capture not in get_args(Capture):
            raise ValueError(f"capture is {self.capture!r}: use one of {', '.join(get_args(Capture))}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {self.gpu_memory_utilization}: it must be above 0, at most 1")
        if self.step_timeout is not None and not self.step_timeout > 0:
            raise ValueError(f"step_timeout is {self.step_timeout}: it must be seconds, or None")
