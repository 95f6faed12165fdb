"""What a model is, read with types from its files, and how an engine is set up."""

from __future__ import annotations

from puna.config.engine import CacheDtype, Capture, EngineConfig
from puna.config.families import FAMILIES, Family
from puna.config.fields import FieldReader, read_json_object
from puna.config.generation import GenerationConfig
from puna.config.model import Activation, Dtype, LLaMAConfig, read_architecture
from puna.config.rotary import RotaryScaling, RotaryType

__all__ = [
    "FAMILIES",
    "Activation",
    "CacheDtype",
    "Capture",
    "Dtype",
    "EngineConfig",
    "Family",
    "FieldReader",
    "GenerationConfig",
    "LLaMAConfig",
    "RotaryScaling",
    "RotaryType",
    "read_architecture",
    "read_json_object",
]
