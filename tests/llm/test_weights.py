"""Which weights an engine takes on which device, and what it refuses there; nothing is allocated."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch

from puna import ops
from puna.config import EngineConfig, LLaMAConfig
from puna.distributed import NullCommunicator
from puna.engine.weights import in_words, op_choices, resolved_cache_dtype, weights_loader
from puna.llm import LLM
from puna.models import LLaMAForCausalLM
from puna.models.loading import ModelLoader
from puna.models.random_weights import RandomCheckpoint, random_checkpoint
from puna.ops import Choice, cpu, triton_table
from puna.ops.scaled import FP8

CONFIG = LLaMAConfig(
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=64,
    hidden_size=128,
    mlp_hidden_size=192,
    vocab_size=97,
    dtype="bfloat16",
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_table, "capability", lambda device: (9, 0))


def loader(device: str, quantization: str | None = None, stored: str | None = None, **limits: Any) -> Any:
    checkpoint = random_checkpoint(CONFIG, quantization=stored)
    found: ModelLoader[LLaMAForCausalLM] = weights_loader(
        checkpoint, CONFIG, NullCommunicator(device), quantization, EngineConfig(**limits)
    )
    return found


@pytest.mark.parametrize(
    ("quantization", "stored", "dtypes"),
    [
        (None, None, {torch.bfloat16}),
        (None, "int4", {torch.bfloat16, torch.uint8}),
        ("bf16", "int4", {torch.bfloat16}),
        ("int8", None, {torch.bfloat16, torch.uint8}),
        ("fp8", None, {torch.bfloat16, torch.float32, FP8}),
    ],
)
def test_a_gpu_takes_them_for_its_kernels(
    quantization: str | None, stored: str | None, dtypes: set[torch.dtype], hopper: None
) -> None:
    found = loader("cuda", quantization, stored, kv_cache_dtype="fp8")
    assert found.config.quant == (quantization or "stored")
    assert {parameter.dtype for parameter in found.model.parameters()} == dtypes


def test_gpus_without_fp8(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_table, "capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"quantization is 'fp8', but .*compute capability 8.9.*: use int8"):
        loader("cuda", "fp8")


def test_what_has_no_kernel_is_named(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class WithoutAttention(ops.TritonBackend):
        def function(self, op: str, spec: ops.OpSpec) -> Any:
            return "heads are too large" if op == "paged_attention" else super().function(op, spec)

    monkeypatch.setattr(ops, "backends_for", lambda device: (WithoutAttention(), ops.ReferenceBackend()))
    with caplog.at_level(logging.WARNING):
        loader("cuda")
    assert "paged_attention runs on the reference op, which is slow (triton: heads are too large)" in caplog.messages
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int8', but paged_attention .*heads are too large"):
        loader("cuda", kv_cache_dtype="int8")


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert loader("cuda").config.quant == "none"
    for wrong in ({"quantization": "int8"}, {"kv_cache_dtype": "fp8"}):
        with pytest.raises(ValueError, match=r"but the kernels for cuda need triton, which is missing: leave it out"):
            loader("cuda", **wrong)


@pytest.mark.skipif(not cpu.compiled(), reason="needs the compiled kernels")
def test_a_cpu_has_no_fp8() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype is 'fp8', but there are no kernels for FP8 on the CPU: use"):
        loader("cpu", kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="quantization is 'fp8', but there are no kernels for FP8 on cpu: use int8"):
        loader("cpu", "fp8")


def words(device: str, quantization: str | None = None, **limits: Any) -> str:
    found, comm = loader(device, quantization, **limits), NullCommunicator(device)
    return in_words(op_choices(found, comm, EngineConfig(**limits), reports_prompts=device == "cuda"))


@pytest.mark.skipif(not cpu.compiled(), reason="needs the compiled kernels")
def test_what_serves_each_op_on_a_cpu_is_said_in_a_line() -> None:
    assert words("cpu") == f"compiled ({cpu.level()}) for all 9"
    reason = "the compiled kernels need a block_size that is a multiple of 16, not 8"
    assert words("cpu", block_size=8) == f"reference for all 8 ({reason})"


def test_what_serves_each_op_on_a_gpu_is_said_in_a_line(hopper: None) -> None:
    found = op_choices(loader("cuda", "fp8"), NullCommunicator("cuda"), EngineConfig(), reports_prompts=True)
    assert {"scaled_gated_linear", "prompt_attention", "linear"} <= {one.op for one in found}
    assert in_words(found) == f"triton for all {len(found)}"


def test_an_engine_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), LLM("demo", max_model_len=64) as llm:
        said = [message for message in caplog.messages if message.startswith("ops on ")]
        assert said == [f"ops on cpu: {in_words(llm.engine.parts.ops)}"]


def test_choices_in_words() -> None:
    choices = [Choice("add", "fast", ()), Choice("embedding", "fast", ())]
    assert in_words(choices) == "fast for all 2"
    choices += [Choice(op, "slow", ("fast: too wide",)) for op in ("linear", "rotary")]
    choices += [Choice("experts", "slow", ("fast: too many",))]
    assert in_words(choices) == (
        "fast for 2; slow for linear, rotary (fast: too wide); slow for experts (fast: too many)"
    )


def cache_dtype(device: str, **limits: Any) -> str:
    comm = NullCommunicator(device)
    return resolved_cache_dtype(random_checkpoint(CONFIG), CONFIG, comm, EngineConfig(**limits))


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random checkpoints whose makers want keys and values in FP8."""
    monkeypatch.setattr(RandomCheckpoint, "cache_dtype", "fp8")


def test_the_cache_is_in_fp8_where_the_makers_say_so(
    hopper: None, declared: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert cache_dtype("cuda") == "fp8"
    (line,) = caplog.messages
    assert "keys and values are kept in FP8, as" in line
    assert "kv_cache_dtype='bfloat16' would keep them in the model's dtype" in line
    assert cache_dtype("cuda", kv_cache_dtype="bfloat16") == "bfloat16"
    assert cache_dtype("cpu") == "auto"


def test_the_cache_is_in_the_models_dtype_where_they_say_nothing(hopper: None) -> None:
    assert cache_dtype("cuda") == "auto"


def test_a_gpu_without_fp8_keeps_no_cache_in_it(hopper: None, declared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_table, "capability", lambda device: (8, 0))
    assert cache_dtype("cuda") == "auto"
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'fp8', but .*compute capability 8.9.*: leave it out"):
        loader("cuda", kv_cache_dtype="fp8")
