"""Mistral: LLaMA with a sliding window in every layer, where the config sets one (Jiang et al., 2023)."""

from __future__ import annotations

from typing import ClassVar

from puna.models.llama import LLaMAForCausalLM


class MistralForCausalLM(LLaMAForCausalLM):
    """All the difference is in how config.json is read: see `puna.config.FAMILIES`."""

    architecture: ClassVar[str] = "MistralForCausalLM"
