"""Hugging Face folders: one file or shards, every dtype, what else is in a folder; and each kind of damage by name."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from puna.checkpoints import open_checkpoint
from puna.models import MODELS, load_model, loading
from puna.models.llama import LLaMAForCausalLM

Make = Callable[..., Any]
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def assert_same_logits(folder: Any, original: Any = None) -> None:
    theirs = (original or folder).reference_logits()
    ours = folder.logits()
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model gets storage: errors must come before that."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights were allocated")

    monkeypatch.setattr(loading, "allocate", refuse)


# What loads.


@pytest.mark.parametrize("architecture", MODELS)
def test_one_file(make: Make, architecture: str) -> None:
    assert_same_logits(make(architecture))


@pytest.mark.parametrize("architecture", MODELS)
def test_shards_that_transformers_writes(make: Make, architecture: str) -> None:
    folder = make(architecture, save_options={"max_shard_size": "20KB"})
    assert len(list(folder.path.glob("*.safetensors"))) > 2
    assert_same_logits(folder)


def test_mixtral_with_tied_embeddings_has_the_names_that_we_expect(make: Make) -> None:
    folder = make("MixtralForCausalLM", tie_word_embeddings=True, num_local_experts=3, num_experts_per_tok=2)
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in folder.tensors
    assert "lm_head.weight" not in folder.tensors
    assert_same_logits(folder)


@pytest.mark.parametrize("index", [True, False])
def test_shards_with_and_without_an_index(make: Make, index: bool) -> None:
    folder, original = make(), make(name="original")
    folder.write(*folder.halves(), index=index)
    assert_same_logits(folder, original)


def test_the_single_file_goes_before_a_stale_index(make: Make) -> None:
    """As in transformers: this is what saving over a sharded folder leaves."""
    folder, original = make(), make(name="original")
    folder.write(*[{name: tensor + 1 for name, tensor in half.items()} for half in folder.halves()], index=True)
    shutil.copy(original.path / "model.safetensors", folder.path)
    assert_same_logits(folder, original)


def test_any_file_name_will_do(make: Make) -> None:
    folder = make()
    (folder.path / "model.safetensors").rename(folder.path / "weights.safetensors")
    assert open_checkpoint(folder.path).names == tuple(sorted(folder.tensors))


def test_other_layouts_in_the_folder_are_left_alone(make: Make) -> None:
    folder, original = make(), make(name="original")
    folder.write(*folder.halves())
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, folder.path / "consolidated.safetensors")
    (folder.path / "params.json").write_text("{}")
    (folder.path / "pytorch_model.bin").write_bytes(b"no")
    assert_same_logits(folder, original)


def test_a_stored_head_of_tied_embeddings_is_accepted(make: Make) -> None:
    folder, original = make(tie_word_embeddings=True), make(name="original", tie_word_embeddings=True)
    folder.write(folder.tensors | {"lm_head.weight": folder.tensors["model.embed_tokens.weight"].clone()})
    assert_same_logits(folder, original)
    model = load_model(folder.path)
    assert model.lm_head is not None
    assert model.vocab_embedding is not None
    assert model.lm_head.weight is model.vocab_embedding.weight


def test_old_rotary_tensors_are_accepted(make: Make) -> None:
    folder, original = make(), make(name="original")
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(2)}
    folder.write(folder.tensors | old)
    assert_same_logits(folder, original)


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("wanted", [None, *DTYPES])
@pytest.mark.parametrize("stored", DTYPES)
def test_every_dtype_to_every_dtype(make: Make, stored: str, wanted: str | None) -> None:
    folder = make(dtype=getattr(torch, stored), tie_word_embeddings=True)
    model = load_model(folder.path, dtype=wanted)
    expected = getattr(torch, wanted or stored)
    assert model.config.dtype == (wanted or stored)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    for name, piece in model.pieces():
        assert torch.equal(piece.read(), folder.tensors[name].to(expected)), name


def test_a_dtype_may_be_torchs_own(make: Make) -> None:
    model = load_model(make().path, dtype=torch.bfloat16)
    assert model.config.dtype == "bfloat16"
    assert model.ln_f.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype is torch.float64: use float32"):
        load_model(make().path, dtype=torch.float64)


def test_dtypes_may_be_mixed(make: Make) -> None:
    folder = make(dtype=torch.bfloat16)
    mixed = {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in folder.tensors.items()}
    folder.write(mixed)
    assert load_model(folder.path).config.dtype == "bfloat16"
    folder.change_config(dtype=..., torch_dtype=...)
    model = load_model(folder.path)  # the dtype of the largest tensor, where the config names none
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_model(folder.path, "float32").ln_f.weight.dtype == torch.float32


def test_generation_config_is_loaded(make: Make) -> None:
    folder = make()
    (folder.path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_k": 7}')
    loaded = load_model(folder.path).generation_config
    assert (loaded.eos_token_ids, loaded.top_k) == ((5, 6), 7)


def test_the_class_loads_its_own(make: Make) -> None:
    assert isinstance(LLaMAForCausalLM.from_pretrained(make().path), LLaMAForCausalLM)


def test_unknown_fields_are_named_once(make: Make) -> None:
    folder = make()
    folder.change_config(novelty=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(folder.path)
    assert [str(warning.message) for warning in caught] == [
        f"{folder.path}/config.json: puna does not know and ignores: novelty"
    ]


# What is refused, before anything is allocated.


def refused(folder: Any, *words: str, error: type[Exception] = ValueError, dtype: str | None = None) -> None:
    with pytest.raises(error) as caught:
        load_model(folder.path, dtype)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder.path), *words):
        assert word in message


pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.usefixtures("no_allocation")
class TestRefused:
    def test_missing_tensor(self, make: Make) -> None:
        folder = make()
        tensors = folder.tensors
        del tensors["model.layers.1.mlp.up_proj.weight"]
        folder.write(tensors)
        refused(folder, "has no tensor model.layers.1.mlp.up_proj.weight:", "download is incomplete")

    def test_many_missing_tensors_are_counted(self, make: Make) -> None:
        folder = make()
        folder.write({name: tensor for name, tensor in folder.tensors.items() if "layers.1." not in name})
        refused(folder, "layers.1.input_layernorm.weight", "and 6 more")

    def test_extra_tensor(self, make: Make) -> None:
        folder = make()
        folder.write(folder.tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
        refused(folder, "has the tensor model.layers.0.self_attn.q_proj.bias", "LlamaForCausalLM", "another model")

    def test_fused_experts_of_transformers_5(self, make: Make) -> None:
        folder = make("MixtralForCausalLM", save_options={"save_original_format": False})
        refused(folder, "has no tensor model.layers.0.block_sparse_moe", "it has model.layers.0.mlp.experts.down_proj")

    def test_missing_head_without_tying(self, make: Make) -> None:
        folder = make(tie_word_embeddings=True)
        folder.change_config(tie_word_embeddings=False)
        refused(folder, "has no tensor lm_head.weight")

    @pytest.mark.parametrize(
        ("field", "value", "tensor"),
        [
            ("vocab_size", 68, "lm_head.weight"),
            ("intermediate_size", 64, "down_proj.weight"),
            ("num_key_value_heads", 4, "k_proj.weight"),
            ("head_dim", 4, "q_proj.weight"),
            ("hidden_size", 64, "lm_head.weight"),
        ],
    )
    def test_wrong_shape(self, make: Make, field: str, value: int, tensor: str) -> None:
        folder = make()
        folder.change_config(**{field: value})
        with pytest.raises(ValueError, match=r"has the shape \[.*\], but .*config.json asks for \[.*\]"):
            load_model(folder.path)
        folder.write({name: tensors for name, tensors in folder.tensors.items() if not name.endswith(tensor)})
        refused(folder, tensor)

    def test_a_shape_that_would_broadcast(self, make: Make) -> None:
        folder = make()
        folder.write(folder.tensors | {"model.norm.weight": torch.ones(1)})
        refused(folder, "model.norm.weight has the shape [1]", "asks for [32]")

    def test_too_many_layers_are_not_built(self, make: Make) -> None:
        folder = make()
        folder.change_config(num_hidden_layers=10**9)
        refused(folder, "config.json asks for 1000000000 layers, but there are only 21 tensors")

    @pytest.mark.parametrize(
        ("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8")]
    )
    def test_other_dtypes(self, make: Make, dtype: torch.dtype, name: str) -> None:
        folder = make()
        folder.write({key: tensor.to(dtype) for key, tensor in folder.tensors.items()})
        refused(folder, f"is stored as {name}", "puna reads float32, bfloat16, float16", "convert")
        folder.change_config(dtype=...)
        refused(folder, f"is stored as {name}")

    @pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", "torch.float32"])
    def test_dtype_argument(self, make: Make, dtype: str) -> None:
        folder = make()
        with pytest.raises(ValueError, match=f"dtype is '{dtype}': use float32, bfloat16, float16"):
            load_model(folder.path, dtype=dtype)

    def test_a_tensor_in_two_files(self, make: Make) -> None:
        folder = make()
        first, second = folder.halves()
        folder.write(first, second | {"lm_head.weight": torch.zeros(67, 32)})
        refused(folder, "lm_head.weight is in", FIRST, SECOND, "remove")

    def test_missing_shard(self, make: Make) -> None:
        folder = make()
        folder.write(*folder.halves(), index=True)
        (folder.path / SECOND).unlink()
        refused(folder, f"lacks {SECOND}, which model.safetensors.index.json names: fetch it", error=FileNotFoundError)

    def test_missing_shard_without_an_index(self, make: Make) -> None:
        folder = make()
        folder.write(*folder.halves())
        (folder.path / SECOND).unlink()
        refused(folder, "has no tensor", "download is incomplete")

    @pytest.mark.parametrize(
        "outside", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", 3]
    )
    def test_index_that_leads_outside(self, make: Make, outside: object) -> None:
        folder = make()
        folder.write(*folder.halves(), index=True)
        save_file(folder.tensors, folder.path.parent / "other.safetensors")
        folder.write_index(dict.fromkeys(folder.tensors, outside))
        refused(folder, f"weight_map names {outside!r}", "in the same folder")

    def test_index_of_another_version(self, make: Make) -> None:
        folder = make()
        first, second = folder.halves()
        folder.write(first, second, index=True)
        swapped = dict.fromkeys(first, SECOND) | dict.fromkeys(second, FIRST)
        folder.write_index(swapped)
        refused(folder, "model.safetensors.index.json says that", "which does not hold it: fetch")
        folder.write_index(dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND) | {"novelty": SECOND})
        refused(folder, f"says that novelty is in {SECOND}, which does not hold it")

    @pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
    def test_index_without_a_map(self, make: Make, weight_map: object) -> None:
        folder = make()
        folder.write(*folder.halves(), index=True)
        folder.write_index(weight_map)
        refused(folder, "weight_map must be an object")

    def test_index_that_is_no_json(self, make: Make) -> None:
        folder = make()
        folder.write(*folder.halves(), index=True)
        (folder.path / "model.safetensors.index.json").write_text("{")
        refused(folder, "model.safetensors.index.json is not valid JSON", "fetch the file again")

    # In bytes: within the length of the header, within the header, at its end, in the data, one byte too few or many.
    @pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 500, "header", "half", -1, 1_000_000])
    def test_truncated_file(self, make: Make, cut: int | str) -> None:
        folder = make()
        file = folder.path / "model.safetensors"
        content = file.read_bytes()
        sizes = {"header": 8 + int.from_bytes(content[:8], "little"), "half": len(content) // 2}
        size = sizes[cut] if isinstance(cut, str) else cut
        file.write_bytes(content[:size] if size < 1_000_000 else content + b"\0")
        refused(folder, "model.safetensors is", "fetch the file again")

    @pytest.mark.parametrize("content", [b"\xff" * 100, b"\x08" + bytes(7) + b"nonsense", b"PK\x03\x04" + bytes(100)])
    def test_a_file_of_another_format(self, make: Make, content: bytes) -> None:
        folder = make()
        (folder.path / "model.safetensors").write_bytes(content)
        refused(folder, "model.safetensors is damaged or incomplete", "fetch the file again")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pth", "model.pt"])
    def test_pickles(self, make: Make, name: str) -> None:
        folder = make()
        (folder.path / "model.safetensors").rename(folder.path / name)
        refused(folder, f"pickled weights ({name})", "can run code", "convert them to safetensors", "save_pretrained")

    def test_no_weights(self, make: Make) -> None:
        folder = make()
        (folder.path / "model.safetensors").unlink()
        refused(folder, "has no *.safetensors files: give the folder", error=FileNotFoundError)

    def test_no_config(self, make: Make) -> None:
        folder = make()
        (folder.path / "config.json").unlink()
        refused(folder, "config.json does not exist: give the folder of a checkpoint", error=FileNotFoundError)

    def test_unknown_architecture(self, make: Make) -> None:
        folder = make()
        folder.change_config(architectures=["FalconForCausalLM"])
        refused(folder, "'FalconForCausalLM' is not supported", "puna runs LlamaForCausalLM, Mistral")

    def test_class_of_another_architecture(self, make: Make) -> None:
        folder = make("Qwen2ForCausalLM")
        with pytest.raises(ValueError, match=r"is a Qwen2ForCausalLM, not a LlamaForCausalLM: use puna.load_model"):
            LLaMAForCausalLM.from_pretrained(folder.path)

    def test_broken_generation_config(self, make: Make) -> None:
        folder = make()
        (folder.path / "generation_config.json").write_text('{"top_p": "all"}')
        refused(folder, "generation_config.json: top_p is 'all'")

    def test_quantized(self, make: Make) -> None:
        folder = make()
        folder.change_config(quantization_config={"quant_method": "gptq"})
        refused(folder, "quantization method 'gptq' is not supported: puna reads FP8")


# What is no folder.


def test_a_file_instead_of_its_folder(make: Make) -> None:
    folder = make()
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(ValueError, match=f"{name} is a file: give the folder that it is in"):
            load_model(folder.path / name)


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "./model", "nowhere", "~nobody-here/model", "x" * 5000, "a\0b", "a/b/"]
)
def test_nothing_there(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder") as caught:
        load_model(path)
    assert len(str(caught.value)) < 300


def test_names_that_would_spoil_a_terminal_are_quoted(make: Make) -> None:
    folder = make()
    folder.write(folder.tensors | {"odd\n\x1b[2Jname": torch.zeros(1)})
    refused(folder, r"'odd\n\x1b[2Jname'", "another model")
