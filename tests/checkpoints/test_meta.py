"""Meta's and Mistral's own layout: the same logits as the Hugging Face folder that it is made from here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.checkpoints import open_checkpoint
from puna.config import LLaMAConfig
from puna.mapping import Mapping
from puna.models import load_model

Make = Callable[..., Any]

NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "vocab_size": -1,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
}


def their_tensors(tensors: dict[str, Tensor], head_size: int = 8) -> dict[str, Tensor]:
    """Renamed, and the two rotary channels of a pair in q and k, which are half a head apart, put side by side."""
    result = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
        if "q_proj" in name or "k_proj" in name:
            heads = [
                torch.stack([head[: head_size // 2], head[head_size // 2 :]], dim=1).flatten(0, 1)
                for head in tensor.split(head_size)
            ]
            tensor = torch.cat(heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        result[name] = tensor.contiguous()
    return result


def split(tensors: dict[str, Tensor], count: int, embedding_axis: int) -> list[dict[str, Tensor]]:
    """As for several GPUs: outputs of wq, wk, wv, w1, w3 and output, inputs of wo and w2, copies of the norms."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            parts = [tensor] * count
        else:
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            parts = list(tensor.tensor_split(count, dim=embedding_axis if "tok_embeddings" in name else axis))
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.contiguous().clone()
    return shards


def write(folder: Path, shards: list[dict[str, Tensor]], names: list[str] | None = None, **params: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = {name: value for name, value in (PARAMS | params).items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(content))
    for number, shard in enumerate(shards):
        save_file(shard, folder / (names[number] if names else f"consolidated.{number:02d}.safetensors"))
    return folder


def assert_same(meta: Path, original: Any) -> None:
    theirs = original.reference_logits()
    with torch.no_grad():
        ours = load_model(meta)(torch.tensor(((3, 14, 15, 9, 26, 53, 58), (66, 0, 1, 2, 4, 8, 16))))
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_one_file(make: Make, tmp_path: Path, kv_heads: int, tied: bool) -> None:
    original = make(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    tensors = their_tensors(original.tensors) | {"rope.freqs": torch.zeros(4)}
    assert ("output.weight" in tensors) != tied
    assert_same(write(tmp_path / "meta", [tensors], n_kv_heads=kv_heads), original)


def test_n_kv_heads_may_be_absent(make: Make, tmp_path: Path) -> None:
    original = make(num_key_value_heads=4)
    assert_same(write(tmp_path / "meta", [their_tensors(original.tensors)], n_kv_heads=...), original)


@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_two_files(make: Make, tmp_path: Path, embedding_axis: int) -> None:
    original = make()
    shards = split(their_tensors(original.tensors), 2, embedding_axis)
    assert_same(write(tmp_path / "meta", shards), original)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_part_of_a_tensor_can_be_read(make: Make, tmp_path: Path, count: int) -> None:
    """What a rank reads, against the same slices of the Hugging Face tensor."""
    original = make(num_key_value_heads=4, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(
        write(tmp_path / "meta", split(their_tensors(original.tensors), count, 1), n_kv_heads=4)
    )
    for name, tensor in original.tensors.items():
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == "bfloat16"
        for rows in (slice(0, len(tensor)), slice(5, 20), slice(16, 17), slice(len(tensor), len(tensor))):
            for columns in (slice(0, 32), slice(3, 11)):
                source = (rows, columns)[: tensor.ndim]
                assert torch.equal(checkpoint.read(name, source), tensor[source]), (name, source)


def test_ranks_load_their_parts(make: Make, tmp_path: Path) -> None:
    original = make()
    meta = write(tmp_path / "meta", split(their_tensors(original.tensors), 2, 1))

    class Rank:
        device = torch.device("cpu")

        def __init__(self, rank: int) -> None:
            self.mapping = Mapping(tp_size=2, rank=rank)

    for rank in range(2):
        ours, theirs = load_model(meta, comm=Rank(rank)), load_model(original.path, comm=Rank(rank))
        for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(mine, other), name


def test_mistral(make: Make, tmp_path: Path) -> None:
    original = make("MistralForCausalLM", head_dim=16, sliding_window=3, rope_theta=10000.0)
    tensors = their_tensors(original.tensors, head_size=16)
    meta = write(
        tmp_path / "meta",
        [tensors],
        ["consolidated.safetensors"],
        head_dim=16,
        hidden_dim=48,
        vocab_size=67,
        sliding_window=3,
        multiple_of=...,
        ffn_dim_multiplier=...,
    )
    assert_same(meta, original)
    assert load_model(meta).config.architecture == "MistralForCausalLM"


def test_mistral_files_with_whole_tensors(make: Make, tmp_path: Path) -> None:
    original = make(rope_theta=1e6)
    tensors = their_tensors(original.tensors)
    names = sorted(tensors)
    halves = [{name: tensors[name] for name in names[:9]}, {name: tensors[name] for name in names[9:]}]
    files = ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"]
    meta = write(tmp_path / "meta", halves, files, hidden_dim=48, rope_theta=1e6, vocab_size=67)
    assert_same(meta, original)
    (meta / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {files[1]}: fetch it"):
        load_model(meta)


def test_scaled_rope(make: Make, tmp_path: Path) -> None:
    scaling = {
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = make(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    params = {"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 16}
    assert_same(write(tmp_path / "meta", [their_tensors(original.tensors)], **params), original)


@pytest.mark.parametrize(("dim", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0), (8192, 8.0)])
def test_factor_of_scaled_rope_by_size(tmp_path: Path, dim: int, factor: float) -> None:
    """Llama 3.1's is 8, that of 3.2 is 32, and params.json says only that there is one."""
    tensors = {"tok_embeddings.weight": torch.zeros(8, dim), "layers.0.feed_forward.w1.weight": torch.zeros(16, dim)}
    params = {"dim": dim, "n_heads": 32, "n_kv_heads": 8, "n_layers": 1, "rope_theta": 5e5, "use_scaled_rope": True}
    checkpoint = open_checkpoint(write(tmp_path / "meta", [tensors], **params))
    config = LLaMAConfig.from_fields(checkpoint.config_fields)
    assert config.rotary_scaling is not None
    assert config.rotary_scaling.factor == factor
    assert config.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("params", "length"),
    [
        ({}, 2048),
        ({"rope_theta": 500000.0}, 8192),
        ({"rope_theta": 1000000.0}, 16384),
        ({"hidden_dim": 48, "rope_theta": 1000000.0}, 32768),
        ({"max_seq_len": 4096}, 4096),
    ],
    ids=str,
)
def test_context_length(make: Make, tmp_path: Path, params: dict[str, Any], length: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "meta", [their_tensors(make().tensors)], **params))
    assert checkpoint.config_fields["max_position_embeddings"] == length


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"moe": {"num_experts": 8}}, ["moe: puna does not support this", "Hugging Face version"]),
        ({"quantization_args": {"scheme": "int4"}}, ["quantization_args: puna does not support"]),
        ({"lora_args": {"rank": 16}, "vision_chunk_size": 560}, ["lora_args, vision_chunk_size: puna does not"]),
        ({"yarn": {"factor": 4}}, ["yarn: puna does not support"]),
        ({"dim": ...}, ["params.json: the field dim is missing"]),
        ({"dim": "32"}, ["params.json: dim is '32': it must be a whole number"]),
        ({"n_layers": 0}, ["n_layers is 0: it must be 1 or more"]),
        ({"n_layers": 10**9}, ["n_layers is 1000000000: it must be the number of layers in"]),
        ({"n_layers": 3}, ["has no tensor model.layers.2"]),
        ({"n_layers": 1}, ["has the tensor layers.1.", "Hugging Face version"]),
        ({"n_heads": 5}, ["n_heads is 5: it must be a divisor of dim, 32"]),
        ({"n_heads": 8}, ["k_proj.weight has the shape"]),
        ({"norm_eps": "1e-5"}, ["norm_eps is '1e-5': it must be a number"]),
        ({"hidden_dim": 64, "rope_theta": 1e4}, ["hidden_dim is 64: it must be 48, as in the weights"]),
        ({"vocab_size": 100}, ["vocab_size is 100: it must be 67, as in the weights"]),
        ({"hidden_dim": 48}, ["the field rope_theta is missing"]),
        ({"use_scaled_rope": True}, ["use_scaled_rope without rope_scaling_factor", "add the factor"]),
        ({"use_scaled_rope": 1}, ["use_scaled_rope is 1: it must be true or false"]),
        ({"sliding_window": [1024]}, ["sliding_window is [1024]: it must be a whole number"]),
    ],
    ids=str,
)
def test_params_that_are_refused(make: Make, tmp_path: Path, params: dict[str, Any], words: list[str]) -> None:
    meta = write(tmp_path / "meta", [their_tensors(make().tensors)], **params)
    with pytest.raises(ValueError, match=r"params\.json|meta") as caught:
        load_model(meta)
    for word in words:
        assert word in str(caught.value)


def test_files_that_do_not_belong_together(make: Make, tmp_path: Path) -> None:
    shards = split(their_tensors(make().tensors), 2, 1)
    narrower = [shards[0], shards[1] | {"layers.1.attention.wq.weight": torch.zeros(16, 31)}]
    with pytest.raises(
        ValueError, match=r"shapes of layers.1.attention.wq.weight .*\[16, 32\] and \[16, 31\], do not fit"
    ):
        load_model(write(tmp_path / "a", narrower))
    del shards[1]["norm.weight"]
    with pytest.raises(ValueError, match=r"only some of the .* have norm.weight: fetch"):
        load_model(write(tmp_path / "b", shards))


def test_missing_files(make: Make, tmp_path: Path) -> None:
    shards = split(their_tensors(make().tensors), 4, 1)
    meta = write(tmp_path / "meta", shards)
    (meta / "consolidated.03.safetensors").unlink()
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shape \[67, 24\], but .* asks for \[67, 32\]"):
        load_model(meta)
    (meta / "consolidated.01.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no consolidated.01.safetensors: fetch it"):
        load_model(meta)
    for file in meta.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"params.json but no consolidated\*.safetensors: fetch the weights"):
        load_model(meta)
    (meta / "consolidated.00.pth").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pickled weights .consolidated\*.pth.*can run code.*safetensors version"):
        load_model(meta)


@pytest.mark.parametrize(
    "name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "layers.1.attention.wo.weight"]
)
def test_missing_tensors(make: Make, tmp_path: Path, name: str) -> None:
    tensors = their_tensors(make().tensors)
    del tensors[name]
    with pytest.raises(ValueError, match=r"has no tensor .*download is incomplete"):
        load_model(write(tmp_path / "meta", [tensors]))


def test_a_tensor_with_another_number_of_axes(make: Make, tmp_path: Path) -> None:
    tensors = their_tensors(make().tensors) | {"layers.1.attention.wq.weight": torch.zeros(32)}
    with pytest.raises(
        ValueError, match=r"layers.1.attention.wq.weight \[32\], which Meta's layout of a LLaMA does not"
    ):
        load_model(write(tmp_path / "meta", [tensors]))
