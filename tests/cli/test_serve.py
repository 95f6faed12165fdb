"""`puna serve` as a process: it starts, answers, drains at SIGTERM, and says what is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")


@contextmanager
def process(*flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process once it is ready, and its address."""
    command = [sys.executable, "-m", "puna", "serve", "--model", "demo", "--port", "0", "--threads", "1", *flags]
    it = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        assert it.stderr is not None
        lines = []
        for line in it.stderr:
            lines.append(line)
            found = re.search(r"ready on (http://127.0.0.1:\d+)/v1 as 'demo'", line)
            if found:
                break
        else:
            pytest.fail("".join(lines))
        steps = ["import", "open model", "load weights", "record steps", "first token", "total"]
        assert [line.split("  ")[0] for line in lines[-7:-1]] == steps
        yield it, found[1]
    finally:
        it.kill()
        it.wait()
        assert it.stderr is not None
        it.stderr.close()


def test_sigterm_finishes_what_runs_and_exits_with_0(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    body = {"model": "demo", "prompt": "Once", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with process("--api-key-file", str(keys), PUNA_API_KEY="three") as (it, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in ("one", "two", "three"):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        head = {"authorization": "Bearer two"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=head, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            it.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert it.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_timeout_cuts_off_with_an_error() -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 450, "stream": True, "ignore_eos": True, "n": 32}
    with (
        process("--shutdown-timeout", "0") as (it, url),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        it.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-2].startswith('data: {"error":')
        assert rest[-1] == "data: [DONE]"
        assert it.wait(20) == 0


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--api-key", " "], "--api-key has no key", 2),
        (["--api-key-file", os.devnull], "has no key", 2),
        (["--max-body-size", "much"], "--max-body-size", 2),
        (["--max-model-len", "100000"], "100000", 2),
    ],
)
def test_wrong_flags(flags: list[str], message: str, code: int) -> None:
    command = [sys.executable, "-m", "puna", "serve", "--model", "demo", "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
