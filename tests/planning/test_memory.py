"""Parameters and memory from a config, against the parameters and the caches of real modules."""

from __future__ import annotations

import pytest
import torch

from puna.config import LLaMAConfig
from puna.models import MODELS
from puna.planning.memory import key_value_bytes_per_token, parameter_counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_counts_are_those_of_the_module(architecture: str, tied: bool) -> None:
    config = LLaMAConfig(
        architecture=architecture,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_size=10,
        hidden_size=44,
        mlp_hidden_size=36,
        vocab_size=77,
        dtype="bfloat16",
        attn_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        num_experts=3 if architecture == "MixtralForCausalLM" else 0,
        experts_per_token=1 if architecture == "MixtralForCausalLM" else 0,
        tie_embeddings=tied,
    )
    model = MODELS[architecture](config)
    counts = parameter_counts(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert list(counts.by_part) == [part for part in counts.by_part if counts.by_part[part] > 0]
    unused = 0
    if config.num_experts:
        unused = sum(
            p.numel() for name, p in model.named_parameters() if ".experts." in name and ".experts.0." not in name
        )
    assert counts.active == counts.total - unused

    _, presents = model(torch.zeros(1, 5, dtype=torch.int64), use_cache=True)
    held = sum(tensor.numel() * tensor.element_size() for present in presents for tensor in present)
    assert key_value_bytes_per_token(config) == held // 5
    assert key_value_bytes_per_token(config, "float32") == 2 * held // 5
