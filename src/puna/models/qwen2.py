"""Qwen2 and Qwen2.5: LLaMA with a bias on q, k and v, and a sliding window in the upper layers if wanted (2024)."""

from __future__ import annotations

from typing import ClassVar

from puna.models.llama import LLaMAForCausalLM


class Qwen2ForCausalLM(LLaMAForCausalLM):
    """All the difference is in how config.json is read: see `puna.config.FAMILIES`."""

    architecture: ClassVar[str] = "Qwen2ForCausalLM"
