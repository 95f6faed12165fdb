"""The engine over the GPU's kernels: in triton's interpreter with an accelerator that is the CPU, or on a GPU.

On a GPU also what nothing else can show: that captured steps compute what eager ones do, that steps in flight change
nothing, and that deterministic mode keeps every bit.
"""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_accelerator import FakeAccelerator
from puna.config import EngineConfig, LLaMAConfig
from puna.engine.engine import Engine
from puna.engine.token_ids import token_id_tokenizer
from puna.llm import LLM
from puna.models import LLaMAForCausalLM
from puna.models.loading import save_model
from puna.ops import ReferenceBackend, TritonBackend, triton_norm
from puna.ops.triton_overlap import launch_options
from puna.ops.triton_tuning import Tuning
from puna.runtime import async_runner
from puna.runtime.async_runner import AsyncModelRunner
from puna.runtime.cuda import CudaAccelerator, usable_device
from puna.runtime.step_graph import CudaStepGraph
from puna.scheduling.sampling_params import SamplingParams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
VOCAB = 200
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 64,
    "hidden_size": 128,
    "mlp_hidden_size": 192,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    model = LLaMAForCausalLM(LLaMAConfig(**SHAPE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
    save_model(model, folder)
    return folder


@pytest.fixture
def on_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of an engine that runs on the GPU's kernels: without a GPU, in the interpreter."""
    if device.type == "cpu":
        monkeypatch.setattr("puna.ops.backends_for", lambda device: (TritonBackend(), ReferenceBackend()))
        monkeypatch.setattr("puna.layers.pieces.dense_layout", lambda device: "rows")
        accelerator = FakeAccelerator()
        monkeypatch.setattr("puna.engine.engine.accelerator_of", lambda device: accelerator)
    return device


def llm(folder: Path, device: torch.device, **options: Any) -> LLM:
    """LLM without files of a tokenizer."""
    it = LLM.__new__(LLM)
    dtype, quantization = options.pop("dtype", None), options.pop("quantization", None)
    it.engine = Engine.from_pretrained(
        str(folder),
        dtype,
        device,
        EngineConfig(**({"max_model_len": 512} | options)),
        quantization=quantization,
        tokenizer=token_id_tokenizer(VOCAB),
    )
    return it


def answers(folder: Path, device: torch.device, prompts: list[list[int]], params: Any, **options: Any) -> list[Any]:
    with llm(folder, device, **options) as it:
        outputs = it.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


def random_prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def test_tokens_are_those_of_the_cpu(folder: Path, on_kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32; chunks and decode steps, greedy and drawn, replayed from captured steps."""
    is_gpu = on_kernels.type == "cuda"
    lengths, count = ((1, 5, 40, 300), 40) if is_gpu else ((1, 13), 3)
    prompts = random_prompts(1, lengths)
    params = [
        SamplingParams(temperature=0.8 * (i == 1), top_p=0.9, seed=i, max_tokens=count, ignore_eos=True)
        for i in range(len(prompts))
    ]
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 64 if is_gpu else 8}
    options["max_model_len"] = 512 if is_gpu else 32
    found = answers(folder, on_kernels, prompts, params, dtype="float32", **options)
    monkeypatch.undo()
    expected = answers(folder, torch.device("cpu"), prompts, params, dtype="float32", **options)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_kernels_that_overlap_say_the_same(
    folder: Path, on_kernels: torch.device, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence at a time, so that nothing else differs; in the interpreter, only that launchers can be told."""
    is_gpu = on_kernels.type == "cuda"
    if not is_gpu and quantization is not None:
        pytest.skip("in the interpreter one format is enough, and float32 the fastest")
    if is_gpu and torch.cuda.get_device_capability(on_kernels) < (9, 0):
        pytest.skip("needs compute capability 9.0")
    prompts = random_prompts(9, (5, 40, 300, 1) if is_gpu else (1,))
    params = [
        SamplingParams(temperature=0.9 * (i % 2), top_p=0.9, seed=i, max_tokens=100 if is_gpu else 2, ignore_eos=True)
        for i in range(len(prompts))
    ]
    options: dict[str, Any] = {"dtype": "bfloat16", "quantization": quantization, "max_num_seqs": 1}
    if not is_gpu:
        options |= {"dtype": "float32", "max_model_len": 16, "max_num_batched_tokens": 2}
    told: list[dict[str, bool]] = []
    monkeypatch.setattr(triton_norm, "launch_options", lambda: told.append(launch_options()) or told[-1])
    usual = answers(folder, on_kernels, prompts, params, **options)
    assert told
    assert not any(told)
    told.clear()
    assert answers(folder, on_kernels, prompts, params, overlap_kernels=True, **options) == usual
    # Not all: variants are timed without, and what stands for a graph's replay in the interpreter runs anywhere.
    assert any(told)
    if is_gpu:
        options["enforce_eager"] = True
        assert answers(folder, on_kernels, prompts, params, overlap_kernels=True, **options) == usual


def test_measurements_are_kept_where_the_engine_is_told(
    folder: Path, on_kernels: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def of_device(device: torch.device, folder: Path | None = None, *, overlaps: bool = False) -> Tuning:
        raise RuntimeError(f"{device} {folder} {overlaps}")

    monkeypatch.setattr(Tuning, "of_device", of_device)
    with pytest.raises(RuntimeError, match=re.escape(f"{on_kernels} {tmp_path} False")):
        llm(folder, on_kernels, tuning_dir=str(tmp_path))


def test_kernels_can_only_overlap_on_a_gpu(folder: Path) -> None:
    with pytest.raises(ValueError, match="overlap_kernels is set, but the device is cpu: it takes an NVIDIA GPU"):
        llm(folder, torch.device("cpu"), overlap_kernels=True)


MIX: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.1, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "logprobs": 3},
)


def mixed_requests(seed: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(seed)
    prompts = random_prompts(seed, tuple(rng.choice((1, 3, 17, 60, 200)) for _ in range(count)))
    params = [
        SamplingParams(**MIX[i % len(MIX)], seed=i, max_tokens=rng.randrange(1, 40), ignore_eos=True)
        for i in range(count)
    ]
    return prompts, params


@needs_gpu
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("ending", ["greedy", "drawn", "hidden"])
def test_replay_equals_eager_in_every_bit(folder: Path, device: torch.device, quantization: Any, ending: Any) -> None:
    with llm(folder, device, dtype="bfloat16", quantization=quantization, max_num_seqs=16) as it:
        runner = it.engine.parts.executor._launcher  # type: ignore[attr-defined]
        assert isinstance(runner, AsyncModelRunner)
        plan = runner.largest_decode()
        columns = {
            "temperature": torch.full((16,), 0.9).numpy(),
            "top_k": torch.full((16,), 50).numpy(),
            "top_p": torch.full((16,), 0.9, dtype=torch.float64).numpy(),
            "min_p": torch.zeros(16).numpy(),
            "seeds": torch.arange(16).numpy(),
            "positions": torch.arange(16).numpy(),
        }
        with torch.inference_mode():
            for cache in (*runner.pool.key_caches, *runner.pool.value_caches):
                cache.normal_()
            inputs = runner.buffers.fill(plan, num_rows=16, draws=columns)
            graph = CudaStepGraph(lambda step: runner._run(ending, step), inputs, CudaAccelerator(device))
            found = graph.run(inputs).clone()
            tokens, highest = runner.buffers.chosen.clone(), runner.buffers.highest.clone()
            expected = runner._run(ending, inputs)
            assert torch.equal(found, expected)
            assert torch.equal(tokens, runner.buffers.chosen)
            assert torch.equal(highest, runner.buffers.highest)


@needs_gpu
@pytest.mark.parametrize("capture", ["lazy", "eager"])
def test_captured_steps_in_flight_say_what_eager_ones_say(folder: Path, device: torch.device, capture: Any) -> None:
    prompts, params = mixed_requests(2, 20)
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 96}
    found = answers(folder, device, prompts, params, capture=capture, **options)
    expected = answers(folder, device, prompts, params, enforce_eager=True, **options)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


@needs_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_captured_steps_with_prompts_say_what_eager_ones_say(
    folder: Path, device: torch.device, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that the GPU ends by itself, so that nearly all steps are captured, from the first of their size on."""
    monkeypatch.setattr(async_runner, "_UNCAPTURED_STEPS", 0)
    prompts, params = mixed_requests(6, 60)
    params = [dataclasses.replace(one, repetition_penalty=1.0, logprobs=None) for one in params]
    options: dict[str, Any] = {"dtype": "bfloat16" if deterministic else "float32", "deterministic": deterministic}
    options |= {"max_num_seqs": 8, "max_num_batched_tokens": 128}
    found = answers(folder, device, prompts, params, **options)
    expected = answers(folder, device, prompts, params, enforce_eager=True, **options)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


@needs_gpu
def test_steps_that_wait_for_each_other_say_the_same(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = mixed_requests(3, 20)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 8, "max_num_batched_tokens": 96}
    found = answers(folder, device, prompts, params, deterministic=True, **options)
    launch = AsyncModelRunner.launch

    def launch_and_wait(runner: AsyncModelRunner, plan: Any) -> Any:
        step = launch(runner, plan)
        step.result()
        return step

    monkeypatch.setattr(AsyncModelRunner, "launch", launch_and_wait)
    assert answers(folder, device, prompts, params, deterministic=True, **options) == found


@needs_gpu
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_deterministic_mode_keeps_every_bit(
    folder: Path, device: torch.device, quantization: Any, kv_cache_dtype: Any
) -> None:
    """Alone and together, whole and in chunks, with and without a prefix hit, on few blocks: tokens and logprobs."""
    prompts = random_prompts(4, (1, 16, 33, 150, 150, 300))
    prompts[4] = prompts[3][:96] + prompts[4]
    params = [
        SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=24, logprobs=3, ignore_eos=True)
        for i in range(len(prompts))
    ]
    model: dict[str, Any] = {
        "dtype": "bfloat16",
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "deterministic": True,
    }
    alone = [
        answers(folder, device, [prompt], [own], max_num_seqs=1, enable_prefix_caching=False, **model)[0]
        for prompt, own in zip(prompts, params, strict=True)
    ]
    for options in (
        {"max_num_seqs": 8, "max_num_batched_tokens": 1024},
        {"max_num_seqs": 8, "max_num_batched_tokens": 40},
        {"max_num_seqs": 3, "max_num_batched_tokens": 17, "enforce_eager": True},
    ):
        with llm(folder, device, **model, **options) as it:
            for _ in range(2):  # the second time from the prefix cache
                outputs = it.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
                found = [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]
                assert found == alone, options


@needs_gpu
def test_what_cuda_says_of_itself(device: torch.device) -> None:
    accelerator = CudaAccelerator(usable_device("auto"))
    accelerator.use()
    before = accelerator.memory()
    assert 0 < before.free <= before.total
    accelerator.reset_peak()
    number = torch.zeros(1 << 20, dtype=torch.uint8, device=accelerator.device)
    assert accelerator.memory().peak >= before.allocated + (1 << 20)
    host = accelerator.pinned(1 << 20)
    assert host.is_pinned()
    began = accelerator.record(timed=True)
    graph, result = accelerator.capture(lambda: number + 7)
    graph.replay()
    accelerator.copy(host, result)
    ended = accelerator.record(timed=True)
    ended.synchronize()
    assert int(host.min()) == int(host.max()) == 7
    assert 0 < ended.seconds_since(began) < 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_no_gpu_is_said_plainly(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"device is '{name}', but this .*: use cpu"):
        usable_device(name)
    with pytest.raises(ValueError, match="use cpu"):
        llm(folder, torch.device(name))
    assert usable_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        usable_device("abacus")
