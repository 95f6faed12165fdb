"""RandomCheckpoint: the same numbers whatever part is read, of the right spread, and a model that runs."""

from __future__ import annotations

import pytest
import torch

import puna
from puna.config import LLaMAConfig
from puna.models.random_weights import random_checkpoint

CONFIG = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    hidden_size=64,
    mlp_hidden_size=96,
    vocab_size=300,
    max_position_embeddings=64,
)
QUERY = "model.layers.0.self_attn.q_proj.weight"
WHOLE = (slice(0, 64), slice(0, 64))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_part_is_that_part_of_the_whole(quantization: str | None) -> None:
    checkpoint = random_checkpoint(CONFIG, quantization=quantization)
    whole = checkpoint.read(QUERY, WHOLE)
    assert torch.equal(checkpoint.read(QUERY, (slice(5, 9), slice(3, 30))), whole[5:9, 3:30])
    again = random_checkpoint(CONFIG, quantization=quantization)
    assert torch.equal(again.read(QUERY, WHOLE), whole)
    other = random_checkpoint(CONFIG, seed=1, quantization=quantization)
    assert not torch.equal(other.read(QUERY, WHOLE), whole)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_numbers_are_normal_and_differ(quantization: str | None) -> None:
    checkpoint = random_checkpoint(CONFIG, quantization=quantization)
    embedding = checkpoint.read("model.embed_tokens.weight", (slice(0, 300), slice(0, 64)))
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert embedding.mean().item() == pytest.approx(0, abs=0.001)
    assert len(set(map(tuple, embedding.tolist()))) == 300
    key = checkpoint.read("model.layers.0.self_attn.k_proj.weight", (slice(0, 32), slice(0, 64)))
    value = checkpoint.read("model.layers.0.self_attn.v_proj.weight", (slice(0, 32), slice(0, 64)))
    assert not torch.equal(key, value)
    norm = checkpoint.read("model.norm.weight", (slice(0, 64),))
    assert norm.mean().item() == pytest.approx(1, abs=0.01)
    assert norm.std().item() > 0.01


@pytest.mark.parametrize(("quantization", "codes", "name"), [("int8", 256, "Q8_0"), ("int4", 16, "Q4_0")])
def test_codes_and_scales(quantization: str, codes: int, name: str) -> None:
    checkpoint = random_checkpoint(CONFIG, quantization=quantization)
    groups = checkpoint.read_quantized(QUERY, WHOLE)
    assert groups is not None
    assert (checkpoint.dtype(QUERY), checkpoint.dtype("model.norm.weight")) == (name, "float32")
    assert torch.equal(groups.dequantize(), checkpoint.read(QUERY, WHOLE))
    assert groups.codes.max() == codes - 1
    assert groups.codes.unique().numel() > codes * 0.9
    assert torch.equal(groups.scales.to(torch.float16).to(torch.float32), groups.scales)
    assert groups.scales.min() > 0
    part = checkpoint.read_quantized(QUERY, (slice(8, 16), slice(32, 64)))
    assert part is not None
    assert torch.equal(part.dequantize(), groups.dequantize()[8:16, 32:])
    assert checkpoint.read_quantized(QUERY, (slice(8, 16), slice(16, 64))) is None
    assert checkpoint.read_quantized("model.norm.weight", (slice(0, 64),)) is None


def test_it_loads_and_predicts() -> None:
    model = puna.load_model(random_checkpoint(CONFIG))  # type: ignore[arg-type]  # a checkpoint that is open
    logits = model(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 300)
    assert logits.isfinite().all()
    assert logits.std().item() > 0.01
