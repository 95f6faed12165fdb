"""What a model is, read with types from its files: LLaMAConfig, RotaryScaling, GenerationConfig and the families."""

from __future__ import annotations

from puna.config.families import FAMILIES, Family
from puna.config.fields import FieldReader, read_json_object
from puna.config.generation import GenerationConfig
from puna.config.model import Activation, Dtype, LLaMAConfig, read_architecture
from puna.config.rotary import RotaryScaling, RotaryType

__all__ = [
    "FAMILIES",
    "Activation",
    "Dtype",
    "Family",
    "FieldReader",
    "GenerationConfig",
    "LLaMAConfig",
    "RotaryScaling",
    "RotaryType",
    "read_architecture",
    "read_json_object",
]
