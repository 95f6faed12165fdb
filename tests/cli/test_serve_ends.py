"""How a real `puna serve` ends: signals, a step that fails, a thread that dies, models that do not load."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from cli.serve_process import Serving, fails_to_start, serving  # noqa: E402

LONG: dict[str, Any] = {"model": "demo", "prompt": "Once", "max_tokens": 450, "ignore_eos": True}

# The command line with a fault in the engine, from when a file is there on. The product has no such switch.
FAULTY = """
import ctypes, os, sys, time
from puna.engine import executor
from puna.runtime import model_runner

kind, flag = sys.argv[1:3]
execute, submit = model_runner.ModelRunner.execute, executor.LocalExecutor.submit

def faulty_execute(self, plan):
    if os.path.exists(flag) and kind == "hang":
        time.sleep(3600)
    if os.path.exists(flag):
        raise RuntimeError("the insides of CANARY")
    return execute(self, plan)

def faulty_submit(self, plan):
    if os.path.exists(flag):
        thread = ctypes.c_ulong(self._thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(SystemExit))
    return submit(self, plan)

if kind != "thread":
    model_runner.ModelRunner.execute = faulty_execute
else:
    executor.LocalExecutor.submit = faulty_submit

from puna.cli import main
sys.exit(main(sys.argv[3:]))
"""


def events(lines: list[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("kind", ["step", "thread", "hang"])
def test_a_dead_worker_is_errors_and_an_exit_code(kind: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flags = ("--step-timeout", "3") if kind == "hang" else ()
    with serving("--log-format", "json", *flags, before=("-c", FAULTY, kind, str(flag))) as it:
        begun = threading.Barrier(4, timeout=60)

        def stream(number: int) -> list[str]:
            head = {"x-request-id": f"stream-{number}"}
            body = LONG | {"stream": True, "n": 8}
            with httpx.stream("POST", f"{it.url}/v1/completions", json=body, headers=head, timeout=60) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                begun.wait()
                return [first, *lines]

        def whole() -> Any:
            begun.wait()
            return httpx.post(
                f"{it.url}/v1/completions", json=LONG | {"n": 64}, headers={"x-request-id": "whole"}, timeout=60
            )

        with ThreadPoolExecutor(3) as pool:
            streams = [pool.submit(stream, number) for number in range(2)]
            answer = pool.submit(whole)
            begun.wait()
            flag.touch()
            for each in streams:
                *_, error, done = events(each.result(60))
                assert json.loads(error)["error"]["code"] == "engine_error"
                assert done == "[DONE]"
                assert "CANARY" not in "".join(each.result())
            with contextlib.suppress(httpx.TransportError):  # it may have come when nothing listened any more
                assert answer.result(60).status_code in (500, 503)
                assert "CANARY" not in answer.result().text
        for path in ("/ready", "/health"):
            with contextlib.suppress(httpx.TransportError):
                assert httpx.get(f"{it.url}{path}", timeout=10).status_code == 503
        assert it.exit_code() == 1
        lines = it.objects()
    (failure,) = [line for line in lines if line["logger"] == "puna.engine.engine" and line["level"] == "error"]
    for name in ("stream-0", "stream-1"):
        assert name in failure["message"]
        (its_line,) = [line for line in lines if line.get("request_id") == name]
        assert (its_line["error"], its_line["finish_reason"]) == ("engine_error", "error")
        assert its_line["generated_tokens"] > 0
    reasons = {
        "step": ["CANARY"],
        "thread": ["SystemExit", "has died", "has ended"],  # within a step, between two, or before the next came
        "hang": ["not ended after 3 seconds"],
    }
    assert any(reason in failure["traceback"] for reason in reasons[kind]), failure["traceback"]
    where = [line["message"] for line in lines if line["logger"] == "puna.engine.executor"]
    assert len(where) == (kind == "hang")
    assert all("in faulty_execute" in message for message in where)


def test_a_first_step_that_hangs_ends_the_start(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    words = ["-c", FAULTY, "hang", str(flag), "serve", "--model", "demo", "--port", "0", "--step-timeout", "0.5"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "the first token failed: StepTimeout: a step has not ended after 0.5 seconds" in done.stderr


def test_a_second_signal_ends_at_once() -> None:
    with serving() as it:
        with httpx.stream("POST", f"{it.url}/v1/completions", json=LONG | {"stream": True, "n": 64}, timeout=60) as one:
            lines = one.iter_lines()
            next(lines)
            it.process.send_signal(signal.SIGTERM)
            while not any("SIGTERM" in line for line in it.lines):
                next(lines)
            assert it.process.poll() is None
            it.process.send_signal(signal.SIGTERM)
            assert it.exit_code() == 128 + signal.SIGTERM
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert any("a second signal" in line for line in it.lines)


def test_a_signal_while_the_model_loads() -> None:
    code = """
import sys, time
from puna.models import loading
fill = loading.ModelLoader._fill
def slow(self, tell=None):
    print("loading on http://127.0.0.1:1/v1", file=sys.stderr, flush=True)
    time.sleep(300)
loading.ModelLoader._fill = slow
from puna.cli import main
sys.exit(main(sys.argv[1:]))
"""
    with serving(before=("-c", code)) as it:
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    """The demo model's files, to be damaged."""
    from puna.checkpoints import open_checkpoint

    folder = tmp_path / "model"
    folder.mkdir()
    for file in open_checkpoint("demo").folder.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_models_that_do_not_load(demo_copy: Path, log_format: str) -> None:
    (weights,) = demo_copy.glob("*.safetensors")
    content = weights.read_bytes()
    damages: list[tuple[str, bytes | None]] = [
        ("no such model", None),
        ("damaged", content[: len(content) // 2]),
        ("damaged", b"\xff" * 16 + content[16:]),
        ("empty", b""),
    ]
    for words, damage in damages:
        if damage is not None:
            weights.write_bytes(damage)
        model = str(demo_copy) if damage is not None else str(demo_copy / "none")
        code, error = fails_to_start("--log-format", log_format, model=model)
        assert code == 2, error
        assert "Traceback" not in error
        lines = error.strip().splitlines()
        if log_format == "json":
            message = json.loads(lines[-1])["message"]
            assert [json.loads(line)["level"] for line in lines][-1] == "error"
        else:
            message = lines[-1]
            assert message.startswith("puna: error: ")
        if damage is not None:
            assert words in message
            assert str(weights) in message


def test_weights_that_are_no_numbers_end_at_the_first_token(demo_copy: Path) -> None:
    (weights,) = demo_copy.glob("*.safetensors")
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    code, error = fails_to_start(model=str(demo_copy))
    assert code == 1
    assert "the first token failed" in error
    assert "NaN" in error
    assert "Traceback" not in error


def test_sigterm_with_a_profile_leaves_a_whole_trace(tmp_path: Path) -> None:
    with serving("--profile", str(tmp_path / "trace")) as it:
        body = LONG | {"max_tokens": 12}
        assert httpx.post(f"{it.url}/v1/completions", json=body, headers={"x-request-id": "me"}).status_code == 200
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
    (path,) = (tmp_path / "trace").iterdir()
    found = json.loads(path.read_text())
    assert {event["name"] for event in found} >= {"plan", "step", "sample", "commit", "deliver", "queued", "decode"}
    names = [event["name"] for event in found if event["ph"] == "e" and event["name"].startswith("request me-")]
    assert len(names) == 1


def read_metrics(it: Serving) -> str:
    text: str = httpx.get(f"{it.url}/metrics").text
    return text


def test_what_the_server_asks_itself_at_its_start_does_not_count() -> None:
    with serving() as it:
        lines = read_metrics(it).splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:")}
    counted = [name for name in values if "_total" in name or "_count" in name]
    assert len(counted) > 20
    assert all(values[name] == 0 for name in counted)
