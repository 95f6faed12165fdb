"""MetaCheckpoint: the layout of Meta's and Mistral's own releases, params.json with consolidated*.safetensors.

Their names and their order of the rotary channels differ from Hugging Face's: they rotate neighbouring channels
(2i, 2i + 1), where Hugging Face's checkpoints pair i with i + D / 2. Reading a q or k projection reorders its rows.
Meta's releases for several GPUs are split into numbered files, each with a slice of every matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from puna.checkpoints.base import Checkpoint
from puna.checkpoints.rotary_order import rows_of_halves
from puna.checkpoints.safetensors_files import SafetensorsFiles
from puna.config import FieldReader, GenerationConfig, read_json_object

# Their names, ours, and the axis along which releases for several GPUs are split (None: every file has a copy).
_LAYER_RULES: Final = (
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
_EMBEDDING: Final = "tok_embeddings.weight"
_FIRST_MLP: Final = "layers.0.feed_forward.w1.weight"
_ROTATED: Final = ("q_proj.weight", "k_proj.weight")

# Params that only say how the sizes came about, or how much memory Meta's code sets aside.
_NO_EFFECT: Final = frozenset(("multiple_of", "ffn_dim_multiplier", "max_batch_size"))


class MetaCheckpoint(Checkpoint):
    """Opens the folder. Raises FileNotFoundError without weights, ValueError for pickles, damage and unknown params."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._params = FieldReader(read_json_object(folder / "params.json"), self.config_source)
        self._generation_config = GenerationConfig.from_hugging_face(folder)
        self._shards = _open_shards(folder)
        for name in (_EMBEDDING, _FIRST_MLP):
            if name not in self._shards[0].names:
                raise ValueError(f"{folder} has no tensor {name}: the download is incomplete")
        self._rules = self._name_rules()
        self._check_shards()
        self._fields = self._config_fields()

    @property
    def config_fields(self) -> Mapping[str, Any]:
        return self._fields

    @property
    def config_source(self) -> str:
        return str(self.folder / "params.json")

    @property
    def generation_config(self) -> GenerationConfig:
        return self._generation_config

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
        if not name.endswith(_ROTATED):
            return self._read_stored(name, source)
        rows = self.shape(name)[0]
        whole = self._read_stored(name, (slice(0, rows), source[1]))
        return whole[rows_of_halves(rows, self._fields["head_dim"])[source[0]]]

    def _read_stored(self, name: str, source: tuple[slice, ...]) -> Tensor:
        """The slices of a tensor, with its rows as they are stored, put together from the shards one by one."""
        theirs, axis = self._rules[name]
        if axis is None or len(self._shards) == 1:
            return self._shards[0].read(theirs, source)
        wanted, start = source[axis], 0
        result = torch.empty([part.stop - part.start for part in source], dtype=getattr(torch, self.dtype(name)))
        for shard in self._shards:
            stop = start + shard.shape(theirs)[axis]
            first, last = max(wanted.start, start), min(wanted.stop, stop)
            if first < last:
                here = (*source[:axis], slice(first - start, last - start), *source[axis + 1 :])
                result.narrow(axis, first - wanted.start, last - first).copy_(shard.read(theirs, here))
            start = stop
        return result

    def _name_rules(self) -> dict[str, tuple[str, int | None]]:
        # LLaMA 1 and 2 split the embedding along the channels, Llama 3 along the vocabulary.
        embedding_axis = 0 if self._shards[0].shape(_EMBEDDING)[-1] == self._params.count("dim") else 1
        rules: dict[str, tuple[str, int | None]] = {
            "model.embed_tokens.weight": (_EMBEDDING, embedding_axis),
            "model.norm.weight": ("norm.weight", None),
            "lm_head.weight": ("output.weight", 0),
        }
        layers = self._params.count("n_layers")
        if layers > len(self._shards[0].names):
            raise self._params.error("n_layers", layers, "the number of layers in consolidated*.safetensors")
        for layer in range(layers):
            for theirs, ours, axis in _LAYER_RULES:
                rules[f"model.layers.{layer}.{ours}"] = (f"layers.{layer}.{theirs}", axis)
        return rules

    def _check_shards(self) -> None:
        """Raises ValueError for tensors of another layout, and for shards that do not belong together."""
        axes = dict(self._rules.values())
        first = self._shards[0]
        for shard in self._shards:
            for name in sorted(set(shard.names) ^ set(first.names)):
                raise ValueError(
                    f"{self.folder}: only some of the consolidated*.safetensors have {name}: fetch them again"
                )
            for name in shard.names:
                if name == "rope.freqs":  # follows from the params
                    continue
                if name not in axes or len(shard.shape(name)) != (1 if axes[name] is None else 2):
                    raise ValueError(
                        f"{self.folder} has the tensor {name} {list(shard.shape(name))}, which Meta's layout of a "
                        "LLaMA does not have: use the Hugging Face version of the model"
                    )
                if _without(shard.shape(name), axes[name]) != _without(first.shape(name), axes[name]):
                    raise ValueError(
                        f"{self.folder}: the shapes of {name} in the files, {list(first.shape(name))} and "
                        f"{list(shard.shape(name))}, do not fit together: fetch the files again"
                    )

    def _config_fields(self) -> dict[str, Any]:
        params = self._params
        hidden, heads = params.count("dim"), params.count("n_heads")
        if hidden % heads != 0 and params.value("head_dim") is None:
            raise params.error("n_heads", heads, f"a divisor of dim, {hidden}")
        # params.json tells the sizes of LLaMA's MLPs through factors; the weights tell it directly.
        mlp_hidden, vocabulary = (
            self.shape("model.layers.0.mlp.gate_proj.weight")[0],
            self.shape("model.embed_tokens.weight")[0],
        )
        for name, stored in (("hidden_dim", mlp_hidden), ("vocab_size", vocabulary)):
            given = params.optional_integer(name)
            if given not in (None, -1, stored):  # -1: LLaMA 1 and 2 leave the vocabulary to the tokenizer
                raise params.error(name, given, f"{stored}, as in the weights")
        window = params.optional_count("sliding_window")
        scaling = _rope_scaling(params, hidden)
        rope_theta = params.positive("rope_theta", 10000.0)
        if "rope_theta" not in params.fields and params.value("hidden_dim") is not None and window is None:
            raise ValueError(
                f"{params.source}: the field rope_theta is missing: Mistral's releases have two values of it"
            )
        fields = {
            "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": mlp_hidden,
            "vocab_size": vocabulary,
            "num_hidden_layers": params.count("n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": params.optional_count("n_kv_heads") or heads,
            "head_dim": params.optional_count("head_dim") or hidden // heads,
            "rms_norm_eps": params.positive("norm_eps", 1e-5),
            "rope_theta": rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": params.optional_count("max_seq_len") or _context_length(params),
            "tie_word_embeddings": "output.weight" not in self._shards[0].names,
        }
        if window is not None:
            fields["sliding_window"] = window
        unknown = params.unread(_NO_EFFECT)
        if unknown:
            raise ValueError(
                f"{params.source}: {', '.join(unknown)}: puna does not support this in a params.json: use the "
                "Hugging Face version of the model"
            )
        return fields


def _rope_scaling(params: FieldReader, hidden_size: int) -> dict[str, Any] | None:
    """Llama 3.1's scaling. Its numbers are in Meta's code; of the factor, params.json names only newer values."""
    factor = params.value("rope_scaling_factor")
    if not params.boolean("use_scaled_rope", False):
        return None
    if factor is None:
        # 8 in 3.1 and 3.3, from 8B on; 32 in the 1B and 3B of 3.2, whose params.json do not say it
        # (meta-llama/llama-models, issues 166 and 241).
        by_hidden_size = {2048: 32.0, 3072: 32.0, 4096: 8.0, 8192: 8.0, 16384: 8.0}
        if hidden_size not in by_hidden_size:
            raise ValueError(
                f"{params.source}: use_scaled_rope without rope_scaling_factor, in a model that is no Llama 3.1 to "
                "3.3: add the factor"
            )
        factor = by_hidden_size[hidden_size]
    return {
        "rope_type": "llama3",
        "factor": params.positive("rope_scaling_factor", factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": params.positive("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }


def _context_length(params: FieldReader) -> int:
    """What a model was trained for, in tokens. params.json does not say it, unless someone adds `max_seq_len`."""
    if params.value("use_scaled_rope"):
        return 131072  # Llama 3.1 and later
    if params.value("hidden_dim") is not None:
        return 32768  # Mistral 7B
    by_rope_theta = {500000.0: 8192, 1000000.0: 16384}  # Llama 3, Code Llama
    return by_rope_theta.get(
        params.positive("rope_theta", 10000.0), 2048
    )  # LLaMA 1; the same params in Llama 2 mean 4096


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return tuple(size for number, size in enumerate(shape) if number != axis)


def _open_shards(folder: Path) -> list[SafetensorsFiles]:
    """The files of one or several GPUs. Raises FileNotFoundError where one is missing."""
    names = sorted(file.name for file in folder.glob("consolidated*.safetensors"))
    if not names and any(folder.glob("consolidated*.pth")):
        raise ValueError(
            f"{folder} holds pickled weights (consolidated*.pth), which can run code when they are read: fetch the "
            "safetensors version"
        )
    if not names:
        raise FileNotFoundError(f"{folder} has params.json but no consolidated*.safetensors: fetch the weights")
    expected = [f"consolidated.{number:02d}.safetensors" for number in range(len(names))]
    numbered = re.fullmatch(r"consolidated-\d+-of-(\d+)\.safetensors", names[0])
    if numbered:  # Mistral's large releases: each tensor is whole, in one of the files
        count = int(numbered[1])
        expected = [f"consolidated-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    elif names == ["consolidated.safetensors"]:
        expected = names
    absent = sorted(set(expected) - set(names))
    if absent:
        raise FileNotFoundError(f"{folder} has {', '.join(names)}, but no {absent[0]}: fetch it")
    paths = [folder / name for name in expected]
    return [SafetensorsFiles(paths)] if numbered else [SafetensorsFiles([path]) for path in paths]
