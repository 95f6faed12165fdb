"""Reading and writing config.json, with transformers' own config classes as the oracle; every refusal by name."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from puna.config import FAMILIES, GenerationConfig, LLaMAConfig, RotaryScaling, read_architecture

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 100,
}
CLASSES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "MixtralForCausalLM": transformers.MixtralConfig,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Every rotary type, with all of its options somewhere. The heads of SIZES have 2 channels, so 1 factor is half of them.
ROTARY: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.9,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    LLAMA3,
    {
        "rope_type": "longrope",
        "short_factor": [1.0],
        "long_factor": [3.5],
        "factor": 32.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.2,
    },
)


def fields(architecture: str = "LlamaForCausalLM", **others: Any) -> dict[str, Any]:
    """The smallest config.json of a family, with these fields set; `...` takes one out."""
    result = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type, **SIZES}
    if FAMILIES[architecture].has_experts:
        result |= EXPERTS
    result |= others
    return {name: value for name, value in result.items() if value is not ...}


def read(architecture: str = "LlamaForCausalLM", **others: Any) -> LLaMAConfig:
    return LLaMAConfig.from_fields(fields(architecture, **others))


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def assert_same(ours: LLaMAConfig, theirs: Any) -> None:
    """Every value that transformers' config object has, in our names."""
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_size == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.hidden_size == theirs.hidden_size
    assert ours.mlp_hidden_size == theirs.intermediate_size
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_act == theirs.hidden_act
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == str(theirs.dtype or "float32").removeprefix("torch.")
    if theirs.model_type in ("llama", "qwen3"):
        assert (ours.attn_bias, ours.attn_output_bias) == (theirs.attention_bias, theirs.attention_bias)
    else:
        assert (ours.attn_bias, ours.attn_output_bias) == (theirs.model_type == "qwen2", False)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.qk_norm == (theirs.model_type == "qwen3")
    if theirs.model_type == "mixtral":
        assert (ours.num_experts, ours.experts_per_token) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    else:
        assert ours.num_experts == 0
    for layer in range(ours.num_layers):
        window = getattr(theirs, "sliding_window", None)
        if theirs.model_type.startswith("qwen") and theirs.layer_types[layer] == "full_attention":
            window = None
        assert ours.layer_window(layer) == ours.windows[ours.window_idx(layer)] == window
    assert len(set(ours.windows)) == len(ours.windows) == len({ours.layer_window(i) for i in range(ours.num_layers)})
    theirs.standardize_rope_params()  # as its models do before they use them
    rotary = {name: value for name, value in theirs.rope_parameters.items() if value is not None}
    assert ours.rotary_base == rotary.pop("rope_theta")
    kind = rotary.pop("rope_type")
    if kind == "default":
        assert ours.rotary_scaling is None
        return
    assert ours.rotary_scaling is not None
    rotary.pop("type", None)
    for name, value in rotary.items():
        mine = getattr(ours.rotary_scaling, name)
        assert (list(mine) if isinstance(mine, tuple) else mine) == value, name
    defaults = {field.name: field.default for field in dataclasses.fields(RotaryScaling) if field.name != "type"}
    for name in defaults.keys() - rotary.keys():
        assert getattr(ours.rotary_scaling, name) == defaults[name], name
    assert ours.rotary_scaling.type == kind


# Reading what transformers writes, and what it fills in.


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("rotary", ROTARY, ids=lambda rotary: rotary["rope_type"])
def test_reads_what_transformers_saves(architecture: str, rotary: dict[str, Any], tmp_path: Path) -> None:
    theirs = CLASSES[architecture](
        **SIZES,
        num_key_value_heads=4,
        head_dim=2,
        rope_parameters={**rotary, "rope_theta": 5e5},
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=[architecture],
        hidden_act="gelu",
    )
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every field that transformers writes is known
        ours = LLaMAConfig.from_hugging_face(tmp_path)
    assert_same(ours, theirs)


@pytest.mark.parametrize("architecture", CLASSES)
def test_defaults_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = write(tmp_path, fields(architecture))
    assert_same(LLaMAConfig.from_hugging_face(folder), CLASSES[architecture].from_pretrained(folder))


OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LlamaForCausalLM", {"attention_bias": True}),
    ("LlamaForCausalLM", {"mlp_bias": True, "hidden_act": "relu"}),
    ("LlamaForCausalLM", {"head_dim": 10, "num_key_value_heads": 1}),
    ("LlamaForCausalLM", {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None}),
    ("LlamaForCausalLM", {"torch_dtype": "float16"}),
    ("LlamaForCausalLM", {"dtype": "bfloat16"}),
    ("LlamaForCausalLM", {"rope_theta": 123456, "rope_scaling": {"type": "linear", "factor": 3}}),
    ("LlamaForCausalLM", {"rope_theta": 1e6, "rope_scaling": {}}),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}}),
    ("LlamaForCausalLM", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    ("LlamaForCausalLM", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": 7.0}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 77.0}}),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 64}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 17}),
    ("MixtralForCausalLM", {"sliding_window": 17}),
    ("MixtralForCausalLM", {"rope_theta": 10000.0}),
    ("Qwen2ForCausalLM", {"sliding_window": 17, "use_sliding_window": False}),
    ("Qwen2ForCausalLM", {"sliding_window": 17, "use_sliding_window": True}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}),
    ("Qwen2ForCausalLM", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 1}),
    ("Qwen3ForCausalLM", {"sliding_window": 17, "use_sliding_window": True, "max_window_layers": 0}),
    ("Qwen3ForCausalLM", {"attention_bias": True, "head_dim": 6}),
    (
        "Qwen2ForCausalLM",
        {
            "sliding_window": 17,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
)


@pytest.mark.parametrize(("architecture", "others"), OPTIONS, ids=str)
def test_options_as_transformers_reads_them(architecture: str, others: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, fields(architecture, **others))
    assert_same(LLaMAConfig.from_hugging_face(folder), CLASSES[architecture].from_pretrained(folder))


# The fields of well-known checkpoints' config.json files, and the longest sequence that each model is made for.
WELL_KNOWN = json.loads((Path(__file__).parent / "data" / "well_known_configs.json").read_text())


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_well_known_files(name: str, tmp_path: Path) -> None:
    content = WELL_KNOWN[name]["config"]
    folder = write(tmp_path, content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LLaMAConfig.from_hugging_face(folder)
    theirs = CLASSES[content["architectures"][0]].from_pretrained(folder)
    assert_same(ours, theirs)
    assert ours.context_length == WELL_KNOWN[name]["context_length"]


def test_a_field_is_read_from_the_file_as_well_as_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, fields())
    assert LLaMAConfig.from_hugging_face(folder / "config.json") == LLaMAConfig.from_hugging_face(str(folder))


def test_architecture_from_the_model_type_alone() -> None:
    assert read("MistralForCausalLM", architectures=...).architecture == "MistralForCausalLM"
    assert read_architecture({"model_type": "qwen2"}) == "Qwen2ForCausalLM"


def test_old_spellings_of_rotary_types() -> None:
    scaling = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    config = read(head_dim=2, rope_scaling=scaling, original_max_position_embeddings=256)
    assert config.rotary_scaling is not None
    assert config.rotary_scaling.type == "longrope"
    assert config.rotary_scaling.original_max_position_embeddings == 256
    finetuned = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
    assert read(rope_scaling=finetuned).rotary_scaling == read(rope_parameters=finetuned).rotary_scaling


def test_both_rotary_spellings_may_stand_together_if_they_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    together = read(rope_theta=500.0, rope_scaling=linear, rope_parameters=linear | {"rope_theta": 500.0})
    assert together == read(rope_theta=500.0, rope_scaling=linear)
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters say different things: keep"):
        read(rope_scaling=linear, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


# context_length


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "original_max_position_embeddings": 256}, 1024),
        (LLAMA3 | {"original_max_position_embeddings": 128}, 1024),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1],
                "long_factor": [1],
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            1024,
        ),
    ],
    ids=str,
)
def test_context_length(scaling: dict[str, Any] | None, length: int) -> None:
    assert read(head_dim=2, max_position_embeddings=1024, rope_scaling=scaling).context_length == length


# What is refused.

WRONG_TYPES: tuple[tuple[str, object], ...] = tuple(
    [
        (name, value)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        )
        for value in ("64", 64.0, True, [64], 0, -1)
    ]
    + [(name, value) for name in ("rms_norm_eps", "rope_theta") for value in ("1e-5", True, [1], 0, -1e-5, 10**400)]
    + [(name, value) for name in ("rms_norm_eps", "rope_theta") for value in (float("nan"), float("inf"))]
    + [(name, value) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias") for value in ("false", 0, 1)]
    + [("hidden_act", value) for value in (1, ["silu"], "swish", "quick_gelu")]
    + [("torch_dtype", value) for value in (16, "float64", "int8", "auto")]
    + [("dtype", value) for value in (16, "float8_e4m3fn")]
    + [("architectures", value) for value in ("LlamaForCausalLM", [], [1], ["LlamaForCausalLM", "LlamaModel"])]
    + [("rope_scaling", value) for value in ("linear", 2.0, ["linear"])]
    + [("rope_parameters", value) for value in ("linear", 2.0)]
    + [("layer_types", value) for value in ("full_attention", ["full_attention"], ["chunked_attention"] * 3)]
)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=lambda value: str(value)[:20])
def test_wrong_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^config.json: {name} is ") as error:
        read(**{name: value})
    assert repr(value)[:60] in str(error.value)
    assert "must be" in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", ["4096", 4096.0, 0, [4096]])
def test_wrong_sliding_window_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"sliding_window is .*must be"):
        read("MistralForCausalLM", sliding_window=value)


REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@pytest.mark.parametrize("value", [..., None])
@pytest.mark.parametrize("name", [*REQUIRED, "num_local_experts", "num_experts_per_tok"])
def test_missing_fields_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"config.json: the field {name} is missing"):
        read("MixtralForCausalLM", **{name: value})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "the architecture 'GPT2LMHeadModel' is not supported: puna runs Llama",
        ),
        ({"architectures": ["LlamaModel"]}, "'LlamaModel' is not supported"),
        ({"architectures": ..., "model_type": "phi3"}, "model_type is 'phi3': puna runs Llama"),
        ({"architectures": ..., "model_type": ...}, "the field model_type is missing"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3: it must be a divisor of hidden_size, 64"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5: it must be a divisor of num_attention_heads, 32"),
        ({"head_dim": 3}, "head_size is 3: rotary embeddings need an even number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: puna does not support"),
        ({"rope_interleaved": True}, "rope_interleaved is True: puna does not support"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: puna does not support"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625: puna does not support"),
        ({"compression_config": {"quant_method": "gptq"}}, "compression_config, .* is not supported .*'gptq'.*: use"),
        ({"layer_types": ["sliding_attention"] * 3}, "must be full_attention everywhere"),
        (
            {"rope_scaling": {"rope_type": "mrope", "mrope_section": [1]}},
            "rope_scaling: rope_type is 'mrope': it must be",
        ),
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling: type is 'ntk': it must be one of default, linear, dynamic"),
        ({"rope_scaling": {"type": 3}}, "rope_scaling: type is 3: it must be a string"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the field factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling: the field factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling: factor is '2': it must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor is 0.0: it must be more than 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast: not a field of .*'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, "factor: not a field of rope_type 'default'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "the field low_freq_factor is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0: .*more than low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0.5}}, "is 0.5: it must be a whole number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate is 'no': it must be true or"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters differs from layer to"),
        (
            {"head_dim": 2, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
            "long_factor is '2 numbers': it must be 1 numbers, half of head_dim",
        ),
        (
            {"head_dim": 2, "rope_scaling": {"type": "longrope", "short_factor": ["1"], "long_factor": [1.0]}},
            "short_factor is '1': it must be a list of numbers",
        ),
    ],
    ids=str,
)
def test_unsupported_is_named(others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**others)


@pytest.mark.parametrize(
    ("architecture", "others", "message"),
    [
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "the same everywhere"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 3}, "the window is switched off"),
        ("Qwen2ForCausalLM", {"use_sliding_window": 1}, "use_sliding_window is 1: it must be true or false"),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers is '1'"),
        ("Qwen2ForCausalLM", {"num_attention_heads": 16}, "num_key_value_heads is 32: it must be a divisor"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 5}, "experts_per_token is 5: it must be in 1..4"),
        ("MixtralForCausalLM", {"num_local_experts": "4"}, "num_local_experts is '4': it must be a whole number"),
    ],
    ids=str,
)
def test_unsupported_in_a_family_is_named(architecture: str, others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(architecture, **others)


def test_unknown_fields_are_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"config.json: puna does not know and ignores: a_novelty, qk_layernorm$"):
        read(qk_layernorm=True, a_novelty=3, unset_novelty=None)


@pytest.mark.parametrize(
    ("architecture", "others"),
    [
        ("MistralForCausalLM", {"attention_bias": True}),
        ("Qwen2ForCausalLM", {"mlp_bias": True}),
        ("LlamaForCausalLM", {"sliding_window": 4096}),
        ("LlamaForCausalLM", {"num_local_experts": 8}),
    ],
)
def test_a_field_of_other_families_is_named_in_a_warning(architecture: str, others: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=f"ignores: {next(iter(others))}$"):
        changed = read(architecture, **others)
    assert changed == read(architecture)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "holds a list, not an object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "cut", "list", "not utf-8", "deep", "long number"],
)
def test_broken_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        LLaMAConfig.from_hugging_face(tmp_path)
    assert str(file) in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist: give the folder of a checkpoint"):
        LLaMAConfig.from_hugging_face(tmp_path)


# Writing.


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("rotary", ROTARY, ids=lambda rotary: rotary["rope_type"])
def test_round_trip(architecture: str, rotary: dict[str, Any], tmp_path: Path) -> None:
    ours = read(
        architecture,
        head_dim=2,
        num_key_value_heads=4,
        rope_theta=5e5,
        rope_scaling=rotary,
        torch_dtype="float16",
        tie_word_embeddings=True,
        rms_norm_eps=3e-6,
        hidden_act="gelu_pytorch_tanh",
    )
    folder = write(tmp_path, ours.to_hugging_face())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LLaMAConfig.from_hugging_face(folder) == ours
    assert_same(ours, CLASSES[architecture].from_pretrained(folder))


@pytest.mark.parametrize(("architecture", "others"), OPTIONS, ids=str)
def test_round_trip_of_options(architecture: str, others: dict[str, Any], tmp_path: Path) -> None:
    ours = read(architecture, **others)
    folder = write(tmp_path, ours.to_hugging_face())
    assert LLaMAConfig.from_hugging_face(folder) == ours
    assert_same(ours, CLASSES[architecture].from_pretrained(folder))


def test_yarn_without_a_factor_round_trips(tmp_path: Path) -> None:
    ours = read(rope_scaling={"type": "yarn", "original_max_position_embeddings": 512})
    folder = write(tmp_path, ours.to_hugging_face())
    assert LLaMAConfig.from_hugging_face(folder) == ours
    assert transformers.LlamaConfig.from_pretrained(folder).rope_parameters["factor"] is None


@pytest.mark.parametrize(
    ("architecture", "changes", "name"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, "sliding windows"),
        ("MistralForCausalLM", {"sliding_window": 8, "sliding_window_layers": (1,)}, "sliding windows"),
        ("LlamaForCausalLM", {"qk_norm": True}, "qk_norm"),
        ("LlamaForCausalLM", {"attn_bias": True}, "attn_output_bias"),
        ("MistralForCausalLM", {"attn_bias": True}, "attn_bias"),
        ("Qwen2ForCausalLM", {"mlp_bias": True}, "mlp_bias"),
        ("LlamaForCausalLM", {"num_experts": 4, "experts_per_token": 2}, "num_experts"),
    ],
)
def test_what_a_family_can_not_say_is_not_written(architecture: str, changes: dict[str, Any], name: str) -> None:
    config = dataclasses.replace(read(architecture), **changes)
    with pytest.raises(ValueError, match=f"{name}: .* the config.json of a {architecture} can only say"):
        config.to_hugging_face()


# GenerationConfig.


def test_generation_config_prefers_its_own_file(tmp_path: Path) -> None:
    assert GenerationConfig.from_hugging_face(tmp_path) == GenerationConfig()
    write(tmp_path, fields(bos_token_id=1, eos_token_id=2, pad_token_id=7, temperature=0.5))
    assert GenerationConfig.from_hugging_face(tmp_path) == GenerationConfig(
        bos_token_id=1, eos_token_ids=(2,), pad_token_id=7, temperature=0.5
    )
    generation = {"eos_token_id": [5, 6], "do_sample": True, "top_p": 0.9, "top_k": 20, "temperature": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert GenerationConfig.from_hugging_face(tmp_path) == GenerationConfig(
        bos_token_id=1, eos_token_ids=(5, 6), pad_token_id=7, do_sample=True, top_p=0.9, top_k=20, temperature=0.5
    )


def test_generation_config_round_trips(tmp_path: Path) -> None:
    ours = GenerationConfig(eos_token_ids=(5, 6), do_sample=True, top_k=20, repetition_penalty=1.1, pad_token_id=0)
    (tmp_path / "generation_config.json").write_text(json.dumps(ours.to_hugging_face()))
    assert GenerationConfig.from_hugging_face(tmp_path) == ours
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.top_k, theirs.do_sample, theirs.pad_token_id) == ([5, 6], 20, True, 0)
    assert GenerationConfig().to_hugging_face() == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos_token_id", "2"), ("eos_token_id", [2, "3"]), ("bos_token_id", [1]), ("temperature", "hot"), ("top_k", 2.5)],
)
def test_generation_config_names_wrong_types(name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"generation_config.json: {name} is .*it must be"):
        GenerationConfig.from_hugging_face(tmp_path)
