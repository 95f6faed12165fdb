"""GGUF files as models: the same logits as the Hugging Face folder that they were made of, and refusals."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from gguf_writer import random_blocks, write_gguf
from puna.checkpoints import open_checkpoint, resolve_path
from puna.config import GenerationConfig
from puna.models import load_model
from puna.models.loading import resolved_config

Make = Callable[..., Any]
TOKENS = torch.tensor(((3, 14, 15, 9, 26, 53, 58, 33, 1, 7, 60, 61), (66, 0, 1, 2, 4, 8, 16, 5, 44, 30, 31, 12)))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def logits(path: Path | str, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = load_model(path, **options)(TOKENS)
    return result


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("LlamaForCausalLM", {"head_dim": 16, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
        ("LlamaForCausalLM", {"rope_theta": 500000.0}),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        ),
        ("LlamaForCausalLM", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "head_dim": 32}),
        ("MistralForCausalLM", {"sliding_window": 4}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {"head_dim": 16}),
        ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_logits_are_those_of_the_folder(architecture: str, options: dict[str, Any], make: Make, tmp_path: Path) -> None:
    folder = make(architecture, **options)
    file = write_gguf(folder.path, tmp_path / "x.gguf")
    expected = logits(folder.path)
    assert expected.std() > 0.01
    assert torch.equal(logits(file), expected)


def test_experts_in_a_tensor_each(make: Make, tmp_path: Path) -> None:
    folder = make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    file = write_gguf(folder.path, tmp_path / "x.gguf", split_experts=True)
    assert "blk.1.ffn_down.2.weight" in {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert torch.equal(logits(file), logits(folder.path))


@pytest.mark.parametrize("split_experts", [True, False])
def test_quantised_experts(split_experts: bool, make: Make, tmp_path: Path) -> None:
    folder = make("MixtralForCausalLM", hidden_size=64, intermediate_size=96, num_local_experts=3)
    checkpoint = open_checkpoint(write_gguf(folder.path, tmp_path / "x.gguf", "Q8_0", split_experts=split_experts))
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    source = (slice(5, 60), slice(32, 96))
    stored = folder.tensors[name].numpy()
    number = gguf.GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(stored, number), number))[source]
    assert checkpoint.dtype(name) == "Q8_0"
    assert checkpoint.stored_bytes(name) == 64 * 96 // 32 * 34
    assert torch.equal(checkpoint.read(name, source), expected)
    groups = checkpoint.read_quantized(name, source)
    assert groups is not None
    assert torch.equal(groups.dequantize(), expected)


def test_llama3_scaling_is_found_in_its_factors(make: Make, tmp_path: Path) -> None:
    scaling = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}
    folder = make(rope_scaling=dict(scaling), rope_theta=500000.0, head_dim=64, max_position_embeddings=131072)
    fields = open_checkpoint(write_gguf(folder.path, tmp_path / "x.gguf")).config_fields
    assert fields["rope_scaling"] == scaling
    assert fields["rope_theta"] == 500000.0


def test_other_factors_are_used_as_they_are(make: Make, tmp_path: Path) -> None:
    folder = make(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 24})
    file = write_gguf(folder.path, tmp_path / "x.gguf")
    model = load_model(file)
    assert model.config.rotary_scaling is not None
    assert model.config.rotary_scaling.type == "longrope"
    expected, plain = logits(folder.path), logits(write_gguf(folder.path, file, without=("rope_freqs.weight",)))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3  # the factors matter here


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_dtype_without_being_asked(kind: str, dtype: str, make: Make, tmp_path: Path) -> None:
    folder = make(hidden_size=64, intermediate_size=96)
    checkpoint = open_checkpoint(write_gguf(folder.path, tmp_path / "x.gguf", kind))
    assert resolved_config(checkpoint, None).dtype == dtype
    assert resolved_config(checkpoint, "float32").dtype == "float32"
    assert checkpoint.dtype("model.norm.weight") == "float32"


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_quantised_matrices_load_dequantised(kind: str, make: Make, tmp_path: Path) -> None:
    """Beside a folder of the values that the `gguf` package dequantises."""
    folder = make(hidden_size=64, intermediate_size=96)
    file = write_gguf(folder.path, tmp_path / "x.gguf", kind)
    number = gguf.GGMLQuantizationType[kind]

    def rounded(tensor: Tensor) -> Tensor:
        if tensor.ndim == 1:
            return tensor
        return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), number), number))

    folder.write({name: rounded(tensor) for name, tensor in folder.tensors.items()})
    assert torch.equal(logits(file, dtype="float32"), logits(folder.path))


def test_k_quants_load(make: Make, tmp_path: Path) -> None:
    """All types at once, on the shapes of a layer whose rows have one block of 256."""
    folder = make(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    kinds = {"attn_q": "Q2_K", "attn_k": "Q3_K", "attn_v": "Q4_K", "ffn_gate": "Q5_K", "ffn_down": "Q6_K"}
    shapes = {"attn_q": 256, "attn_k": 128, "attn_v": 128, "ffn_gate": 256, "ffn_down": 256}
    blocks = {name: random_blocks(kind, shapes[name], 256) for name, kind in kinds.items()}
    replaced = {f"blk.0.{name}.weight": (blocks[name], kind) for name, kind in kinds.items()}
    as_floats = {
        f"blk.0.{name}.weight": (gguf.dequantize(blocks[name], gguf.GGMLQuantizationType[kind]), "F32")
        for name, kind in kinds.items()
    }
    quantised = write_gguf(folder.path, tmp_path / "x.gguf", replaced=replaced)
    floats = write_gguf(folder.path, tmp_path / "y.gguf", replaced=as_floats)
    assert torch.equal(logits(quantised, dtype="float32"), logits(floats))


def test_a_slice_of_a_rotated_matrix(make: Make, tmp_path: Path) -> None:
    """As a rank of several reads it."""
    folder = make(hidden_size=64, intermediate_size=96, attention_bias=True, num_attention_heads=8)
    checkpoint = open_checkpoint(write_gguf(folder.path, tmp_path / "x.gguf", "Q8_0"))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias"):
        whole = checkpoint.read(name, tuple(slice(0, size) for size in checkpoint.shape(name)))
        assert torch.allclose(whole, folder.tensors[name], atol=0.01)
        rest = tuple(slice(0, size) for size in checkpoint.shape(name)[1:])
        assert torch.equal(checkpoint.read(name, (slice(12, 37), *rest)), whole[12:37])


def test_a_split_model(make: Make, tmp_path: Path) -> None:
    folder = make()
    whole = gguf.GGUFReader(write_gguf(folder.path, tmp_path / "x.gguf"))
    half = len(whole.tensors) // 2
    for number, tensors in ((1, whole.tensors[:half]), (2, whole.tensors[half:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{number}-of-00002.gguf", "llama")
        if number == 1:
            for name, field in whole.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    writer.add_key_value(name, field.contents(), field.types[0])
        writer.add_uint16("split.count", 2)
        writer.add_uint16("split.no", number - 1)
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    expected = logits(folder.path)
    assert torch.equal(logits(first), expected)
    (tmp_path / "x.gguf").unlink()
    assert resolve_path(tmp_path) == first
    with pytest.raises(ValueError, match=r"is not the first part: give m-00001-of-00002\.gguf"):
        open_checkpoint(second)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"is one of 2 parts: give it the name that it had"):
        open_checkpoint(renamed)
    renamed.rename(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"is the first of 2 parts, and there is no .*m-00002-of-00002\.gguf"):
        open_checkpoint(first)


def test_where_a_file_is_found(make: Make, tmp_path: Path) -> None:
    folder = make()
    (tmp_path / "files").mkdir()
    file = write_gguf(folder.path, tmp_path / "files" / "x.gguf")
    assert resolve_path(file) == file
    assert resolve_path(str(file)) == file
    assert resolve_path(tmp_path / "files") == file
    assert torch.equal(logits(str(tmp_path / "files")), logits(folder.path))
    write_gguf(folder.path, tmp_path / "files" / "y.gguf")
    assert resolve_path(tmp_path / "files") == tmp_path / "files"  # not to be guessed
    (folder.path / "x.gguf").write_bytes(file.read_bytes())
    assert resolve_path(folder.path) == folder.path  # with a config.json the folder itself is the model
    with pytest.raises(ValueError, match="is a file: give the folder"):
        resolve_path(folder.path / "config.json")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        resolve_path(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metadata": {"general.architecture": "gemma3"}},
            "the architecture 'gemma3' is not supported: puna runs llama",
        ),
        ({"without": ("token_embd.weight",)}, "has no tensor token_embd.weight: it holds no model"),
        ({"without": ("llama.attention.head_count",)}, "llama: the field attention.head_count is missing"),
        ({"without": ("llama.attention.layer_norm_rms_epsilon",)}, "attention.layer_norm_rms_epsilon is missing"),
        ({"without": ("llama.context_length",)}, "the field context_length is missing"),
        ({"metadata": {"llama.block_count": "2"}}, "block_count is '2': it must be a whole number"),
        ({"metadata": {"llama.attention.head_count": [4, 2]}}, r"head_count is \[4, 2\]: it must be a whole number"),
        ({"metadata": {"llama.rope.dimension_count": 4}}, "rope.dimension_count is 4: it must be 8"),
        ({"metadata": {"llama.attention.value_length": 16}}, "attention.value_length is 16: it must be 8"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type is 'longrope': it must be one of"),
        ({"metadata": {"llama.logit_scale": 0.5}}, "logit_scale is 0.5: puna does not support this option"),
        ({"metadata": {"llama.attention.causal": False}}, "attention.causal is False: puna does not support"),
        ({"metadata": {"llama.attention.scale": 0.1}}, "attention.scale is 0.1: puna does not support"),
        ({"metadata": {"llama.rope.scaling.yarn_attn_factor": 2.0}}, "yarn_attn_factor is 2.0: puna does not"),
        ({"without": ("blk.1.ffn_up.weight",)}, "has no tensor model.layers.1.mlp.up_proj.weight"),
        (
            {"replaced": {"blk.0.attn_sinks.weight": (np.zeros(4, dtype=np.float32), "F32")}},
            "has the tensor blk.0.attn_sinks.weight, which a LlamaForCausalLM with this config does not use",
        ),
        (
            {"replaced": {"blk.0.ffn_up.weight": (np.zeros((48, 16), dtype=np.float32), "F32")}},
            r"mlp.up_proj.weight has the shape \[48, 16\]",
        ),
        (
            {"replaced": {"output_norm.weight": (np.zeros((1, 18), dtype=np.uint8), "Q4_0")}},
            "model.norm.weight has the shape",
        ),
        (
            {"replaced": {"blk.0.attn_v.weight": (np.zeros((16, 18), dtype=np.uint8), "IQ4_NL")}},
            "blk.0.attn_v.weight is stored as IQ4_NL, which puna does not read: take a file with F32, F16, Q4_0",
        ),
        (
            {"replaced": {"blk.0.attn_v.weight": (np.zeros((16, 17), dtype=np.uint8), "MXFP4")}},
            "is stored as MXFP4",
        ),
        (
            {"replaced": {"rope_freqs.weight": (np.ones(3, dtype=np.float32), "F32")}},
            r"rope_freqs.weight is F32 \[3\]: it must be F32 \[4\]",
        ),
        (
            {"replaced": {"rope_freqs.weight": (np.zeros(4, dtype=np.float32), "F32")}},
            "rope_freqs.weight holds values that are not positive",
        ),
        ({"metadata": {"llama.expert_count": 4}}, "the field expert_used_count is missing"),
    ],
)
def test_what_puna_does_not_run_is_refused(changes: dict[str, Any], message: str, make: Make, tmp_path: Path) -> None:
    folder = make()
    file = write_gguf(folder.path, tmp_path / "x.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        load_model(file)


def test_what_puna_does_not_know_is_named(make: Make, tmp_path: Path) -> None:
    file = write_gguf(make().path, tmp_path / "x.gguf", metadata={"llama.some_new_thing": 3})
    with pytest.warns(UserWarning, match="puna does not know and ignores: some_new_thing"):
        load_model(file)


def test_the_same_value_for_each_layer(make: Make, tmp_path: Path) -> None:
    folder = make()
    values = {"llama.attention.head_count": [4, 4], "llama.feed_forward_length": [48, 48]}
    assert torch.equal(logits(write_gguf(folder.path, tmp_path / "x.gguf", metadata=values)), logits(folder.path))


def test_generation_config(make: Make, tmp_path: Path) -> None:
    tokens = [f"t{number}" for number in range(64)] + ["<|eot_id|>", "</s>", "<|fim_prefix|>"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 66,
        "tokenizer.ggml.eom_token_id": 3,
        "tokenizer.ggml.padding_token_id": 4_000_000_000,
    }
    file = tmp_path / "x.gguf"
    write_gguf(make().path, file, metadata=values)
    assert open_checkpoint(file).generation_config == GenerationConfig(bos_token_id=5, eos_token_ids=(66, 3, 64, 65))
    sampling = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95}
    write_gguf(make().path, file, metadata=values | sampling)
    config = open_checkpoint(file).generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.6, 20, 0.95)
    assert load_model(file).generation_config == config


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Three rows of a matrix of 4 GiB, of which the disk holds next to nothing."""
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    values = {"context_length": 64, "embedding_length": 1024, "block_count": 1, "feed_forward_length": 32}
    for name, value in {**values, "attention.head_count": 8}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor_info("token_embd.weight", (1 << 20, 1024), np.dtype(np.float32), 1 << 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file = tmp_path / "small.gguf"
    start = -(-file.stat().st_size // 32) * 32
    with file.open("r+b") as handle:
        handle.truncate(start + (1 << 32))
        handle.seek(start + 5 * 4096)
        handle.write(np.arange(1024, dtype="<f4").tobytes())
    process = psutil.Process()
    before = process.memory_info().rss
    checkpoint = open_checkpoint(file)
    rows = checkpoint.read("model.embed_tokens.weight", (slice(4, 7), slice(0, 1024)))
    assert torch.equal(rows[1], torch.arange(1024.0))
    assert not rows[0].any()
    assert process.memory_info().rss - before < 50 << 20


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
        ("LlamaForCausalLM", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "head_dim": 32}),
        ("LlamaForCausalLM", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 24}}),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        ),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 16}),
        ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    ],
)
def test_logits_are_llama_cpps(architecture: str, options: dict[str, Any], make: Make, tmp_path: Path) -> None:
    """Which shows that write_gguf means by its names and orders what llama.cpp does."""
    library = pytest.importorskip("llama_cpp")
    folder = make(architecture, **{"hidden_size": 32, "intermediate_size": 64, **options})
    vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(64))],
        "tokenizer.ggml.scores": [0.0] * 67,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 64,
    }
    file = write_gguf(folder.path, tmp_path / "x.gguf", metadata=vocabulary)
    cache = {"type_k": library.GGML_TYPE_F32, "type_v": library.GGML_TYPE_F32}
    model = library.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, **cache)
    model.eval(TOKENS[0].tolist())
    theirs = torch.from_numpy(np.array(model.scores[: TOKENS.shape[1]]))
    assert theirs.std() > 0.01
    torch.testing.assert_close(logits(file)[0], theirs, rtol=1e-3, atol=1e-3)


def test_random_damage_gives_nothing_but_refusals(make: Make, tmp_path: Path) -> None:
    content = write_gguf(make(num_hidden_layers=1).path, tmp_path / "x.gguf").read_bytes()
    header = content.index(b"token_embd.weight") + 600
    generator = random.Random(1)
    file = tmp_path / "damaged.gguf"
    loaded, messages = 0, []
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(header)] = generator.randrange(256)
        file.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_model(file)
            loaded += 1
        except ValueError as error:
            messages.append(str(error))
    assert loaded > 0
    assert len(messages) > 50
    assert [message for message in messages if not re.search(r"damaged\.gguf|is \S+: ", message)] == []
