"""Scales of keys and values in an FP8 cache: with them fits what is out of e4m3's range; others have no need of any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.config import CacheDtype, LLaMAConfig
from puna.distributed import NullCommunicator
from puna.layers.params import AttentionParams, CacheTables
from puna.models import LLaMAForCausalLM
from puna.runtime.kv_pool import KVPool

CONFIG = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    hidden_size=32,
    mlp_hidden_size=48,
    vocab_size=97,
    max_position_embeddings=128,
)
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
BLOCK = 4


def model_of(keys: float, values: float) -> LLaMAForCausalLM:
    """Its keys and values are so much larger than those of an ordinary model, which its other weights make up for."""
    torch.manual_seed(1)
    model = LLaMAForCausalLM(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for layer in model.layers:
            qkv = layer.attention.qkv.weight
            qkv[:32] /= keys
            qkv[32:48] *= keys
            qkv[48:] *= values
            layer.attention.dense.weight.div_(values)
    return model.eval()


@torch.no_grad()
def packed(model: LLaMAForCausalLM, dtype: CacheDtype, chunks: tuple[int, ...] = (7, 3, 1)) -> Tensor:
    """Logits [11, V] of the tokens, which come in chunks."""
    pool = KVPool(CONFIG, NullCommunicator(), (8,), BLOCK, dtype)
    blocks = torch.tensor([[5, 2, 7]], dtype=torch.int32)
    found, done = [], 0
    for count in chunks:
        positions = torch.arange(done, done + count)
        slots = blocks[0, positions // BLOCK].long() * BLOCK + positions % BLOCK
        params = AttentionParams(
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            sequence_lengths=torch.tensor([done + count], dtype=torch.int32),
            cache_tables=(CacheTables(blocks, slots),),
            rotary_lengths=torch.full((count,), len(TOKENS)),
            prompt_lengths=(count,) if done == 0 else None,
        )
        found.append(model(TOKENS[positions], positions, attention_params=params, kv_cache_params=pool.params()))
        done += count
    return torch.cat(found)


def error(model: LLaMAForCausalLM, dtype: CacheDtype) -> float:
    with torch.no_grad():
        wanted = model(TOKENS[None])[0]
    return float((packed(model, dtype) - wanted).norm() / wanted.norm())


def test_numbers_that_do_not_fit() -> None:
    model = model_of(keys=2000, values=1e-5)
    assert error(model, "auto") < 1e-5
    assert error(model, "fp8") > 0.2
    model.set_cache_scales({0: (16.0, 1e-7), 1: (16.0, 1e-7)})
    assert error(model, "fp8") < 0.05
    # In the same storage but for another scale of one layer: each layer has its own.
    model.set_cache_scales({0: (16.0, 1e-7)})
    assert error(model, "fp8") > 0.05


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_scales_that_change_no_bits(dtype: CacheDtype) -> None:
    """Powers of two move exponents only; caches of other types have the range without."""
    model = model_of(keys=1, values=1)
    plain = packed(model, dtype)
    model.set_cache_scales({0: (0.25, 2.0**-3), 1: (0.5, 0.25)} if dtype == "fp8" else {0: (0.3, 7.0)})
    scaled = packed(model, dtype)
    if dtype == "auto":
        assert torch.equal(scaled, plain)
    else:
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-3)
