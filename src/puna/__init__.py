"""puna runs LLaMA-family language models: the public names, each imported when it is first used.

`import puna` itself imports neither torch nor anything else that is slow (PEP 562), which keeps the command line quick.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from puna.config import EngineConfig, GenerationConfig, LLaMAConfig
    from puna.engine.async_engine import AsyncEngine
    from puna.engine.engine import Engine
    from puna.engine.outputs import RequestOutput
    from puna.engine.tokenizer import Tokenizer
    from puna.llm import LLM
    from puna.mapping import Mapping
    from puna.models import load_model
    from puna.models.llama import LLaMADecoderLayer, LLaMAForCausalLM, LLaMAModel
    from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams

# The only place of the version: the package's metadata reads it from here.
__version__: Final = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "Engine",
    "EngineConfig",
    "GenerationConfig",
    "GuidedDecoding",
    "LLaMAConfig",
    "LLaMADecoderLayer",
    "LLaMAForCausalLM",
    "LLaMAModel",
    "Mapping",
    "RequestOutput",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "load_model",
]

_MODULE_OF: Final = MappingProxyType(
    {
        "AsyncEngine": "puna.engine.async_engine",
        "Engine": "puna.engine.engine",
        "EngineConfig": "puna.config",
        "GenerationConfig": "puna.config",
        "GuidedDecoding": "puna.scheduling.sampling_params",
        "LLM": "puna.llm",
        "LLaMAConfig": "puna.config",
        "LLaMADecoderLayer": "puna.models.llama",
        "LLaMAForCausalLM": "puna.models.llama",
        "LLaMAModel": "puna.models.llama",
        "Mapping": "puna.mapping",
        "RequestOutput": "puna.engine.outputs",
        "SamplingParams": "puna.scheduling.sampling_params",
        "Tokenizer": "puna.engine.tokenizer",
        "load_model": "puna.models",
    }
)


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value  # later accesses no longer come through here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
