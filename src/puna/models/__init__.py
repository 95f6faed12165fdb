"""The model families, and `load_model`, which picks one by a checkpoint's architecture."""

from __future__ import annotations

from collections.abc import Mapping as ReadOnlyDict
from pathlib import Path
from types import MappingProxyType

import torch

from puna.checkpoints import Checkpoint, open_checkpoint
from puna.config import read_architecture
from puna.distributed import Communicator
from puna.mapping import Mapping
from puna.models.llama import LLaMAForCausalLM
from puna.models.loading import ModelLoader
from puna.models.mistral import MistralForCausalLM
from puna.models.mixtral import MixtralForCausalLM
from puna.models.qwen2 import Qwen2ForCausalLM
from puna.models.qwen3 import Qwen3ForCausalLM

_CLASSES = (LLaMAForCausalLM, MistralForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)

# By the name in config.json's `architectures`; puna.config.FAMILIES says how each one's config is read.
MODELS: ReadOnlyDict[str, type[LLaMAForCausalLM]] = MappingProxyType({model.architecture: model for model in _CLASSES})


def load_model(
    path: str | Path | Checkpoint,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mapping: Mapping | None = None,
    comm: Communicator | None = None,
    quantization: str | None = None,
) -> LLaMAForCausalLM:
    """Loads a checkpoint: a folder, a GGUF file, the id of one on the Hugging Face hub, "demo" for the model in the
    package, or one that is open.

    `dtype` is float32, bfloat16 or float16, as a name or as torch's own; None means the checkpoint's. With a
    `mapping` of several ranks, this rank's slice alone is read, and torch.distributed must be initialised; `comm`
    brings another communicator instead.

    `quantization` is for inference only: weights in the layout of the compiled kernels, "bf16", "int8", "int4", on
    GPUs "fp8", or "stored", each as the checkpoint has it. None gives plain matrices, which can be trained.

    Raises FileNotFoundError where there is no checkpoint, and ValueError, before any weight is read, for an
    architecture or option that is not supported, and for missing, surplus, misshapen or truncated tensors.
    """
    return model_loader(path, dtype, device, mapping, comm, quantization).load()


def model_loader(
    path: str | Path | Checkpoint,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mapping: Mapping | None = None,
    comm: Communicator | None = None,
    quantization: str | None = None,
    deterministic: bool = False,
) -> ModelLoader[LLaMAForCausalLM]:
    """The first half of `load_model`, with the same arguments and errors: nothing is allocated yet.

    `deterministic` is LLaMAConfig's.
    """
    checkpoint = open_checkpoint(path)
    architecture = read_architecture(checkpoint.config_fields, checkpoint.config_source)
    return ModelLoader(MODELS[architecture], checkpoint, dtype, device, mapping, comm, quantization, deterministic)


__all__ = ["MODELS", "LLaMAForCausalLM", "load_model", "model_loader"]
