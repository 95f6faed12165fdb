"""KVPool of a mixed model: as many blocks as their window's pool has, and copies in the layers that it is about."""

from __future__ import annotations

import psutil
import pytest
import torch

from puna.config import CacheDtype, LLaMAConfig
from puna.distributed import NullCommunicator
from puna.planning.memory import cached_head_bytes
from puna.runtime.kv_pool import KVPool
from puna.scheduling.step_plan import BlockCopy

CONFIG = LLaMAConfig(
    architecture="Qwen2ForCausalLM",
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    hidden_size=32,
    mlp_hidden_size=48,
    vocab_size=97,
    sliding_window=6,
    sliding_window_layers=(1, 3),
)


def test_layers_have_the_blocks_of_their_window() -> None:
    pool = KVPool(CONFIG, NullCommunicator(), (6, 3), 4)
    for caches in (pool.key_caches, pool.value_caches):
        assert [tuple(cache.shape) for cache in caches] == [(6, 2, 4, 8), (3, 2, 4, 8)] * 2
    for wrong in ((6,), (6, 3, 3), (6, 0)):
        with pytest.raises(ValueError, match=r"give a number for each of the windows \(None, 6\)"):
            KVPool(CONFIG, NullCommunicator(), wrong, 4)


def test_copies_are_of_one_windows_layers() -> None:
    pool = KVPool(CONFIG, NullCommunicator(), (6, 3), 4)
    for number, cache in enumerate((*pool.key_caches, *pool.value_caches)):
        for block in range(len(cache)):
            cache[block] = 10 * number + block
    pool.copy_blocks([BlockCopy(1, 1, 2), BlockCopy(0, 1, 5), BlockCopy(0, 5, 1), BlockCopy(1, 2, 0)])
    for number, cache in enumerate((*pool.key_caches, *pool.value_caches)):
        blocks = [2, 1, 1] if number % 2 else [0, 5, 2, 3, 4, 1]
        assert (cache.flatten(1) == 10 * number + torch.tensor(blocks).unsqueeze(1)).all()


@pytest.mark.parametrize(("dtype", "stored"), [("fp8", torch.float8_e4m3fn), ("int8", torch.int8)])
def test_caches_of_one_byte(dtype: CacheDtype, stored: torch.dtype) -> None:
    pool = KVPool(CONFIG, NullCommunicator(), (6, 3), 4, dtype)
    cache = pool.key_caches[0]
    assert cache.dtype == stored
    assert cache[0, 0].numel() == 4 * cached_head_bytes(CONFIG, dtype)
    cache[1] = torch.ones(cache.shape[1:]).to(stored)
    pool.copy_blocks([BlockCopy(0, 1, 5)])
    assert (cache[5].float() == 1).all()
    assert (cache[4].float() == 0).all()


def test_blocks_that_nobody_uses_take_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    pool = KVPool(CONFIG, NullCommunicator(), (300_000, 3), 16)
    size = sum(cache.numel() * cache.element_size() for cache in (*pool.key_caches, *pool.value_caches))
    assert size > 500 * 2**20
    assert psutil.Process().memory_info().rss - before < 50 * 2**20
    for cache in (*pool.key_caches, *pool.value_caches):
        assert cache.data_ptr() % 64 == 0
        assert torch.equal(cache[-2:], torch.zeros_like(cache[-2:]))
        cache[-1] = 1
        assert (cache[-1] == 1).all()
