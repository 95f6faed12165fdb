"""Which model is measured, at which lengths: Llama 3.1 8B, Llama 3.3 70B, or a tiny one for trying the script."""

from __future__ import annotations

from typing import Final

import torch
from gpu_parts.arithmetic import ROWS_8B, ROWS_70B
from gpu_parts.runs import Setting

from puna.config import LLaMAConfig
from puna.config.presets import PRESETS

SHAPES: Final = ("llama-3.1-8b", "llama-3.3-70b", "tiny")
# Sequences at once: the published runs' default was 2,048; more than 1,024 of these lengths do not fit the cache.
_AT_ONCE: Final = 1024
_BATCHED_TOKENS: Final = 8192


def setting_of(shape: str, device: torch.device) -> Setting:
    if shape == "tiny":
        config = LLaMAConfig(
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_size=32,
            hidden_size=128,
            mlp_hidden_size=256,
            vocab_size=320,
            max_position_embeddings=1024,
            dtype="bfloat16",
        )
        return Setting(config, device, ROWS_8B, at_once=4, batched_tokens=64, scale=64)
    rows = ROWS_8B if shape == "llama-3.1-8b" else ROWS_70B
    return Setting(PRESETS[shape], device, rows, _AT_ONCE, _BATCHED_TOKENS)
