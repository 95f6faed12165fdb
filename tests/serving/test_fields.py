"""Every field of OpenAI's generation endpoints is honoured or refused by its name; answers are of OpenAI's types."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params

from openai.types import completion_create_params as text_params  # isort: skip

from puna.config import CacheDtype, EngineConfig
from puna.engine.engine import Engine
from puna.serving.completions import fingerprint
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import Running, listening
from serving.test_reasoning import HYBRID
from serving.test_tools import SHORT, TIME, with_template

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "small", "messages": MESSAGES, "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "small", "prompt": "hi", "max_tokens": 2}
TOOLS = {"tools": [TIME, SHORT]}
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTION = {"type": "function", "function": {"name": "time"}}


def told(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def said(**fields: Any) -> list[Any]:
    return [*MESSAGES, {"role": "assistant", "content": "a", **fields}, *MESSAGES]


# For each field values that are honoured, and values that are refused; a tuple is a value with the fields it needs.
BOTH: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["small"], [1, "", None]),
    "frequency_penalty": ([None, 0, -2, 1.5], [2.1, "1"]),
    "presence_penalty": ([None, 0.5], [-3]),
    "logit_bias": ([None, {}, {"5": -100}], [{"5": 101}, {"x": 1}, {"999999": 1}, [1]]),
    "max_tokens": ([None, 1], [-1, 1.5, "2"]),
    "n": ([None, 2, (2, {"temperature": 0})], [0, 129]),
    "seed": ([None, 0, -5, 2**62], [1.5, 2**63]),
    "stop": ([None, "x", ["x", "y"]], ["", ["a"] * 65, 3]),
    "stream": ([None, False], ["yes"]),
    "stream_options": (
        [None, ({"include_usage": True}, {"stream": True}), ({"include_obfuscation": False}, {"stream": True})],
        [{"include_usage": True}, ({"include_obfuscation": True}, {"stream": True}), ({"x": 1}, {"stream": True})],
    ),
    "temperature": ([None, 0, 1.9], [-0.1, "0"]),
    "top_p": ([None, 0.1, 1], [0, 1.1]),
    "user": ([None, "me"], [1, "x" * 1025]),
}
IN_CHAT: dict[str, tuple[list[Any], list[Any]]] = BOTH | {
    "max_tokens": ([None, 1], [0, -1, (1, {"max_completion_tokens": 2})]),
    "messages": (
        [
            told({"type": "text", "text": "a"}),
            said(refusal=None, annotations=[], audio=None, function_call=None, tool_calls=None),
            said(reasoning_content="hm"),
            said(reasoning="hm"),
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *MESSAGES],
            [{"role": "assistant", "refusal": "no"}, *MESSAGES],
            said(name="ann"),
            [{"role": "developer", "content": "a", "name": "ann"}, {"role": "system", "content": "b"}, *MESSAGES],
        ],
        [
            [],
            None,
            told({"type": "image_url", "image_url": {"url": "data:,x"}}),
            told({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
            told({"type": "file", "file": {"file_id": "x"}}),
            told({"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}),
            told({"type": "refusal", "refusal": "no"}),
            told(),
            said(audio={"id": "x"}),
            said(function_call={"name": "f", "arguments": "{}"}),
            said(tool_calls=[{"id": "x", "type": "custom", "custom": {"name": "f", "input": ""}}]),
            said(reasoning="a", reasoning_content="b"),
            [{"role": "function", "name": "f", "content": "x"}],
            [{"role": "user", "content": "x", "refusal": "no"}],
            [{"role": "user", "content": "x", "tool_call_id": "no"}],
            [{"role": "tool", "content": "x"}],
            [{"role": "assistant"}],
        ],
    ),
    "audio": ([None], [{"format": "wav", "voice": "alloy"}]),
    "function_call": ([None], ["auto", "none", {"name": "f"}]),
    "functions": ([None], [[], [{"name": "f"}]]),
    "logprobs": ([None, True, False], [1]),
    "max_completion_tokens": ([None, 2], [0]),
    "metadata": ([None, {}], [{"a": "b"}]),
    "modalities": ([None, ["text"]], [["audio"], ["text", "audio"], []]),
    "moderation": ([None], [{"model": "x"}]),
    "parallel_tool_calls": ([None, True, (False, TOOLS)], ["x"]),
    "prediction": ([None], [{"type": "content", "content": "x"}]),
    "prompt_cache_key": ([None, "k"], [1]),
    "prompt_cache_options": ([None, {"mode": "implicit"}], [{"mode": "explicit"}, {"ttl": "30m"}]),
    "prompt_cache_retention": ([None, "in_memory"], ["24h"]),
    "reasoning_effort": ([None, "none"], ["low", "max", "lots"]),
    "response_format": (
        [
            None,
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        ],
        [{"type": "xml"}, {"type": "json_schema"}, {"type": "text", "json_schema": {"name": "x"}}, "text"],
    ),
    "safety_identifier": ([None, "id"], [1]),
    "service_tier": ([None, "auto", "default"], ["flex", "priority", "fast", "scale"]),
    "store": ([None, False], [True]),
    "tool_choice": (
        [
            None,
            "none",
            ("auto", TOOLS),
            ("required", TOOLS),
            (FUNCTION, TOOLS),
            ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FUNCTION]}}, TOOLS),
        ],
        [
            "auto",
            ({"type": "function", "function": {"name": "rm"}}, TOOLS),
            ({"type": "custom", "custom": {"name": "time"}}, TOOLS),
            ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, TOOLS),
        ],
    ),
    "tools": (
        [None, [], [TIME]],
        [[TIME, TIME], [{"type": "custom", "custom": {"name": "x"}}], [{"type": "function", "function": {}}]],
    ),
    "top_logprobs": ([None, (0, {"logprobs": True}), (20, {"logprobs": True})], [1, (21, {"logprobs": True})]),
    "verbosity": ([None, "medium"], ["low", "high"]),
    "web_search_options": ([None], [{}, {"search_context_size": "low"}]),
}
IN_TEXT: dict[str, tuple[list[Any], list[Any]]] = BOTH | {
    "prompt": (["a", ["a", "b"], [1, 2], [[1], [2, 3]]], [None, [], [[]], [-1], {"a": 1}, "\ud800"]),
    "max_tokens": ([None, 1, (0, {"echo": True})], [0, -1]),
    "best_of": ([None, 2, (2, {"temperature": 0})], [0, 129, (1, {"n": 2}), (2, {"stream": True})]),
    "echo": ([None, True, False], ["x"]),
    "logprobs": ([None, 0, 20], [21, True]),
    "suffix": ([None], ["x"]),
}


@pytest.fixture(scope="module")
def full(make_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose template knows tools, reasoning, and how to do without."""
    folder: Path = make_folder(max_position_embeddings=2048)
    engine = Engine.from_pretrained(str(with_template(folder, HYBRID, tmp_path_factory.mktemp("full") / "model")))
    with listening(ServerState(ServerSettings(model_name="small"), engine, "ready")) as running:
        yield running
    engine.shutdown()


def cases(table: dict[str, tuple[list[Any], list[Any]]]) -> list[Any]:
    found = []
    for name, (honoured, refused) in table.items():
        for status, values in ((200, honoured), (400, refused)):
            for entry in values:
                value, others = entry if isinstance(entry, tuple) else (entry, {})
                found.append(pytest.param(name, value, others, status, id=f"{name}={str(value)[:40]}-{status}"))
    return found


def post(running: Running, path: str, body: dict[str, Any]) -> Any:
    content = json.dumps(body).encode()
    return running.http.post(path, content=content, headers={"content-type": "application/json"})


def check(answer: Any, name: str, status: int) -> None:
    assert answer.status_code == status, answer.text
    if status == 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert name in f"{error['param']} {error['message']}", error
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "error" not in answer.text


@pytest.mark.parametrize(("name", "value", "others", "status"), cases(IN_CHAT))
def test_fields_of_chats(full: Running, name: str, value: Any, others: dict[str, Any], status: int) -> None:
    check(post(full, "/v1/chat/completions", CHAT | others | {name: value}), name, status)


@pytest.mark.parametrize(("name", "value", "others", "status"), cases(IN_TEXT))
def test_fields_of_completions(full: Running, name: str, value: Any, others: dict[str, Any], status: int) -> None:
    check(post(full, "/v1/completions", TEXT | others | {name: value}), name, status)


@pytest.mark.parametrize(
    ("table", "params"),
    [
        (IN_CHAT, chat_params.CompletionCreateParamsStreaming),
        (IN_TEXT, text_params.CompletionCreateParamsStreaming),
    ],
)
def test_the_tables_have_every_field_of_the_official_client(table: dict[str, Any], params: Any) -> None:
    assert set(typing.get_type_hints(params)) - set(table) == set()


# What answers have beyond OpenAI's fields: vLLM's, and the names under which reasoning goes.
EXTRA = frozenset(["stop_reason", "token_ids", "prompt_token_ids", "prompt_logprobs", "reasoning", "reasoning_content"])


def validated(kind: type[pydantic.BaseModel], data: dict[str, Any]) -> Any:
    """In strict form, and with no fields but OpenAI's and those above, at any depth."""
    found = kind.model_validate(data, strict=True)
    waiting: list[Any] = [found]
    while waiting:
        one = waiting.pop()
        if isinstance(one, pydantic.BaseModel):
            assert set(one.model_extra or ()) <= EXTRA, one.model_extra
            waiting += [getattr(one, name) for name in type(one).model_fields]
        elif isinstance(one, list):
            waiting += one
    return found


USUAL: tuple[dict[str, Any], ...] = (
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 30},
    {"service_tier": "auto", "temperature": 0, "n": 2},
    TOOLS | {"tool_choice": "required", "max_tokens": 200, "chat_template_kwargs": {"enable_thinking": False}},
    TOOLS | {"tool_choice": FUNCTION, "max_tokens": 200, "chat_template_kwargs": {"enable_thinking": False}},
    {"guided_regex": "no", "max_tokens": 20, "return_token_ids": True},
)


@pytest.mark.parametrize("fields", USUAL, ids=[",".join(fields) or "plain" for fields in USUAL])
def test_answers_of_chats_are_of_the_official_types(full: Running, fields: dict[str, Any]) -> None:
    body = CHAT | {"seed": 1} | fields
    whole = post(full, "/v1/chat/completions", body).json()
    found = validated(ChatCompletion, whole)
    assert found.usage.prompt_tokens_details.cached_tokens is not None
    assert found.usage.completion_tokens_details.reasoning_tokens is not None
    assert found.system_fingerprint
    assert found.service_tier == ("default" if "service_tier" in fields else None)
    assert [choice.index for choice in found.choices] == list(range(body.get("n", 1)))
    for choice in whole["choices"]:
        assert {"role", "content", "refusal", "annotations"} <= set(choice["message"])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = post(full, "/v1/chat/completions", body | options)
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            chunk = validated(ChatCompletionChunk, json.loads(line[6:]))
            assert chunk.system_fingerprint == found.system_fingerprint
            assert chunk.service_tier == found.service_tier
    assert chunk.usage.completion_tokens == found.usage.completion_tokens
    assert chunk.usage.completion_tokens_details == found.usage.completion_tokens_details


def test_fingerprints_tell_numbers_apart(folder: Path) -> None:
    def found(quantization: str | None = None, cache: CacheDtype = "auto", seats: int = 4) -> str:
        limits = EngineConfig(max_model_len=32, max_num_seqs=seats, kv_cache_dtype=cache)
        engine = Engine.from_pretrained(str(folder), engine_config=limits, quantization=quantization)
        try:
            return fingerprint(ServerState(ServerSettings(model_name="small"), engine, "ready"))
        finally:
            engine.shutdown()

    assert found() == found(seats=8)
    kinds = [found(), found("int8"), found("int4"), found(cache="bfloat16")]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("fields", [{}, {"n": 2, "logprobs": 2}, {"temperature": 0, "n": 2}, {"echo": True}])
def test_answers_of_completions_are_of_the_official_types(full: Running, fields: dict[str, Any]) -> None:
    found = validated(Completion, post(full, "/v1/completions", TEXT | fields).json())
    assert found.system_fingerprint
    answer = post(full, "/v1/completions", TEXT | fields | {"stream": True})
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                # OpenAI's own streams have null here until the end, whatever its types say.
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            validated(Completion, chunk)


@pytest.mark.parametrize("stream", [False, True])
def test_several_greedy_answers_are_the_same(full: Running, stream: bool) -> None:
    answer: Any = full.client.completions.create(
        model="small", prompt=["ab", "c"], max_tokens=6, temperature=0, n=3, stream=stream, logprobs=1
    )
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    texts = {index: "".join(c.text for c in choices if c.index == index) for index in range(6)}
    assert texts[0] == texts[1] == texts[2] != ""
    assert texts[3] == texts[4] == texts[5] != ""
    if not stream:
        assert answer.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in choices)
    chat: Any = full.client.chat.completions.create(
        model="small", messages=MESSAGES, max_tokens=6, temperature=0, n=3, stream=stream, logprobs=True
    )
    if stream:
        parts = [choice for chunk in chat for choice in chunk.choices]
        written = ["".join(c.delta.content or "" for c in parts if c.index == index) for index in range(3)]
    else:
        written = [choice.message.content for choice in chat.choices]
    assert written[0] == written[1] == written[2] != ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 3}}, "guided_json"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
            "response_format",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_schemas_that_nothing_fulfils_are_unprocessable(
    full: Running, fields: dict[str, Any], param: str, stream: bool
) -> None:
    answer = post(full, "/v1/chat/completions", CHAT | fields | {"stream": stream})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "unenforceable_constraint")
