"""MetaCheckpoint: the layout of Meta's and Mistral's own releases, params.json with consolidated*.safetensors.

Their names and their order of the rotary channels differ from Hugging Face's: they rotate neighbouring channels
(2i, 2i + 1), where Hugging Face's checkpoints pair i with i + D / 2. Reading a q or k projection reorders its rows.
Releases for several GPUs are split into files, each with a slice of every matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoints.base import Checkpoint
from puna.checkpoints.safetensors_files import SafetensorsFiles
from puna.config import GenerationConfig, read_json_object

# Their names, ours, and the axis along which releases for several GPUs are split (None: every file has a copy).
_LAYER_RULES = (
    ("attention_norm.weight", "input_layernorm.weight", None),
    ("attention.wq.weight", "self_attn.q_proj.weight", 0),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0),
    ("attention.wo.weight", "self_attn.o_proj.weight", 1),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", 1),
)


class MetaCheckpoint(Checkpoint):
    """Opens the folder. Raises FileNotFoundError without weights, ValueError for pickles, damage and unknown params."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._params = read_json_object(folder / "params.json")
        self._shards = [SafetensorsFiles([file]) for file in _weight_files(folder)]
        self._rules = self._name_rules()
        known = {theirs for theirs, _ in self._rules.values()} | {"rope.freqs"}
        for shard in self._shards:
            unknown = sorted(set(shard.names) - known)
            if unknown:
                raise ValueError(f"{folder} has the tensor {unknown[0]}, which Meta's layout does not know")
        self._fields = self._config_fields()

    @property
    def config_fields(self) -> Mapping[str, Any]:
        return self._fields

    @property
    def config_source(self) -> str:
        return str(self.folder / "params.json")

    @property
    def generation_config(self) -> GenerationConfig:
        return GenerationConfig.from_hugging_face(self.folder)

    @property
    def names(self) -> tuple[str, ...]:
        stored = set(self._shards[0].names)
        return tuple(sorted(ours for ours, (theirs, _) in self._rules.items() if theirs in stored))

    def shape(self, name: str) -> tuple[int, ...]:
        theirs, axis = self._rules[name]
        shape = list(self._shards[0].shape(theirs))
        if axis is not None:
            shape[axis] = sum(shard.shape(theirs)[axis] for shard in self._shards)
        return tuple(shape)

    def dtype(self, name: str) -> str:
        return self._shards[0].dtype(self._rules[name][0])

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        theirs, axis = self._rules[name]
        shards = self._shards if axis is not None else self._shards[:1]
        parts = [shard.read(theirs, tuple(slice(0, size) for size in shard.shape(theirs))) for shard in shards]
        tensor = parts[0] if axis is None else torch.cat(parts, dim=axis)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _halves_from_pairs(tensor, self._fields["head_dim"])
        return tensor[source]

    def _name_rules(self) -> dict[str, tuple[str, int | None]]:
        embedding = "tok_embeddings.weight"
        # LLaMA 1 and 2 split the embedding along the channels, Llama 3 along the vocabulary.
        rules: dict[str, tuple[str, int | None]] = {
            "model.embed_tokens.weight": (embedding, self._embedding_axis(embedding)),
            "model.norm.weight": ("norm.weight", None),
            "lm_head.weight": ("output.weight", 0),
        }
        for layer in range(_integer(self._params, "n_layers", self.folder)):
            for theirs, ours, axis in _LAYER_RULES:
                rules[f"model.layers.{layer}.{ours}"] = (f"layers.{layer}.{theirs}", axis)
        return rules

    def _embedding_axis(self, name: str) -> int:
        hidden = _integer(self._params, "dim", self.folder)
        if name not in self._shards[0].names:
            raise ValueError(f"{self.folder} has no tensor {name}: the download is incomplete")
        return 0 if self._shards[0].shape(name)[1] == hidden else 1

    def _config_fields(self) -> dict[str, Any]:
        params, folder = self._params, self.folder
        if params.get("moe") is not None or params.get("quantization_args") is not None:
            raise ValueError(
                f"{folder / 'params.json'}: experts and quantization are not supported in this layout: use "
                "the Hugging Face version of the model"
            )
        for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate_proj.weight"):
            if self._rules[name][0] not in self._shards[0].names and name != "lm_head.weight":
                raise ValueError(f"{folder} has no tensor {self._rules[name][0]}: the download is incomplete")
        hidden, heads = _integer(params, "dim", folder), _integer(params, "n_heads", folder)
        window = params.get("sliding_window")
        fields: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
            "hidden_size": hidden,
            # params.json tells it through three factors; the weights tell it directly, as they do the vocabulary.
            "intermediate_size": self.shape("model.layers.0.mlp.gate_proj.weight")[0],
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "num_hidden_layers": _integer(params, "n_layers", folder),
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads,
            "head_dim": params.get("head_dim") or hidden // heads,
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": params.get("rope_theta", 10000.0),
            "max_position_embeddings": params.get("max_seq_len") or 2048,
            "tie_word_embeddings": "output.weight" not in self._shards[0].names,
        }
        if window is not None:
            fields["sliding_window"] = window
        if params.get("use_scaled_rope"):
            # Llama 3.1's scaling is fixed in Meta's code; 3.2 uses the factor 32 instead of 8, and says so in params.json.
            fields["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": float(params.get("rope_scale_factor", 8.0)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            fields["max_position_embeddings"] = params.get("max_seq_len") or 131072
        return fields


def _halves_from_pairs(weight: Tensor, head_size: int) -> Tensor:
    """Reorders the rows of [heads * D, E]: channel 2i of a head goes to i, and 2i + 1 to D / 2 + i."""
    heads, inputs = weight.shape[0] // head_size, weight.shape[1]
    return weight.view(heads, head_size // 2, 2, inputs).transpose(1, 2).reshape(heads * head_size, inputs)


def _integer(params: Mapping[str, Any], name: str, folder: Path) -> int:
    value = params.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{folder / 'params.json'}: {name} is {value!r}: it must be a positive whole number")
    return value


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated*.safetensors"))
    if files:
        return files
    if any(folder.glob("consolidated*.pth")):
        raise ValueError(
            f"{folder} holds pickled weights (consolidated*.pth), which can run code when they are read: fetch the "
            "safetensors version"
        )
    raise FileNotFoundError(f"{folder} has params.json but no consolidated*.safetensors")
