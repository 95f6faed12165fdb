"""The same random weights for every engine: a folder that puna and transformers load, and GGUF files made of it.

The folder is written by puna (`write_folder`); this file, run as a script by the peers' Python, which has the `gguf`
package, adds a GGUF file: python make_model.py FOLDER FILE TYPE, where TYPE is Q8_0, Q4_0, BF16, F16 or F32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from puna import LLaMAConfig

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")


def vocabulary(size: int) -> list[str]:
    """The 256 bytes, as byte-level tokenizers write them, one merged pair, words that no text has, special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    words = ["ab", *(f"<word{index}>" for index in range(size - len(letters) - len(SPECIAL) - 1))]
    return [*letters, *words, *SPECIAL]


def write_folder(folder: Path, config: LLaMAConfig, seed: int = 0) -> None:
    """Weights, config and a tokenizer of the right size, in Hugging Face's layout."""
    import tokenizers

    from puna.checkpoints import write_checkpoint
    from puna.models.random_weights import random_checkpoint

    checkpoint = random_checkpoint(config, seed)
    tensors = {
        name: checkpoint.read(name, tuple(slice(0, size) for size in checkpoint.shape(name)))
        for name in checkpoint.names
    }
    tokens = vocabulary(config.vocab_size)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: index for index, token in enumerate(tokens)}, [("a", "b")])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    ids = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    write_checkpoint(
        folder,
        {**config.to_hugging_face(), **ids},
        ids,
        tensors,
        {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps({"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}).encode(),
        },
    )


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """Every matrix in the type `kind`, the embedding too; vectors in float32."""
    import gguf
    import torch
    from gguf import GGMLQuantizationType
    from safetensors import safe_open

    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    size = fields["head_dim"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_vocab_size(fields["vocab_size"])
    tokens = vocabulary(fields["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(True)
    stored = GGMLQuantizationType[kind]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, fields["num_hidden_layers"])
    if fields["rope_scaling"]:
        writer.add_tensor("rope_freqs.weight", llama3_factors(fields))
    with safe_open(str(folder / "model.safetensors"), "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dict
            values = tensors.get_tensor(name).to(torch.float32).numpy()
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = interleaved(values, heads if "q_proj" in name else kv_heads)
            kept = GGMLQuantizationType.F32 if values.ndim == 1 else stored
            data = gguf.quants.quantize(values, kept)
            writer.add_tensor(theirs, data, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of rotary halves, as Hugging Face has them, in the order of GGUF: pair i is rows 2 i and 2 i + 1."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def llama3_factors(fields: dict[str, Any]) -> np.ndarray:
    """What Llama 3.1's scaling divides each rotary frequency by (transformers' modeling_rope_utils has the formula)."""
    scaling, size = fields["rope_scaling"], fields["head_dim"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * fields["rope_theta"] ** (np.arange(0, size, 2) / size)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / scaling["factor"])).astype(np.float32)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
