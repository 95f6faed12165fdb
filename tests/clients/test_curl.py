"""curl, as a shell script has it: events one by one, errors as exit codes, connections that stay, large bodies."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from serving.conftest import Running

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
JSON = ("-H", "content-type: application/json")


def curl(*arguments: str, body: Any = None) -> subprocess.CompletedProcess[bytes]:
    given = [] if body is None else [*JSON, "--data-binary", "@-"]
    data = None if body is None else json.dumps(body).encode()
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "30", *given, *arguments]
    return subprocess.run(command, input=data, capture_output=True, check=False)


def test_an_answer(clients_server: Running) -> None:
    done = curl(f"{clients_server.url}/v1/chat/completions", body=CHAT | {"temperature": 0})
    assert done.returncode == 0, done.stderr
    text = json.loads(done.stdout)["choices"][0]["message"]["content"]
    again = clients_server.client.chat.completions.create(temperature=0, **CHAT)
    assert text == again.choices[0].message.content


def test_a_stream_is_events_of_lines(clients_server: Running) -> None:
    body = CHAT | {"stream": True, "temperature": 0, "ignore_eos": True}
    done = curl("-N", "-i", f"{clients_server.url}/v1/chat/completions", body=body)
    assert done.returncode == 0, done.stderr
    head, _, rest = done.stdout.partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head
    assert b"content-length" not in head
    events = rest.decode().split("\n\n")
    assert events.pop() == ""  # each ends with an empty line, the last one too
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events.pop() == "data: [DONE]"
    assert [json.loads(event[6:])["object"] for event in events] == ["chat.completion.chunk"] * len(events)


def test_an_error_is_an_exit_code_and_a_body(clients_server: Running) -> None:
    done = curl("--fail-with-body", f"{clients_server.url}/v1/chat/completions", body=CHAT | {"n": 0})
    assert done.returncode == 22
    assert json.loads(done.stdout)["error"]["param"] == "n"
    done = curl("--fail-with-body", f"{clients_server.url}/v1/nothing")
    assert done.returncode == 22
    assert json.loads(done.stdout)["error"]["code"] == "not_found"


def test_one_connection_serves_many_requests(clients_server: Running) -> None:
    url = f"{clients_server.url}/v1/models"
    done = curl("-w", "\nconnects: %{num_connects}\n", url, url, url)
    assert done.returncode == 0
    assert done.stdout.count(b'"object":"list"') == 3
    assert [line[-1:] for line in done.stdout.splitlines() if line.startswith(b"connects")] == [b"1", b"0", b"0"]


@pytest.mark.parametrize("how", [(), ("-H", "transfer-encoding: chunked")], ids=["length", "chunked"])
def test_large_bodies_wait_for_the_servers_word(clients_server: Running, how: tuple[str, ...]) -> None:
    body = CHAT | {"user": "x" * 1000, "stop": ["y" * 40_000] * 40}  # 1.6 MB
    done = curl("-v", "-H", "expect: 100-continue", *how, f"{clients_server.url}/v1/chat/completions", body=body)
    assert done.returncode == 0, done.stderr
    assert b"100 Continue" in done.stderr
    assert json.loads(done.stdout).keys() & {"choices", "error"}


def test_too_large_a_body_is_refused_before_it_is_sent(clients_server: Running) -> None:
    body = {"model": "small", "prompt": "x" * (17 * 2**20)}
    done = curl("-v", "-H", "expect: 100-continue", f"{clients_server.url}/v1/completions", body=body)
    assert json.loads(done.stdout)["error"]["code"] == "too_large"
    assert b"100 Continue" not in done.stderr


def test_head_and_unknown_methods(clients_server: Running) -> None:
    done = curl("-i", "-X", "DELETE", f"{clients_server.url}/v1/models")
    assert done.stdout.startswith(b"HTTP/1.1 405")
    assert b"allow: GET" in done.stdout.lower().replace(b"allow: get", b"allow: GET")
