"""FP8 checkpoints of every style, written here: their numbers as loaded, the model's logits, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from puna import ops
from puna.checkpoints import open_checkpoint
from puna.layers import pieces
from puna.mapping import Mapping
from puna.models import LLaMAForCausalLM, load_model, model_loader
from puna.ops.scaled import FP8, FP8_MAX

Make = Callable[..., Any]
STYLES = (
    "tensor-static",
    "channel-dynamic",
    "block",
    "modelopt",
    "modelopt-channel",
    "qwen-block",
    "autofp8",
)
SIZES = {"hidden_size": 160, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES["head_dim"] = 40
# That library takes inputs of whole blocks only.
BLOCKS = {"hidden_size": 256, "intermediate_size": 384}


def compressed_tensors(strategy: str, **changes: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
        inputs |= {"strategy": "group", "group_size": 128}
    if strategy == "tensor":
        inputs |= {"strategy": "tensor", "dynamic": False}
    group = {"weights": weights, "input_activations": inputs, "output_activations": None, "targets": ["Linear"]}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*layers[.]1[.]mlp.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
    return config | changes


def config_of(style: str) -> dict[str, Any]:
    if style in ("tensor-static", "channel-dynamic", "block"):
        return compressed_tensors(style.partition("-")[0])
    if style == "qwen-block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
        }
    if style == "autofp8":
        return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    algorithm = "FP8" if style == "modelopt" else "FP8_PER_CHANNEL_PER_TOKEN"
    return {"quant_method": "modelopt", "quant_algo": algorithm, "exclude_modules": ["lm_head", "*layers.1.mlp*"]}


def quantize(folder: Any, style: str, lm_head: bool = False) -> dict[str, Tensor]:
    """Rewrites a folder in FP8, but for the second layer's MLP -> its tensors as they are then, dequantised."""
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in folder.tensors.items():
        is_linear = "_proj" in name or (lm_head and "lm_head" in name)
        if not is_linear or not name.endswith(".weight") or "layers.1.mlp" in name:
            stored[name] = dense[name] = tensor
            continue
        rows, columns = tensor.shape
        base, suffix = name.removesuffix("weight"), "weight_scale"
        wide = tensor.float()
        if style.endswith("block"):
            scales = torch.rand(-(-rows // 128), -(-columns // 128)) * 0.01 + 0.002
            spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            suffix = "weight_scale_inv" if style == "qwen-block" else suffix
        elif "channel" in style:
            scales = (wide.abs().amax(1, keepdim=True) / FP8_MAX).to(torch.bfloat16)
            spread = scales.float()
            scales = scales[:, 0] if style == "modelopt-channel" else scales
        else:
            scales = spread = wide.abs().amax() / FP8_MAX
            scales = scales.view(1) if style == "tensor-static" else scales
            stored[f"{base}input_scale"] = torch.tensor(0.01 + 0.001 * (len(stored) % 7)).view(scales.shape)
        values = (wide / spread).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        stored[name], stored[base + suffix] = values, scales
        dense[name] = values.float() * spread
    folder.write(stored)
    if style.startswith("modelopt"):
        content = {"producer": {"name": "modelopt"}, "quantization": config_of(style)}
        (folder.path / "hf_quant_config.json").write_text(json.dumps(content))
    else:
        folder.change_config(quantization_config=config_of(style))
    return dense


@pytest.fixture
def rows_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has: weights in rows, FP8 among them; here with the reference ops."""
    monkeypatch.setattr(pieces, "dense_layout", lambda device: "rows")
    monkeypatch.setattr(ops, "backends_for", lambda device: (ops.ReferenceBackend(),))


def weights(model: LLaMAForCausalLM) -> dict[str, Tensor]:
    return {name: piece.read().float() for name, piece in model.pieces()}


@pytest.mark.parametrize("style", STYLES)
def test_numbers_are_those_of_the_files(style: str, make: Make, rows_layout: None) -> None:
    folder = make(**SIZES)
    dense = quantize(folder, style)
    model = load_model(folder.path, quantization="stored")
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, dense[name].float()), name
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert FP8 in {kind for name, kind in kinds.items() if "layers.0.mlp" in name}
    assert FP8 not in {kind for name, kind in kinds.items() if "layers.1.mlp" in name}
    assert FP8 in {kind for name, kind in kinds.items() if "layers.1.attention" in name}


@pytest.mark.parametrize("style", STYLES)
def test_without_kernels_for_fp8_they_are_dequantised(style: str, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(**SIZES)
    dense = quantize(folder, style)
    for quantization in (None, "stored"):
        model = load_model(folder.path, quantization=quantization)
        for name, tensor in weights(model).items():
            assert torch.equal(tensor, dense[name].float()), name
    (line,) = [record.getMessage() for record in caplog.records]
    assert "become float32 while loading, since there are no kernels for FP8 here" in line


@pytest.mark.parametrize("style", STYLES)
def test_logits_are_near_those_of_transformers(style: str, make: Make, rows_layout: None) -> None:
    folder, plain = make(**SIZES), make(name="plain", **SIZES)
    plain.write(quantize(folder, style))
    wanted = plain.reference_logits()
    got = folder.logits(quantization="stored")
    # Inputs are rounded to three bits behind the leading one: 2^-4 at most, a few hundredths all in all.
    error = (got - wanted).norm() / wanted.norm()
    assert 0.001 < error < 0.15


@pytest.mark.parametrize("style", ["tensor-static", "channel-dynamic", "block"])
def test_logits_are_those_of_the_formats_own_library(style: str, make: Make, rows_layout: None) -> None:
    """Its layers round their inputs as well. It is no dependency of puna's tests: run this where it is installed."""
    pytest.importorskip("compressed_tensors")
    folder = make(**{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}, **BLOCKS)
    quantize(folder, style)
    tensors = folder.tensors
    for name in tensors:
        if name.endswith("input_scale"):  # segments of a fused layer have one in makers' files, as they have one input
            tensors[name] = torch.full_like(tensors[name], 0.012)
    folder.write(tensors)
    wanted, got = folder.reference_logits(), folder.logits(quantization="stored")
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def test_fused_segments_have_the_largest_scale_of_their_inputs(make: Make, rows_layout: None) -> None:
    folder = make(**SIZES)
    quantize(folder, "tensor-static")
    tensors = folder.tensors
    model = load_model(folder.path, quantization="stored")
    for ours, theirs in (("attention.qkv", "self_attn.{}_proj"), ("mlp.gate_up", "mlp.{}_proj")):
        segments = ("q", "k", "v") if "qkv" in ours else ("gate", "up")
        scales = [tensors[f"model.layers.0.{theirs.format(one)}.input_scale"].item() for one in segments]
        assert len(set(scales)) > 1
        assert model.get_parameter(f"layers.0.{ours}.input_scale").item() == max(scales)


def test_inputs_that_are_rounded_anew_need_no_scale(make: Make, rows_layout: None) -> None:
    """Some makers write one all the same."""
    folder = make(**SIZES)
    quantize(folder, "tensor-static")
    config = compressed_tensors("tensor")
    config["config_groups"]["group_0"]["input_activations"] |= {"dynamic": True, "strategy": "token"}
    folder.change_config(quantization_config=config)
    model = load_model(folder.path, quantization="stored")
    assert not [name for name, _ in model.named_parameters() if "input_scale" in name]


@dataclass
class _Rank:
    """One of several ranks, whose sums are its own."""

    mapping: Mapping
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * self.mapping.tp_size, dim=-1)

    def send(self, tensor: Tensor, rank: int) -> None:
        raise AssertionError("there is one stage")

    def recv(self, tensor: Tensor, rank: int) -> Tensor:
        raise AssertionError("there is one stage")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mlp", [192, 256])
def test_ranks_hold_their_part(style: str, mlp: int, make: Make, rows_layout: None) -> None:
    """With blocks, ranks of 256 / 2 inputs have whole ones, and those of 192 / 2 would cut one."""
    folder = make(**SIZES | {"intermediate_size": mlp})
    dense = quantize(folder, style)
    for rank in range(2):
        model = model_loader(folder.path, comm=_Rank(Mapping(tp_size=2, rank=rank)), quantization="stored").load()
        found = dict(model.pieces())
        for name, piece in found.items():
            assert torch.equal(piece.read().float(), dense[name][piece.source].float()), name
        kept = found["model.layers.0.mlp.down_proj.weight"].read().dtype
        assert kept == torch.float32
        proj = model.get_parameter("layers.0.mlp.proj.weight").dtype
        assert proj == (torch.float32 if style.endswith("block") and mlp == 192 else FP8)


@pytest.mark.parametrize("style", ["tensor-static", "channel-dynamic", "block"])
def test_a_head_in_fp8_whose_vocabulary_the_ranks_cannot_share_evenly(
    style: str, make: Make, rows_layout: None
) -> None:
    """Each of two ranks holds 256 rows, whole blocks, of 511: the last one's last row is padding."""
    folder = make(**SIZES | {"vocab_size": 511})
    dense = quantize(folder, style, lm_head=True)["lm_head.weight"]
    for rank in range(2):
        model = model_loader(folder.path, comm=_Rank(Mapping(tp_size=2, rank=rank)), quantization="stored").load()
        assert model.get_parameter("lm_head.weight").dtype == FP8
        own = dense[256 * rank :][:256].float()
        assert torch.equal(dict(model.pieces())["lm_head.weight"].read(), own)
        x = torch.randn(3, 160, generator=torch.Generator().manual_seed(rank))
        logits = model.lm_head(x)[:, :256]
        wanted = F.pad(x @ own.T, (0, 256 - len(own)))
        assert (logits - wanted).norm() / wanted.norm() < 0.1
        assert torch.equal(logits[:, len(own) :], wanted[:, len(own) :])


def test_scales_of_keys_and_values(make: Make) -> None:
    folder = make(**SIZES)
    tensors = folder.tensors
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.v_scale"] = torch.tensor([2.0], dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.q_scale"] = torch.tensor([3.0], dtype=torch.bfloat16)
    tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor(4.0)
    tensors["model.layers.1.self_attn.v_proj.v_scale"] = torch.tensor(1.0)
    folder.write(tensors)
    cache = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor", "symmetric": True}
    folder.change_config(
        quantization_config={"quant_method": "compressed-tensors", "format": "dense", "kv_cache_scheme": cache}
    )
    assert open_checkpoint(folder.path).cache_scales == {0: (0.5, 2.0), 1: (4.0, 1.0)}
    assert open_checkpoint(folder.path).cache_dtype == "fp8"
    model = load_model(folder.path)
    assert [layer.attention.cache_scales for layer in model.layers] == [(0.5, 2.0), (4.0, 1.0)]
    for wrong in (torch.tensor([0.0]), torch.tensor([1.0, 2.0]), torch.tensor(float("nan"))):
        tensors["model.layers.0.self_attn.k_scale"] = wrong
        folder.write(tensors)
        with pytest.raises(ValueError, match=r"k_scale is .*: it must be one positive number"):
            load_model(folder.path)


CACHE = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor", "symmetric": True}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        (compressed_tensors("channel"), None),
        (compressed_tensors("channel", kv_cache_scheme=CACHE), "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": CACHE}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, None),
        ({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "kv_cache_quant_algo": "FP8"}, None),  # refused as a whole
    ],
)
def test_what_makers_say_of_keys_and_values(config: dict[str, Any] | None, expected: str | None, make: Make) -> None:
    folder = make()
    folder.change_config(quantization_config=config)
    assert open_checkpoint(folder.path).cache_dtype == expected


@pytest.mark.parametrize(("algorithm", "expected"), [("FP8", "fp8"), (None, None)])
def test_what_modelopts_file_says_of_keys_and_values(algorithm: str | None, expected: str | None, make: Make) -> None:
    folder = make()
    content = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": algorithm}}
    (folder.path / "hf_quant_config.json").write_text(json.dumps(content))
    assert open_checkpoint(folder.path).cache_dtype == expected


def test_rounding_while_loading(make: Make, rows_layout: None) -> None:
    """quantization="fp8": a scale for each output; embedding and lm_head stay, and what is in FP8 already."""
    folder = make(**SIZES)
    original = folder.tensors
    model = load_model(folder.path, quantization="fp8")
    for name, tensor in weights(model).items():
        if "_proj" in name:
            highest = original[name].abs().amax(1, keepdim=True)
            error = (tensor - original[name]).abs() / highest
            assert 0 < error.max() < 2**-4
        else:
            assert torch.equal(tensor, original[name])
    dense = quantize(folder, "tensor-static")
    model = load_model(folder.path, quantization="fp8")
    for name, tensor in weights(model).items():
        if "layers.1.mlp" not in name:
            assert torch.equal(tensor, dense[name]), name


def test_no_fp8_on_a_cpu(make: Make) -> None:
    with pytest.raises(ValueError, match="quantization is 'fp8', but there are no kernels for FP8 on cpu: use int8"):
        load_model(make().path, quantization="fp8")


def changed(*path: str, value: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with another value at one place."""
    config = copy.deepcopy(compressed_tensors("channel"))
    inner = config
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return config


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "the quantization method 'awq' is not supported: puna reads FP8"),
        ({"bits": 4}, "the quantization method 'unnamed' is not supported"),
        (changed("format", value="pack-quantized"), "format is 'pack-quantized', which is not supported"),
        (changed("format", value="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (changed(*GROUP, "weights", "num_bits", value=4), "num_bits is 4"),
        (changed(*GROUP, "weights", "type", value="int"), "type is 'int'"),
        (changed(*GROUP, "weights", "strategy", value="group"), "strategy is 'group'"),
        (changed(*GROUP, "input_activations", value=None), "input_activations is null, .*: quantise with"),
        (changed(*GROUP, "input_activations", "dynamic", value="local"), "dynamic is 'local'"),
        (changed(*GROUP, "input_activations", "strategy", value="tensor_group"), "strategy is 'tensor_group'"),
        (changed(*GROUP, "output_activations", value={"num_bits": 8}), "output_activations is"),
        (changed("sparsity_config", value={"format": "sparse-24-bitmask"}), "format is 'sparse-24-bitmask'"),
        (changed("transform_config", value={"config_groups": {}}), "transform_config is"),
        (changed("kv_cache_scheme", value={"num_bits": 4, "type": "float"}), "kv_cache_scheme: num_bits is 4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "quant_algo is 'FP8_PB_WO'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo is"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}, "weight_block_size"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        ({"quant_method": "fp8"}, "activation_scheme is None"),
    ],
)
def test_everything_else_is_refused_by_name(config: dict[str, Any], message: str, make: Make) -> None:
    folder = make()
    folder.change_config(quantization_config=config)
    with pytest.raises(ValueError, match=message):
        load_model(folder.path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, base: tensors.pop(f"{base}.weight_scale"), "is in FP8, but has no .*q_proj.weight_scale"),
        (lambda tensors, base: tensors.pop(f"{base}.input_scale"), "there is no .*q_proj.input_scale: fetch"),
        (
            lambda tensors, base: tensors.update({f"{base}.weight_scale": torch.ones(3)}),
            r"q_proj.weight_scale has the shape \[3\]: for .* of \[160, 160\] it must be one number",
        ),
        (
            lambda tensors, base: tensors.update({f"{base}.input_scale": torch.tensor([-1.0])}),
            "q_proj.input_scale is .*: it must be one positive number",
        ),
    ],
)
def test_damaged_files(
    spoil: Callable[[dict[str, Tensor], str], object], message: str, make: Make, rows_layout: None
) -> None:
    folder = make(**SIZES)
    quantize(folder, "tensor-static")
    tensors = folder.tensors
    spoil(tensors, "model.layers.0.self_attn.q_proj")
    folder.write(tensors)
    with pytest.raises(ValueError, match=message):
        load_model(folder.path, quantization="stored")
