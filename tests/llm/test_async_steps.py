"""Engines whose steps are launched behind each other, on an accelerator that is the CPU: threads, errors, memory."""

from __future__ import annotations

import json
import queue
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_accelerator import FakeAccelerator
from puna.config import EngineConfig
from puna.engine.engine import Engine
from puna.engine.outputs import RequestDelta
from puna.llm import LLM
from puna.runtime.tracing import ChromeTrace
from puna.scheduling.sampling_params import SamplingParams

PATIENCE = 30


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    it = FakeAccelerator()
    monkeypatch.setattr("puna.engine.engine.accelerator_of", lambda device: it)
    return it


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("puna-")}


def requests(count: int) -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    rng = random.Random(7)
    prompts = [[rng.randrange(2, 258) for _ in range(rng.choice((1, 2, 9, 30, 70)))] for _ in range(count)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 30},
        {"temperature": 0.0, "stop_token_ids": tuple(range(2, 60))},
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"temperature": 1.0, "n": 2, "logprobs": 1},
        {"temperature": 0.0, "stop": ["a", "e"]},
    ]
    params = [
        SamplingParams(**({"max_tokens": rng.randrange(1, 30), "seed": i} | kinds[i % len(kinds)]))
        for i in range(count)
    ]
    return [{"prompt_token_ids": prompt} for prompt in prompts], params


@pytest.mark.parametrize("capture", ["lazy", "eager"])
def test_an_engine_gives_what_a_synchronous_one_gives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, accelerator: FakeAccelerator, capture: Any
) -> None:
    """In bits where the compiled kernels are: nothing but the order of things is another one."""
    prompts, params = requests(28)
    options: dict[str, Any] = {"max_num_seqs": 9, "max_num_batched_tokens": 48, "max_model_len": 128, "seed": 4}
    with LLM(folder, **options, capture=capture, kv_cache_memory=75_000) as llm:
        assert {"puna-engine", "puna-step", "puna-results"} <= threads()
        found = llm.generate(prompts, params)
        assert llm.engine.statistics().num_preemptions > 0
    assert "puna-results" not in threads()
    assert sum(graph.num_replays for graph in accelerator.graphs) > 10
    monkeypatch.undo()
    with LLM(folder, **options) as llm:
        expected = llm.generate(prompts, params)
    for one, other in zip(found, expected, strict=True):
        assert [part.token_ids for part in one.outputs] == [part.token_ids for part in other.outputs]
        assert [part.finish_reason for part in one.outputs] == [part.finish_reason for part in other.outputs]
        assert [part.text for part in one.outputs] == [part.text for part in other.outputs]


def test_a_step_is_launched_while_the_one_before_runs(folder: Path, accelerator: FakeAccelerator) -> None:
    engine = Engine.from_pretrained(str(folder), engine_config=EngineConfig(max_num_seqs=4, max_model_len=64))
    accelerator.go()
    accelerator.runs_freely = False
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    try:
        engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), deltas.put)
        for _ in range(PATIENCE * 100):
            # Each step: a copy to the device and an event behind it, a copy back and another event.
            if accelerator.queued - accelerator.reached >= 8:
                break
            threading.Event().wait(0.01)
        assert accelerator.queued - accelerator.reached == 8  # two steps, and no third: its plan needs the first's end
        assert deltas.empty()
        accelerator.go(4)
        assert deltas.get(timeout=PATIENCE).completions[0].token_ids
        accelerator.runs_freely = True
        accelerator.go()
        while not deltas.get(timeout=PATIENCE).finished:
            pass
    finally:
        accelerator.runs_freely = True
        accelerator.go()
        engine.shutdown()


def test_an_error_of_the_device_ends_all_requests_and_the_threads(folder: Path, accelerator: FakeAccelerator) -> None:
    engine = Engine.from_pretrained(str(folder))
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    accelerator.error = accelerator.queued + 40, RuntimeError("an illegal memory access")
    engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), deltas.put)
    while not (last := deltas.get(timeout=PATIENCE)).finished:
        pass
    assert last.error == "RuntimeError: an illegal memory access"
    engine.shutdown()
    assert "puna-results" not in threads()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.submit([5], SamplingParams(), deltas.put)


def test_shutdown_in_the_middle_of_steps(folder: Path, accelerator: FakeAccelerator) -> None:
    engine = Engine.from_pretrained(str(folder))
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    for _ in range(3):
        engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), deltas.put)
    deltas.get(timeout=PATIENCE)
    engine.shutdown()
    assert not {"puna-engine", "puna-step", "puna-results"} & threads()
    ends = 0
    while not deltas.empty():
        ends += deltas.get().finished
    assert ends == 3


def test_a_trace_shows_launches_and_the_device(folder: Path, tmp_path: Path, accelerator: FakeAccelerator) -> None:
    engine = Engine.from_pretrained(str(folder), tracer=ChromeTrace(tmp_path))
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), deltas.put)
    while not deltas.get(timeout=PATIENCE).finished:
        pass
    engine.shutdown()
    (path,) = tmp_path.iterdir()
    events = json.loads(path.read_text())
    counts = {name: sum(event["name"] == name for event in events) for name in ("launch", "read", "commit")}
    on_device = [event for event in events if event["name"] == "step" and event["tid"] == 3]
    assert counts["read"] == len(on_device) == 9
    assert counts["launch"] >= 9
    assert all(event["dur"] >= 0 for event in on_device)


def test_the_cache_takes_what_is_measured_to_be_left(folder: Path, accelerator: FakeAccelerator) -> None:
    """Of the device's share: not what others have, nor what the largest steps took. kv_cache_memory says otherwise."""

    def memory(**options: Any) -> Any:
        limits = EngineConfig(**({"max_num_seqs": 200, "max_model_len": 256} | options))
        engine = Engine.from_pretrained(str(folder), engine_config=limits)
        engine.shutdown()
        return engine.parts.memory

    accelerator.total = 16 << 20
    whole = memory(gpu_memory_utilization=1)
    half = memory(gpu_memory_utilization=0.5)
    assert whole.weights == half.weights
    assert whole.total - whole.weights <= accelerator.total
    assert half.total - half.weights <= accelerator.total // 2  # the weights are nowhere on this device
    accelerator.peaks = [0, 0, 2 << 20, 1 << 20]  # before weights are read, and then; of a prefill, of a decode step
    less = memory(gpu_memory_utilization=0.5)
    assert less.workspace - half.workspace == 3 << 20
    assert less.num_blocks[0] < half.num_blocks[0]
    assert memory(kv_cache_memory=1 << 20).cache <= 1 << 20
    accelerator.used = accelerator.total * 9 // 10
    with pytest.raises(ValueError, match="does not fit: weights of"):
        memory(gpu_memory_utilization=0.9)
