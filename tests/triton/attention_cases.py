"""Launches of attention kernels at the sizes of Llama 3.1 8B, to be compiled for Hopper; see sm90.py."""

from __future__ import annotations

import torch
from torch import Tensor

from puna.ops import triton_attention

HEADS, KV_HEADS, SIZE, BLOCK_SIZE = 32, 8, 128, 16


def inputs(sequences: int, tokens: int, context: int, cache: torch.dtype) -> list[Tensor]:
    """Nothing runs, so one block is a cache as good as any."""
    blocks = context // BLOCK_SIZE
    width = SIZE + 4 if cache == torch.int8 else SIZE
    caches = [torch.zeros((4, KV_HEADS, BLOCK_SIZE, width)).to(cache) for _ in range(2)]
    return [
        torch.zeros((tokens, HEADS, SIZE), dtype=torch.bfloat16),
        *caches,
        torch.zeros((sequences, blocks), dtype=torch.int32),
        torch.zeros(sequences + 1, dtype=torch.int32),
        torch.zeros(sequences, dtype=torch.int32),
    ]


def _launch(sequences: int, tokens: int, context: int, cache: torch.dtype, deterministic: bool = False) -> None:
    given = inputs(sequences, tokens, context, cache)
    triton_attention.paged_attention(*given, SIZE**-0.5, None, deterministic=deterministic)


def decode_one() -> None:
    for cache in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        _launch(1, 1, 4096, cache)


def decode_many() -> None:
    for cache in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        _launch(1024, 1024, 4096, cache)


def prefill() -> None:
    for cache in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        _launch(1, 8192, 8192, cache)


def deterministic() -> None:
    for cache in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        _launch(64, 64, 4096, cache, True)
        _launch(1, 1, 8192, cache, True)
