"""Streams as they are on the wire, read from a socket: what clients rely on that is in no library's types."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest

from puna.serving.connection import Connection
from serving.conftest import Running
from serving.test_fields import full  # noqa: F401  the model whose template knows tools and reasoning
from serving.test_tools import SHORT, TIME

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


def raw(running: Running, path: str, body: dict[str, Any]) -> tuple[bytes, bytes]:
    """The head of the answer, and its body out of the chunks of HTTP."""
    content = json.dumps(body | {"stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head_bytes, _, rest = answer.partition(b"\r\n\r\n")
    found = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            assert rest == b"\r\n"  # the body ends as HTTP has it, and nothing follows
            return head_bytes.lower(), found
        found, rest = found + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    events = body.decode().split("\n\n")
    assert events.pop() == ""  # each event ends with an empty line
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event[6:]) for event in events]


CHATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {"max_tokens": 12}),
    ("several", {"max_tokens": 12, "n": 3}),
    ("greedy", {"max_tokens": 12, "n": 3, "temperature": 0}),
    ("logprobs", {"max_tokens": 12, "logprobs": True, "top_logprobs": 1}),
    ("ids", {"max_tokens": 12, "return_token_ids": True, "n": 2}),
    ("required", {"tools": [TIME, SHORT], "tool_choice": "required", "max_tokens": 150, **OFF}),
    (
        "named",
        {"tools": [SHORT], "tool_choice": {"type": "function", "function": {"name": "go"}}, "n": 2, **OFF},
    ),
    ("reasoning", {"guided_regex": "no", "max_tokens": 100}),
)


@pytest.mark.parametrize(("name", "fields"), CHATS, ids=[name for name, _ in CHATS])
def test_chunks_of_chats(full: Running, name: str, fields: dict[str, Any]) -> None:  # noqa: F811
    body = {"model": "small", "messages": MESSAGES, "seed": 2, "stream_options": {"include_usage": True}, **fields}
    head, answer = raw(full, "/v1/chat/completions", body)
    assert head.startswith(b"http/1.1 200")
    for line in (b"content-type: text/event-stream", b"cache-control: no-cache", b"x-request-id: "):
        assert line in head
    assert b"content-length" not in head
    *chunks, usage = chunks_of(answer)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] > 0
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, usage]}) == 1
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    for index in range(fields.get("n", 1)):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] in ("stop", "length", "tool_calls")
        begun: set[int] = set()
        for call in (call for choice in choices for call in choice["delta"].get("tool_calls", ())):
            if call["index"] in begun:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
            else:
                assert (call["index"], call["type"]) == (len(begun), "function")
                assert call["id"]
                assert call["function"]["name"]
                begun.add(call["index"])
        assert bool(begun) == ("tools" in fields)
        assert all(choice["delta"] or choice["finish_reason"] or choice["logprobs"] or "token_ids" in choice
                   for choice in choices)  # fmt: skip
    assert {chunk["choices"][0]["index"] for chunk in chunks} == set(range(fields.get("n", 1)))


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_chunks_of_completions(full: Running, echo: bool, logprobs: int | None) -> None:  # noqa: F811
    body = {"model": "small", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 5, "echo": echo, "logprobs": logprobs}
    _, answer = raw(full, "/v1/completions", body)
    chunks = chunks_of(answer)
    assert all("usage" not in chunk for chunk in chunks)
    for index in range(4):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] is not None
        if echo:  # a chunk of its own, before the first token
            assert choices[0]["text"] == ("ab", "cd")[index // 2]
            if logprobs is not None:
                assert choices[0]["logprobs"]["token_logprobs"][0] is None
                assert len(choices[0]["logprobs"]["tokens"]) == 3
                assert sum(len(choice["logprobs"]["tokens"]) for choice in choices[1:]) <= 5


def test_an_echo_comes_before_the_rest_is_made(full: Running) -> None:  # noqa: F811
    """With its log-probabilities too: they are known long before the last token."""
    body = {"model": "small", "prompt": "ab", "max_tokens": 200, "echo": True, "logprobs": 1, "ignore_eos": True}
    seen: list[int] = []
    with full.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                seen.append(len(json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]))
                if len(seen) == 2:
                    break
    assert seen[0] == 3
    assert seen[1] < 200


def test_no_piece_waits_for_the_one_before_it(full: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Nagle's algorithm would hold the first token back until the client acknowledges the head: 40 milliseconds."""
    seen = []
    made = Connection.connection_made

    def note(self: Connection, transport: asyncio.Transport) -> None:
        made(self, transport)
        connection = transport.get_extra_info("socket")
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Connection, "connection_made", note)
    assert httpx.get(f"{full.url}/health").status_code == 200
    assert len(seen) == 1
    assert seen[0] != 0
