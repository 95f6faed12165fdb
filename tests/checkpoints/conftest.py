"""Tiny checkpoints of every family, made by transformers, and a way to change the files of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.models import load_model

CONFIGS = MappingProxyType(
    {
        "LlamaForCausalLM": transformers.LlamaConfig,
        "MistralForCausalLM": transformers.MistralConfig,
        "Qwen2ForCausalLM": transformers.Qwen2Config,
        "Qwen3ForCausalLM": transformers.Qwen3Config,
        "MixtralForCausalLM": transformers.MixtralConfig,
    }
)
SIZES = MappingProxyType(
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 67,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
)
TOKENS = ((3, 14, 15, 9, 26, 53, 58), (66, 0, 1, 2, 4, 8, 16))


class Folder:
    """A checkpoint folder whose files a test changes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return content

    def change_config(self, **changes: object) -> None:
        """Sets fields; `...` takes one out."""
        content = {name: value for name, value in (self.config | changes).items() if value is not ...}
        (self.path / "config.json").write_text(json.dumps(content))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Of all safetensors files together."""
        result: dict[str, Tensor] = {}
        for file in self.path.glob("*.safetensors"):
            result |= load_file(file)
        return result

    def write(self, *shards: dict[str, Tensor], index: bool = False) -> None:
        """Writes the weights anew: model.safetensors, or numbered shards, with an index or without."""
        for file in [*self.path.glob("*.safetensors"), *self.path.glob("*.index.json")]:
            file.unlink()
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        names = ["model.safetensors"] if len(shards) == 1 and not index else names
        for name, tensors in zip(names, shards, strict=True):
            save_file(tensors, self.path / name, metadata={"format": "pt"})
        if index:
            self.write_index({key: name for name, shard in zip(names, shards, strict=True) for key in shard})

    def write_index(self, weight_map: object) -> None:
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def halves(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors in two shards."""
        tensors = self.tensors
        names = sorted(tensors)
        middle = len(names) // 2
        return {name: tensors[name] for name in names[:middle]}, {name: tensors[name] for name in names[middle:]}

    def reference_logits(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[2, 7, V] of TOKENS, from transformers."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).eval()
        with torch.no_grad():
            logits: Tensor = model(torch.tensor(TOKENS)).logits
        return logits

    def logits(self, dtype: str | None = None, quantization: str | None = None) -> Tensor:
        """The same from puna."""
        with torch.no_grad():
            logits: Tensor = load_model(self.path, dtype, quantization=quantization)(torch.tensor(TOKENS))
        return logits


MakeFolder = Callable[..., Folder]


@pytest.fixture
def make(tmp_path: Path) -> MakeFolder:
    """make(architecture="LlamaForCausalLM", name="model", dtype=float32, **config fields) -> Folder"""

    def build(
        architecture: str = "LlamaForCausalLM",
        name: str = "model",
        dtype: torch.dtype = torch.float32,
        save_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Folder:
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(CONFIGS[architecture](**SIZES | options))
        for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
            torch.nn.init.normal_(parameter, mean=0.1 if parameter.ndim == 1 else 0.0, std=0.2)
        model.to(dtype).save_pretrained(tmp_path / name, **(save_options or {}))
        return Folder(tmp_path / name)

    return build
