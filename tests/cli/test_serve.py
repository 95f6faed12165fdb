"""`puna serve` as a process: it starts, answers, drains at SIGTERM, logs, and says what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from cli.serve_process import fails_to_start, serving  # noqa: E402

CANARY = "KANARIENVOGEL"
STEPS = ["import", "open model", "load weights", "record steps", "first token", "total"]


def test_sigterm_finishes_what_runs_and_exits_with_0(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    body = {"model": "demo", "prompt": "Once", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with serving("--api-key-file", str(keys), PUNA_API_KEY="three") as it:
        url = it.url
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in ("one", "two", "three"):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        head = {"authorization": "Bearer two"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=head, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            it.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert it.exit_code() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_timeout_cuts_off_with_an_error() -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 450, "stream": True, "ignore_eos": True, "n": 32}
    with (
        serving("--shutdown-timeout", "0") as it,
        httpx.stream("POST", f"{it.url}/v1/completions", json=body, timeout=30) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        it.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-2].startswith('data: {"error":')
        assert rest[-1] == "data: [DONE]"
        assert it.exit_code() == 0


def read_metrics(url: str) -> str:
    return str(httpx.get(f"{url}/metrics", timeout=30).text)


def test_a_client_that_does_not_read_is_not_waited_for() -> None:
    """Its answer is larger than what the sockets hold."""
    body = {"model": "demo", "prompt": ["Once"] * 32, "max_tokens": 400, "stream": True, "ignore_eos": True}
    content = json.dumps(body | {"logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with serving("--shutdown-timeout", "1") as it, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(it.url.rpartition(":")[2])))
        client.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        end = time.monotonic() + 60
        while not re.search(r"^vllm:generation_tokens_total\S* [1-9]\d{3}", read_metrics(it.url), re.MULTILINE):
            assert time.monotonic() < end
            time.sleep(0.1)
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
    assert "Traceback" not in it.text
    assert "Exception" not in it.text


def test_the_start_is_a_table_for_people() -> None:
    with serving() as it:
        *table, ready = it.lines[-len(STEPS) - 1 :]
        assert re.fullmatch(r"ready on http://127\.0\.0\.1:\d+/v1 as 'demo'", ready)
        rows = [re.fullmatch(r"(.{12})  ( *\d+\.\d\d) s", line) for line in table]
        assert all(rows), table
        assert len({len(line) for line in table}) == 1
        found = {row[1].strip(): float(row[2]) for row in rows if row}
    assert list(found) == STEPS
    total = found.pop("total")
    assert sum(found.values()) <= total + 0.05  # of rounding; some of it belongs to no step


def test_json_logs_are_objects_without_what_clients_said(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{CANARY}-key\n")
    keys.chmod(0o644)
    chat = {"model": "demo", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 3}
    with serving("--log-format", "json", "--api-key-file", str(keys)) as it:
        with httpx.Client(base_url=it.url, headers={"authorization": f"Bearer {CANARY}-key"}, timeout=30) as client:

            def ask(path: str, name: str, body: Any) -> Any:
                headers = {"x-request-id": name, "content-type": "application/json"}
                return client.post(path, content=json.dumps(body), headers=headers)

            text = {"model": "demo", "prompt": f"Once {CANARY}", "max_tokens": 5, "ignore_eos": True}
            answer = ask("/v1/completions", "whole", text)
            assert answer.status_code == 200
            answer_text = answer.json()["choices"][0]["text"].strip()
            assert ask("/v1/completions", "again", text | {"stream": True}).status_code == 200
            assert ask("/v1/chat/completions", "chat", chat).status_code in (200, 400)
            assert ask("/tokenize", "tokenize", {"prompt": CANARY}).status_code == 200
            for name, body in (
                ("model", text | {"model": CANARY}),
                ("field", text | {CANARY: CANARY}),
                ("value", text | {"temperature": CANARY}),
                ("stop", text | {"stop": [CANARY] * 100}),
                ("schema", text | {"guided_json": {"type": CANARY}}),
                ("regex", text | {"guided_regex": f"({CANARY}"}),
                ("long", text | {"prompt": CANARY * 5000}),
                ("json", [CANARY]),
            ):
                assert 400 <= ask("/v1/completions", name, body).status_code < 500, name
            assert client.post("/v1/completions", content=CANARY).status_code == 400
            assert client.get(f"/health?query={CANARY}").status_code == 200
            assert client.get("/v1/models", headers={"authorization": f"Bearer {CANARY}"}).status_code == 401
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
        lines = it.objects()
    assert CANARY not in it.text
    assert answer_text not in it.text
    for line in lines:
        assert {"time", "level", "logger"} < line.keys()
    assert any("chmod 600" in line.get("message", "") for line in lines)
    (ready,) = [line for line in lines if line.get("message") == "ready"]
    assert list(ready["seconds"]) == STEPS
    assert all(seconds >= 0 for seconds in ready["seconds"].values())
    by_name = {line["request_id"]: line for line in lines if "request_id" in line}
    whole, again = by_name["whole"], by_name["again"]
    assert (whole["method"], whole["path"], whole["status"]) == ("POST", "/v1/completions", 200)
    assert (whole["model"], whole["generated_tokens"], whole["finish_reason"]) == ("demo", 5, "length")
    assert whole["prompt_tokens"] == again["prompt_tokens"] > again["cached_tokens"] >= whole["cached_tokens"] == 0
    assert by_name["model"]["status"] == 404
    assert by_name["model"]["error"] == "model_not_found"
    assert "model" not in by_name["field"]


def test_text_logs_have_none_of_it_either() -> None:
    body = {"model": "demo", "prompt": CANARY, "max_tokens": 2}
    with serving(PUNA_API_KEY=f"{CANARY}-key") as it:
        headers = {"x-api-key": f"{CANARY}-key", "x-request-id": "me"}
        assert httpx.post(f"{it.url}/v1/completions", json=body, headers=headers, timeout=30).status_code == 200
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
    assert CANARY not in it.text
    (line,) = [line for line in it.lines if "request_id=me" in line]
    assert " INFO puna.serving.guard: POST '/v1/completions' 200 " in line
    assert line.endswith(("finish_reason=length", "finish_reason=stop"))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], {"localhost": 200, "127.0.0.1": 200, "[::1]": 200, socket.gethostname(): 200, "box.example": 403}),
        (
            ["--allowed-host", "box.example", "--allowed-host", "Other"],
            {"box.example": 200, "other": 200, "third": 403},
        ),
        (["--allowed-host", "*"], {"box.example": 200}),
        (["--api-key", "k"], {"box.example": 200}),
        (["--api-key", "k", "--allowed-host", "other"], {"box.example": 403, "other": 200}),
    ],
)
def test_names_of_the_server(flags: list[str], names: dict[str, int]) -> None:
    with serving(*flags) as it:
        for name, status in names.items():
            assert httpx.get(f"{it.url}/health", headers={"host": f"{name}:80"}).status_code == status, name


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        (["--host", "0.0.0.0"], "everyone who reaches 0.0.0.0 may use this server"),
        (["--host", "0.0.0.0", "--api-key", "k"], None),
        (["--api-key-file", "OPEN"], "chmod 600"),
        (["--api-key-file", "CLOSED"], None),
    ],
)
def test_warnings(flags: list[str], warns: str | None, tmp_path: Path) -> None:
    """Told before anything is loaded; the model that is not there ends it."""
    for name, mode in (("OPEN", 0o640), ("CLOSED", 0o600)):
        (tmp_path / name).write_text("key")
        (tmp_path / name).chmod(mode)
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    _, error = fails_to_start(*flags, model=str(tmp_path / "none"))
    warnings = [line for line in error.splitlines() if line.startswith("puna: warning:")]
    assert len(warnings) == (warns is not None)
    if warns is not None:
        assert warns in warnings[0]


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--api-key", " "], "--api-key has no key", 2),
        (["--api-key-file", os.devnull], "has no key", 2),
        (["--api-key", "two words"], "--api-key has a key with a space", 2),
        (["--api-key", "schlüssel"], "not ASCII", 2),
        (["--allowed-host", "http://box"], "without scheme and port", 2),
        (["--profile", os.devnull], os.devnull, 2),
        (["--max-body-size", "much"], "--max-body-size", 2),
        (["--max-model-len", "100000"], "100000", 2),
    ],
)
def test_wrong_flags(flags: list[str], message: str, code: int) -> None:
    found, error = fails_to_start(*flags)
    assert found == code, error
    assert message in error
    assert "Traceback" not in error
