"""A GGUF file's metadata and tensors as the fields of a Hugging Face config.json.

Sources: the GGUF specification for the names of the metadata; llama.cpp's readers of the architectures for what an
absent value means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from puna.checkpoints.gguf_file import GGUFFile, TensorEntry
from puna.config import FieldReader

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
ROPE_FACTORS: Final = "rope_freqs.weight"

# Values that change the arithmetic in other models: harmless at these, refused by name at any other.
_HARMLESS_ONLY_AT: Final = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.scale": (),
        "attention.max_alibi_bias": (0.0,),
        "attention.clamp_kqv": (0.0,),
        "attention.sliding_window_pattern": (),
        "attn_logit_softcapping": (),
        "final_logit_softcapping": (),
        "logit_scale": (0.0, 1.0),
        "residual_scale": (0.0, 1.0),
        "embedding_scale": (0.0, 1.0),
        "pooling_type": (0,),
        "nextn_predict_layers": (0,),
        "use_parallel_residual": (False,),
        "expert_shared_count": (0,),
        "expert_gating_func": (0, 1),  # 1: softmax
        "expert_weights_scale": (0.0, 1.0),
        "expert_weights_norm": (True,),
        "expert_group_count": (0, 1),
        "expert_group_used_count": (0, 1),
        "rope.dimension_sections": (),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.alpha": (0.0,),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (1.0,),
        "rope.scaling.yarn_log_multiplier": (0.0,),
    }
)
# What does not change the arithmetic, or follows from the tensors.
_NO_EFFECT: Final = frozenset(
    (
        "vocab_size",
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "expert_feed_forward_length",
        "interleave_moe_layer_step",
    )
)


def config_fields(file: GGUFFile, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The fields as a Hugging Face config.json has them; `tensors` are those of all files of the model.

    Raises ValueError for an architecture or an option that puna does not run, and for a missing or mistyped value.
    """
    architecture = file.value("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: the architecture {architecture!r} is not supported: puna runs {', '.join(ARCHITECTURES)} "
            "(Mistral and Mixtral are llama there)"
        )
    if EMBEDDING not in tensors:
        raise ValueError(f"{file.path} has no tensor {EMBEDDING}: it holds no model, or a part of one")
    reader = _reader(file, architecture)
    _refuse_unsupported(reader)
    heads, hidden = reader.count("attention.head_count"), reader.count("embedding_length")
    if hidden % heads and reader.value("attention.key_length") is None:
        raise reader.error("attention.head_count", heads, f"a divisor of embedding_length, {hidden}")
    head_size = reader.count("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if reader.count(name, head_size) != head_size:
            raise reader.error(name, reader.value(name), f"{head_size}, the size of a head's keys")
    base = reader.positive("rope.freq_base", 10000.0)
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": reader.count("feed_forward_length"),
        "vocab_size": tensors[EMBEDDING].shape[0],
        "num_hidden_layers": reader.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.count("attention.head_count_kv", heads),
        "head_dim": head_size,
        "rms_norm_eps": reader.positive("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": reader.count("context_length"),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(reader, tensors, base, head_size),
        "tie_word_embeddings": HEAD not in tensors,
        "torch_dtype": _dtype(tensors),
    }
    fields |= _family(reader, architecture, tensors)
    reader.warn_of_unread(_NO_EFFECT)
    return fields


def _reader(file: GGUFFile, architecture: str) -> FieldReader:
    """The architecture's own values, without its name; one for all layers where each has the same."""
    fields: dict[str, Any] = {}
    for key in file.keys:
        if key.startswith(f"{architecture}."):
            value, name = file.value(key), key.removeprefix(f"{architecture}.")
            if isinstance(value, np.ndarray):
                value = value.tolist()
                value = value[0] if value and value.count(value[0]) == len(value) else value
            fields[name] = value
    return FieldReader(fields, f"{file.path}: {architecture}")


def _refuse_unsupported(reader: FieldReader) -> None:
    for name, harmless in _HARMLESS_ONLY_AT.items():
        value = reader.value(name)
        if value is not None and value not in harmless:
            raise ValueError(f"{reader.source}: {name} is {value!r}: puna does not support this option")


def _family(reader: FieldReader, architecture: str, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """What differs between the families: which one it is, windows, experts and biases."""
    window = reader.optional_integer("attention.sliding_window") or None
    experts = reader.integer("expert_count", 0)
    experts_per_token = reader.count("expert_used_count") if experts else reader.integer("expert_used_count", 0)
    if architecture != "llama":
        name = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[architecture]
        if experts:
            raise reader.error("expert_count", experts, "0 in this architecture")
        fields = {"architectures": [name], "use_sliding_window": window is not None, "sliding_window": window}
        return {**fields, "max_window_layers": 0, "attention_bias": False}
    if experts:
        counts = {"num_local_experts": experts, "num_experts_per_tok": experts_per_token}
        return {"architectures": ["MixtralForCausalLM"], "sliding_window": window, **counts}
    if window is not None:
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    biases = {f"{part}_bias": f"blk.0.{tensor}.bias" in tensors for part, tensor in _BIASED}
    return {"architectures": ["LlamaForCausalLM"], **biases}


_BIASED: Final = (("attention", "attn_q"), ("mlp", "ffn_gate"))


def _dtype(tensors: Mapping[str, TensorEntry]) -> str:
    """What to compute in where nobody says: bfloat16 for quantised weights, else what the matrices are stored in."""
    names = {entry.type.name for entry in tensors.values() if len(entry.shape) > 1}
    if any(entry.type.is_quantized for entry in tensors.values()) or "BF16" in names:
        return "bfloat16"
    return "float16" if "F16" in names else "float32"


def _rope_scaling(
    reader: FieldReader, tensors: Mapping[str, TensorEntry], base: float, head_size: int
) -> dict[str, Any] | None:
    # llama.cpp takes a factor without a type for linear scaling, which is how old files have it.
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 0.0)) or 1.0
    kind = reader.choice("rope.scaling.type", ("none", "linear", "yarn"), "linear")
    original = reader.optional_count("rope.scaling.original_context_length")
    fast, slow = reader.value("rope.scaling.yarn_beta_fast"), reader.value("rope.scaling.yarn_beta_slow")
    factors = _rope_factors(tensors, head_size)
    if kind == "yarn":
        if factors is not None:
            raise reader.error("rope.scaling.type", kind, f"none beside the tensor {ROPE_FACTORS}")
        fields = {"original_max_position_embeddings": original, "beta_fast": fast, "beta_slow": slow}
        given = {name: value for name, value in fields.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, **given}
    linear = factor if kind == "linear" else 1.0
    if factors is not None and not np.all(factors == 1):
        return _scaling_by_factors(factors * np.float32(linear), base, head_size)
    return {"rope_type": "linear", "factor": linear} if linear != 1 else None


def _rope_factors(tensors: Mapping[str, TensorEntry], head_size: int) -> npt.NDArray[np.float32] | None:
    """What each frequency is divided by, float32 [D / 2]: how files have Llama 3.1's scaling."""
    entry = tensors.get(ROPE_FACTORS)
    if entry is None:
        return None
    if entry.type.name != "F32" or entry.shape != (head_size // 2,):
        raise ValueError(
            f"{entry.file}: {ROPE_FACTORS} is {entry.type.name} {list(entry.shape)}: it must be F32 {[head_size // 2]}"
        )
    factors: npt.NDArray[np.float32] = np.array(entry.rows()).view("<f4")[0]
    if not np.all(np.isfinite(factors)) or not np.all(factors > 0):
        raise ValueError(f"{entry.file}: {ROPE_FACTORS} holds values that are not positive: fetch the file again")
    return factors


def _scaling_by_factors(factors: npt.NDArray[np.float32], base: float, head_size: int) -> dict[str, Any]:
    """Llama 3.1's parameters if they give these factors, so that the angles are those of its config.json to the bit;
    else the factors themselves, as longrope that does not depend on the length."""
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_size, 2) / head_size)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
        frequencies = {"low_freq_factor": low, "high_freq_factor": high}
        return {
            "rope_type": "llama3",
            "factor": factor,
            **frequencies,
            "original_max_position_embeddings": original,
        }
    values = factors.tolist()
    return {"rope_type": "longrope", "short_factor": values, "long_factor": values, "attention_factor": 1.0}
