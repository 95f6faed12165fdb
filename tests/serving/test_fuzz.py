"""Random bytes at the server: nothing makes it fail, hang or keep blocks; errors have the shape that clients know."""

from __future__ import annotations

import copy
import json
import logging
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from puna.engine.engine import Engine
from puna.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import Running, listening

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODELS: dict[str, type[BaseModel]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatRequest,
    EMBEDDINGS: EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
# The deadline is for what asks for much: nothing in here is to take long.
BASE: dict[str, Any] = {"model": "small", "max_tokens": 3, "deadline": 0.3}
EMBED: dict[str, Any] = {"model": "small", "deadline": 0.3}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES: list[Any] = [
    {"role": "system", "content": [{"type": "text", "text": "be"}]},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "a", "tool_calls": [CALL]},
    {"role": "tool", "content": "b", "tool_call_id": "1"},
]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": [1, "x"]}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
VALID: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, BASE | {"prompt": "hi"}),
    (COMPLETIONS, BASE | {"prompt": [[1, 2], [3]], "n": 2, "seed": 1, "stop": ["a"], "stream": True}),
    (COMPLETIONS, BASE | {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "best_of": 2, "logit_bias": {"5": 1}}),
    (COMPLETIONS, BASE | {"prompt": "hi", "min_tokens": 1, "frequency_penalty": 1, "ignore_eos": True}),
    (COMPLETIONS, BASE | {"prompt": "x", "guided_json": SCHEMA, "top_k": 4, "min_p": 0.1, "presence_penalty": 1}),
    (COMPLETIONS, BASE | {"prompt": "x", "guided_regex": "[a-c]+", "repetition_penalty": 1.1, "cache_salt": "x"}),
    (COMPLETIONS, BASE | {"prompt": [1], "guided_grammar": 'root ::= "a" | "b"', "priority": 3, "top_p": 0.9}),
    (COMPLETIONS, BASE | {"prompt": "x", "guided_choice": ["a", "b"], "return_token_ids": True, "prompt_logprobs": 1}),
    (CHAT, BASE | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "stop_token_ids": [5]}),
    (CHAT, BASE | {"messages": MESSAGES[:2], "response_format": FORM}),
    (CHAT, BASE | {"messages": MESSAGES[:2], "stream": True, "stream_options": {"include_usage": True}, "n": 2}),
    (CHAT, BASE | {"messages": MESSAGES[:2], "tools": [TOOL], "tool_choice": "required"}),
    (CHAT, BASE | {"messages": MESSAGES[:2], "chat_template_kwargs": {"a": [1]}, "continue_final_message": False}),
    (EMBEDDINGS, EMBED | {"input": ["a", "b"], "encoding_format": "base64", "user": "u"}),
    (EMBEDDINGS, EMBED | {"input": [[5], [6, 7]], "pooling": "mean", "normalize": True}),
    (EMBEDDINGS, EMBED | {"input": "x", "truncate_prompt_tokens": 3, "dimensions": 32}),
    ("/tokenize", {"prompt": "hi", "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]  # fmt: skip

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)

fuzzed = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
texts = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    ["\ud800", "\x00", "\u2028", "{{", "{% for %}", "<s>", "</tool_call>", "a" * 300, "😀" * 50, "(a*)*b", "(" * 500]
)
numbers = st.sampled_from(
    [0, -1, 1, 2**31, -(2**31) - 1, 2**63, -(2**63), 2**64, 10**30, -(10**400), 0.0, -0.0, 1e308, 5e-324, 1.5,
     float("nan"), float("inf"), float("-inf")]
) | st.integers()  # fmt: skip
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=8)
odd = values | st.sampled_from([[], {}, [[]], [{}], {"": {}}, [None], [[[[[[]]]]]], list(range(300)), ["a"] * 300])


@pytest.fixture(scope="module")
def fuzz_server(make_folder: Callable[..., Path]) -> Iterator[Running]:
    """One that knows tools. Idle again after all of it."""
    folder = make_folder(max_position_embeddings=512)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    engine = Engine.from_pretrained(str(folder))
    with listening(ServerState(ServerSettings(model_name="small"), engine, "ready")) as running:
        yield running
        running.wait_until_idle()
        assert running.http.get("/ready").status_code == 200
    engine.shutdown()


def send(running: Running, path: str, content: bytes, caplog: pytest.LogCaptureFixture) -> Any:
    """The answer, once it has been seen to be one that a server may give."""
    caplog.clear()
    answer = running.http.post(path, content=content, headers={"content-type": "application/json"})
    check(answer.status_code, answer.headers, answer.text, content)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], content
    return answer


def check(status: int, headers: Any, text: str, content: bytes) -> None:
    assert status < 500, (content, text)
    assert headers["x-request-id"]
    if status >= 400:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["param"] is None or isinstance(error["param"], str)
    elif headers["content-type"].startswith("text/event-stream"):
        assert '{"error"' not in text, (content, text)
        assert text.endswith("data: [DONE]\n\n")
    else:
        json.loads(text)


def encoded(value: Any, is_ascii: bool) -> bytes:
    return json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inside for place in [(*at, key), *places(one, (*at, key))]]


def changed(value: Any, chooser: random.Random, new: Any) -> Any:
    """With one place replaced, removed, doubled, or put into a list, or with one thing more."""
    value = copy.deepcopy(value)
    *way, last = chooser.choice(places(value))
    there = value
    for key in way:
        there = there[key]
    how = chooser.choice(("replace", "replace", "replace", "remove", "wrap", "add"))
    if how == "replace":
        there[last] = new
    elif how == "remove":
        del there[last]
    elif how == "wrap":
        there[last] = [there[last]]
    elif isinstance(there, list):
        there.append(new)
    else:
        there[chooser.choice((*CompletionRequest.model_fields, *ChatRequest.model_fields, "x"))] = new
    return value


@given(st.sampled_from(sorted(MODELS)), odd, st.booleans())
@fuzzed
def test_any_json(
    fuzz_server: Running, caplog: pytest.LogCaptureFixture, path: str, value: Any, is_ascii: bool
) -> None:
    send(fuzz_server, path, encoded(value, is_ascii), caplog)


@given(st.sampled_from(VALID), st.randoms(use_true_random=False), st.lists(odd, min_size=1, max_size=3), st.booleans())
@settings(fuzzed, max_examples=400)
def test_changed_requests(
    fuzz_server: Running,
    caplog: pytest.LogCaptureFixture,
    request_of: tuple[str, dict[str, Any]],
    chooser: random.Random,
    new: list[Any],
    is_ascii: bool,
) -> None:
    path, body = request_of
    for one in new:
        body = changed(body, chooser, one) if body else body
    send(fuzz_server, path, encoded(body, is_ascii), caplog)


@given(st.sampled_from(VALID), st.data())
@fuzzed
def test_damaged_bytes(
    fuzz_server: Running, caplog: pytest.LogCaptureFixture, request_of: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    content = bytearray(encoded(request_of[1], True))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        how = data.draw(st.sampled_from(("cut", "set", "insert")))
        if how == "cut":
            del content[place:]
        elif how == "set":
            content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))
        else:
            content[place:place] = data.draw(st.binary(max_size=5))
    send(fuzz_server, request_of[0], bytes(content), caplog)


@pytest.mark.parametrize("opening", [b'{"a":', b"[", b'{"prompt":[', b'{"guided_json":{"a":'])
@pytest.mark.parametrize("depth", [10, 900, 5000, 200_000])
def test_deep_nesting(fuzz_server: Running, caplog: pytest.LogCaptureFixture, opening: bytes, depth: int) -> None:
    closing = {b"{": b"}", b"[": b"]"}
    ends = b"".join(closing[opening[i : i + 1]] for i in reversed(range(len(opening))) if opening[i : i + 1] in closing)
    for content in (opening * depth, opening * depth + b"1" + ends * depth):
        for path in MODELS:
            assert send(fuzz_server, path, content, caplog).status_code == 400


@pytest.mark.parametrize(("path", "body"), VALID, ids=[f"{path}-{i}" for i, (path, _) in enumerate(VALID)])
def test_nested_values_of_valid_requests(
    fuzz_server: Running, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    """Where an object may hold anything, it may not hold too much of it."""
    answer = send(fuzz_server, path, encoded(body, True), caplog)
    assert answer.status_code == 200, answer.text
    deep = "x"
    for _ in range(400):
        deep = {"items": deep, "type": "array"}  # type: ignore[assignment]
    for place in places(body):
        changed_body = copy.deepcopy(body)
        there = changed_body
        for key in place[:-1]:
            there = there[key]
        there[place[-1]] = deep
        send(fuzz_server, path, encoded(changed_body, True), caplog)


@pytest.mark.parametrize(("path", "name"), [(p, n) for p, model in MODELS.items() for n in model.model_fields])
def test_the_field_of_a_wrong_type_is_named(fuzz_server: Running, path: str, name: str) -> None:
    valid = next(body for where, body in VALID if where == path)
    for wrong in ({"\x00": [[]]}, [{"a": 1}, 1.5, None], 10**40, float("nan")):
        body = {key: value for key, value in valid.items() if key not in (name, "max_tokens")} | {name: wrong}
        content = json.dumps(body).encode()
        answer = fuzz_server.http.post(path, content=content, headers={"content-type": "application/json"})
        if answer.status_code == 200:
            continue
        assert answer.status_code == 400, (answer.status_code, answer.text)
        assert (answer.json()["error"]["param"] or "").split(".")[0] == name, answer.text


tokens = st.text(st.sampled_from("ABCXYZabcxyz-_0129"), min_size=1, max_size=12)
paths = st.sampled_from(
    [*MODELS, "/v1/models", "/v1/models/x/y", "/metrics", "/health", "/openapi.json", "*", "/", "//"]
)
odd_paths = st.text(st.characters(min_codepoint=33, max_codepoint=255), min_size=1, max_size=40)
methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT"]) | tokens
header_names = tokens | st.sampled_from(
    ["content-length", "transfer-encoding", "authorization", "x-request-id", "expect", "content-type", "connection",
     "content-encoding", "accept", "host", "upgrade", "cookie", "range", "origin", "access-control-request-method"]
)  # fmt: skip
header_values = st.binary(max_size=40).map(lambda value: value.translate(None, b"\r\n")) | st.sampled_from(
    [b"chunked", b"-1", b"99999999999999999999", b"1e3", b"100-continue", b"gzip", b"websocket", b"Bearer \xff",
     b"Basic", b"text/plain", b"application/xml", b"application/json; charset=utf-16", b"multipart/form-data"]
)  # fmt: skip


@given(methods, paths | odd_paths, st.lists(st.tuples(header_names, header_values), max_size=6), st.binary(max_size=60))
@fuzzed
def test_any_http(
    fuzz_server: Running,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    headers: list[tuple[str, bytes]],
    body: bytes,
) -> None:
    caplog.clear()
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), *(name.encode() + b": " + value for name, value in headers)]
    with socket.create_connection(("127.0.0.1", int(fuzz_server.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(b"\r\n".join([*lines, b"host: x", b"connection: close", b"", body]))
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while piece := connection.recv(65536):  # a hang is socket's TimeoutError
            found += piece
    if found:  # what ends in the middle gets no answer
        status = int(found.split(b" ", 2)[1])
        assert status < 500, (lines, body, found)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], (lines, body)
