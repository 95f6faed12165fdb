"""write_gguf: a Hugging Face folder as a GGUF file, with the names, row order and metadata of llama.cpp's converter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor

from puna.config import LLaMAConfig

ARCHITECTURES = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "llama",
        "MixtralForCausalLM": "llama",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
    }
)
_NAMES = (
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
)
_EXPERT_PARTS = MappingProxyType({"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"})


def write_gguf(
    folder: Path,
    path: Path,
    tensor_type: str = "F32",
    *,
    split_experts: bool = False,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    without: tuple[str, ...] = (),
    pre: str = "gpt-2",
    replaced: Mapping[str, tuple[np.ndarray[Any, Any], str]] = MappingProxyType({}),
) -> Path:
    """Writes the model in `folder`, and its tokenizer if it has one.

    Matrices become `tensor_type` (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1) if their rows have whole blocks, and
    F32 otherwise. `metadata` adds or replaces values, `without` leaves values and tensors out; `pre` names a BPE's
    pre-tokenizer; `replaced` brings the rows of bytes of tensors, with their type.
    """
    config = LLaMAConfig.from_hugging_face(folder)
    arch = ARCHITECTURES[config.architecture]
    values = {**config_metadata(config, arch), **tokenizer_metadata(folder, pre), **metadata}
    writer = gguf.GGUFWriter(path, arch)
    for name, value in values.items():
        if name not in without:
            _add(writer, name, value)
    for name, (rows, kind_name) in replaced.items():
        writer.add_tensor(name, rows, raw_dtype=Type[kind_name])
    for name, tensor in converted_tensors(folder, config, split_experts).items():
        if name in replaced or name in without:
            continue
        kind = Type[tensor_type] if tensor.ndim > 1 and not name.endswith("ffn_gate_inp.weight") else Type.F32
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Type.F32
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(path: Path, values: Mapping[str, Any]) -> Path:
    """A file with a tokenizer alone: `values` without "tokenizer.ggml." before each name, None for none."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        if value is not None:
            _add(writer, name if name.startswith("tokenizer.") else f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def config_metadata(config: LLaMAConfig, arch: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_hidden_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rotary_base,
        "rope.dimension_count": config.head_size,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    if config.num_experts:
        values |= {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}
    scaling = config.rotary_scaling
    if scaling is not None and scaling.type in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling.type, "rope.scaling.factor": scaling.factor}
    if scaling is not None and scaling.type == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    return {f"{arch}.{name}": value for name, value in values.items()}


def converted_tensors(folder: Path, config: LLaMAConfig, split_experts: bool = False) -> dict[str, Tensor]:
    """The tensors under llama.cpp's names and in its order of rows."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    result: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in stored.items():
        parts = name.split(".")
        if ".experts." in name:
            layer, expert, part = parts[2], int(parts[5]), _EXPERT_PARTS[parts[6]]
            if split_experts:
                result[f"blk.{layer}.{part}.{expert}.weight"] = tensor
            else:
                experts.setdefault(f"blk.{layer}.{part}_exps.weight", {})[expert] = tensor
            continue
        theirs = name
        for old, new in _NAMES:
            theirs = theirs.replace(old, new)
        if ARCHITECTURES[config.architecture] == "llama" and ("attn_q." in theirs or "attn_k." in theirs):
            half = config.head_size // 2
            pairs = tensor.view(-1, 2, half, *tensor.shape[1:]).transpose(1, 2)
            tensor = pairs.reshape(tensor.shape)
        result[theirs] = tensor
    for theirs, by_expert in experts.items():
        result[theirs] = torch.stack([by_expert[expert] for expert in range(len(by_expert))])
    scaling = config.rotary_scaling
    if scaling is not None and scaling.type == "llama3":
        result["rope_freqs.weight"] = _llama3_factors(config)
    return result


def _llama3_factors(config: LLaMAConfig) -> Tensor:
    scaling = config.rotary_scaling
    assert scaling is not None
    factor, low, high = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert factor is not None
    assert low is not None
    assert high is not None
    assert original is not None
    factors = []
    for frequency in 1.0 / (config.rotary_base ** (torch.arange(0, config.head_size, 2).float() / config.head_size)):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return torch.tensor(factors)


def tokenizer_metadata(folder: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """Of a tokenizer.model, or of a tokenizer.json: byte-level BPE, or BPE with byte fallback as sentencepiece's."""
    if (folder / "tokenizer.model").is_file():
        values = _sentencepiece_metadata(folder / "tokenizer.model")
    elif (folder / "tokenizer.json").is_file():
        values = _json_metadata(json.loads((folder / "tokenizer.json").read_text()), pre)
    else:
        return {}
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        if token is not None:
            values[f"{theirs}_token_id"] = values["tokens"].index(token)
    if "add_bos_token" in config:
        values["add_bos_token"] = config["add_bos_token"]
    named = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    return named | ({"tokenizer.chat_template": config["chat_template"]} if "chat_template" in config else {})


def _sentencepiece_metadata(file: Path) -> dict[str, Any]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = range(model.get_piece_size())
    kinds = ((2, model.is_unknown), (3, model.is_control), (5, model.is_unused), (6, model.is_byte))
    types = [next((kind for kind, holds in kinds if holds(i)), 1) for i in ids]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [float(model.get_score(i)) for i in ids],
        "token_type": types,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }


def _json_metadata(tokenizer: dict[str, Any], pre: str) -> dict[str, Any]:
    vocabulary = dict(tokenizer["model"]["vocab"])
    types = dict.fromkeys(vocabulary.values(), 1)
    for added in tokenizer["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        types[added["id"]] = 3 if added["special"] else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    values: dict[str, Any] = {"tokens": tokens}
    if tokenizer["model"].get("byte_fallback"):
        ranks = {merge.replace(" ", ""): rank for rank, merge in reversed(list(enumerate(merges)))}
        values |= {"model": "llama", "pre": "default", "scores": [-float(ranks.get(token, 1e6)) for token in tokens]}
        for token in tokens:
            if len(token) == 6 and token.startswith("<0x"):
                types[vocabulary[token]] = 6
        if tokenizer["model"].get("unk_token"):
            types[vocabulary[tokenizer["model"]["unk_token"]]] = 2
    else:
        values |= {"model": "gpt2", "pre": pre, "merges": merges, "add_bos_token": _adds_bos(tokenizer)}
    return {**values, "token_type": [types[vocabulary[token]] for token in tokens]}


def _adds_bos(tokenizer: dict[str, Any]) -> bool:
    processor = tokenizer.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    return any("SpecialToken" in part for step in steps for part in step.get("single", [])[:1])


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes [rows, bytes] of a matrix of random codes, with scales of the size that weights have.

    Scales are float16 fields of the blocks; random bytes there would be infinite or not a number now and then.
    """
    size, num_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // size, num_bytes), dtype=np.uint8)
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for place in places.get(kind, (208,) if kind == "Q6_K" else (0,)):
        scales = generator.uniform(-0.05, 0.05, (len(blocks), 1)).astype("<f2")
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)
