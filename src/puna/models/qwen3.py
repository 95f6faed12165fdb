"""Qwen3: LLaMA with an RmsNorm on every query and key head, before the rotation (2025)."""

from __future__ import annotations

from typing import ClassVar

from puna.models.llama import LLaMAForCausalLM


class Qwen3ForCausalLM(LLaMAForCausalLM):
    """All the difference is in how config.json is read: see `puna.config.FAMILIES`."""

    architecture: ClassVar[str] = "Qwen3ForCausalLM"
