"""`puna bench`: the shape of its report, the sums behind it, and what it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from puna.cli.bench_run import run_batch
from puna.config import LLaMAConfig
from puna.engine.outputs import CompletionDelta, RequestDelta

Run = Callable[..., Any]
CONFIG = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    hidden_size=64,
    mlp_hidden_size=96,
    vocab_size=300,
    max_position_embeddings=128,
)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG.to_hugging_face()), encoding="utf-8")
    return file


def test_json_of_a_random_model(puna: Run, config_file: Path) -> None:
    words = ("--prompt-tokens", 24, "--new-tokens", 8, "--batch", "1,3", "--repeat", 2, "--threads", 1, "--json")
    done = puna("bench", "--random", config_file, "--kv-cache-dtype", "int8", *words)
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert [one["batch"] for one in found["results"]] == [1, 3]
    for one in found["results"]:
        assert set(one) == {
            "batch",
            "prompt_tokens",
            "new_tokens",
            "prefill_tokens_per_second",
            "decode_tokens_per_second",
            "time_to_first_token_seconds",
            "percent_of_limit",
        }
        assert (one["prompt_tokens"], one["new_tokens"]) == (24, 8)
        assert 0 < one["time_to_first_token_seconds"] < 60
        assert one["prefill_tokens_per_second"] > 0
        assert one["decode_tokens_per_second"] > 0
        assert set(one["percent_of_limit"]) == {"prefill", "decode"}
        assert all(share > 0 for share in one["percent_of_limit"].values())
    assert found["threads"] == 1
    assert found["peak_memory_bytes"] > 1 << 20
    assert all(rate > 0 for rate in found["limit"].values())
    assert {"read_bytes_per_second", "int8_operations_per_second", "float32_operations_per_second"} <= set(
        found["limit"]
    )
    assert (found["dtype"], found["quantization"], found["model"]) == ("float32", None, None)
    assert found["kv_cache_dtype"] == "int8"


def test_table_and_plot_of_a_model(puna: Run, random_model: Any, tmp_path: Path) -> None:
    plot = tmp_path / "bench.png"
    words = ("--new-tokens", 4, "--batch", 2, "--repeat", 1, "--threads", 1, "--dtype", "bfloat16", "--plot", plot)
    done = puna("bench", random_model, *words)
    assert (done.code, done.err) == (0, "")
    first, second, *_ = done.out.splitlines()
    assert first == f"{random_model} (bfloat16)"
    assert "prompts of 60 tokens, 4 new" in second  # as many as the context of 64 leaves
    assert "peak memory" in done.out
    assert plot.read_bytes().startswith(b"\x89PNG")


class Script:
    """Stands for an engine: calls back with tokens of the sequences, in the given order of steps."""

    def __init__(self, steps: Sequence[Sequence[int]], seconds: float, error: str | None = None) -> None:
        self._steps, self._seconds, self._error = steps, seconds, error
        self._listeners: list[Callable[[RequestDelta], None]] = []

    def submit(self, prompt: Sequence[int], params: Any, listener: Callable[[RequestDelta], None]) -> None:
        self._listeners.append(listener)
        if len(self._listeners) < 1 + max(map(max, self._steps)):
            return
        left = [params.max_tokens] * len(self._listeners)
        for step in self._steps:
            self._clock(self._seconds)
            for sequence in step:
                left[sequence] -= 1
                completions = (CompletionDelta(0, "", (7,)),)
                is_last = left[sequence] == 0
                self._listeners[sequence](
                    RequestDelta("", completions, finished=is_last, error=self._error if is_last else None)
                )

    def _clock(self, seconds: float) -> None:
        raise NotImplementedError


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    """Engines whose steps take no real time: the clock is moved on instead."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(*arguments: Any, **keywords: Any) -> Script:
        engine = Script(*arguments, **keywords)

        def clock(seconds: float) -> None:
            now[0] += seconds

        engine._clock = clock  # type: ignore[method-assign]
        return engine

    return make


def test_times_of_one_sequence(script: Callable[..., Any]) -> None:
    times = run_batch(script([[0]] * 5, 2.0), [[1]], 5)
    assert list(times.first_tokens) == [2.0]
    assert (times.decode_steps, times.decode_seconds) == (4, 8.0)


def test_decode_is_counted_while_all_sequences_run(script: Callable[..., Any]) -> None:
    # The first one is two steps ahead; so it ends two steps before the others.
    steps = [[0], [0, 1], [0, 1, 2], [0, 1, 2], [1, 2], [2]]
    times = run_batch(script(steps, 1.0), [[1]] * 3, 4)
    assert list(times.first_tokens) == [1.0, 2.0, 3.0]
    assert times.prefill_seconds == 3.0
    assert (times.decode_steps, times.decode_seconds) == (1, 1.0)


def test_a_failed_request_is_an_error(script: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        run_batch(script([[0]] * 3, 1.0, error="out of luck"), [[1]], 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a model, or --random"),
        (("demo", "--random", "llama-3.2-1b"), "one of the two"),
        (("--random", "llama-9"), "'llama-9': give the path of a config.json, or one of llama-2-7b"),
        (("demo", "--batch", "1,x"), "--batch is '1,x': give whole numbers"),
        (("demo", "--batch", "0"), "--batch is '0'"),
        (("demo", "--batch", ""), "--batch is ''"),
        (
            ("demo", "--prompt-tokens", "510"),
            "--prompt-tokens is 510 and --new-tokens 64, but the model's context is 512",
        ),
        (("demo", "--new-tokens", "512"), "--new-tokens 512, but the model's context is 512"),
        (("demo", "--batch", "64", "--new-tokens", "2"), "--new-tokens is 2: with a batch of 64"),
        (("demo", "--plot", "x.jpg"), "--plot is 'x.jpg': its name must end in .png"),
        (("no-such-folder",), "no-such-folder"),
    ],
)
def test_refusals(puna: Run, words: Sequence[str], message: str) -> None:
    assert message in puna("bench", *words).message


def test_a_preset_can_be_written_in_capitals(monkeypatch: pytest.MonkeyPatch, puna: Run) -> None:
    asked: list[LLaMAConfig] = []

    def stop(config: LLaMAConfig, **_: Any) -> SimpleNamespace:
        asked.append(config)
        raise ValueError("seen")

    monkeypatch.setattr("puna.models.random_weights.random_checkpoint", stop)
    assert puna("bench", "--random", "Llama-3.2-1B").message == "seen"
    assert asked[0].hidden_size == 2048
