"""What bad requests get: the status, and the name of the field, in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from puna.serving.errors import dumps
from puna.serving.state import ServerSettings

CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT: dict[str, Any] = {"model": "small", "prompt": "hi", "max_tokens": 1}

BAD_TEXT: tuple[tuple[dict[str, Any], str], ...] = (
    ({"suffix": "x"}, "suffix"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"top_p": 0}, "top_p"),
    ({"repetition_penalty": 1e308}, "repetition_penalty"),
    ({"logprobs": 21}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": "x" * 300}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"guided_regex": "[", "max_tokens": 2}, "regex"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"guided_json": {"x": "y" * 70000}}, "guided_json"),
    ({"deadline": 0}, "deadline"),
    ({"store": True}, "store"),
)
BAD_CHAT: tuple[tuple[dict[str, Any], str], ...] = (
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}]},
        "'thinking': this server takes parts of type text; send reasoning as reasoning_content",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"functions": []}, "functions"),
    ({"chat_template": "x"}, "chat_template"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": 1}}, "messages"),
)


def check(answer: Any, status: int, name: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert name in f"{error['param']} {error['message']}"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("fields", "name"), BAD_TEXT, ids=[str(fields)[:50] for fields, _ in BAD_TEXT])
def test_bad_completions(server: Any, fields: dict[str, Any], name: str) -> None:
    body = json.dumps(TEXT | fields).encode()
    check(server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400, name)


@pytest.mark.parametrize(("fields", "name"), BAD_CHAT, ids=[str(fields)[:50] for fields, _ in BAD_CHAT])
def test_bad_chats(server: Any, fields: dict[str, Any], name: str) -> None:
    check(server.http.post("/v1/chat/completions", json=CHAT | fields), 400, name)


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"null", b'{"model": 1}', b"[" * 100_000, b"\xff"])
def test_raw_bodies(server: Any, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    check(answer, 400, "")


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b'{"model": "small"}', "application/x-www-form-urlencoded", "send it with content-type: application/json"),
        (b'{"model": "small"}', "text/plain", "send it with content-type: application/json"),
        (b'{"model": "small"}', None, "send it with content-type: application/json"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'"text"', "application/json", "must be a JSON object"),
        (b"null", "application/json", "must be a JSON object"),
        (b"", "application/json", "must be a JSON object"),
    ],
)
def test_bodies_that_are_no_json_objects(server: Any, content: bytes, kind: str | None, says: str) -> None:
    answer = server.http.post("/v1/completions", content=content, headers={"content-type": kind} if kind else {})
    check(answer, 400, says)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": [5] * 256}, "prompt"),
        ("/v1/completions", {"prompt": [[5], [5] * 300]}, "prompt"),
        ("/v1/embeddings", {"input": [5] * 257}, "input"),
    ],
)
def test_prompts_that_are_too_long_have_openais_code(
    server: Any, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = server.http.post(path, json={"model": "small"} | fields)
    check(answer, 400, "this model's maximum context length is 256 tokens")
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")


NAMED: tuple[tuple[bool, dict[str, Any], str, str], ...] = (
    (False, {"prompt": "", "add_special_tokens": False}, "prompt", "the prompt is empty"),
    (False, {"prompt": [99999]}, "prompt", "the prompt has the token 99999"),
    (False, {"bad_words": ["\ud800"]}, "bad_words", "half a surrogate pair"),
    (False, {"stop": 3}, "stop", "valid string"),
    (False, {"stop": ["a", 3]}, "stop.1", "valid string"),
    (False, {"guided_json": 3}, "guided_json", "valid string"),
    (False, {"structured_outputs": {"json": 3}}, "structured_outputs.json", "valid string"),
    (False, {"Str": 3}, "Str", "does not know this field"),
    (False, {"stream": True, "stream_options": {"str": 1}}, "stream_options.str", "does not know this field"),
    (
        True,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0",
        "has the field text",
    ),
    (True, {"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0", "object"),
    (True, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid string"),
    (True, {"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
    (True, {"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
    (True, {"tools": [{"type": "function", "function": {"name": 5}}]}, "tools.0.function.name", "valid string"),
    (True, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "tools is a field of its own"),
    (True, {"messages": [{"role": "user", "content": "x" * 400}]}, "messages", "too long"),
)


@pytest.mark.parametrize(("chat", "fields", "param", "says"), NAMED, ids=[str(fields)[:50] for _, fields, *_ in NAMED])
def test_the_field_at_fault_is_named_as_the_client_wrote_it(
    server: Any, chat: bool, fields: dict[str, Any], param: str, says: str
) -> None:
    path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", TEXT)
    content = json.dumps(body | fields).encode()
    answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
    check(answer, 400, says)
    assert answer.json()["error"]["param"] == param, answer.text


CONTRADICTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"guided_choice": ["a"], "min_tokens": 3}, "min_tokens"),
    ({"guided_choice": ["ab"], "bad_words": ["a"]}, "bad_words"),
    ({"guided_regex": "[b-d]+", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"allowed_token_ids": [53], "bad_words": ["T"]}, "allowed_token_ids"),
)


@pytest.mark.parametrize(("fields", "name"), CONTRADICTIONS, ids=[name for _, name in CONTRADICTIONS])
@pytest.mark.parametrize("chat", [False, True])
def test_what_contradicts_itself_is_no_failure_of_the_engine(
    server: Any, fields: dict[str, Any], name: str, chat: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", TEXT)
    body = body | {"max_tokens": 5, **fields}
    for n in (1, 2):
        answer = server.http.post(path, json=body | {"n": n}, headers={"x-request-id": f"contradiction-{n}"})
        check(answer, 422, f"every token is ruled out by {name}")
        error = answer.json()["error"]
        guide = next((field for field in fields if field.startswith("guided")), None)
        assert (error["code"], error["param"]) == ("unenforceable_constraint", guide)
    stream = server.http.post(path, json=body | {"stream": True})
    error, done = [line[6:] for line in stream.text.splitlines() if line.startswith("data: ")][-2:]
    assert json.loads(error)["error"]["code"] == "unenforceable_constraint"
    assert done == "[DONE]"
    assert "failed" not in caplog.text
    server.wait_until_idle()


def test_unknown_names(server: Any) -> None:
    check(server.http.post("/v1/completions", json=TEXT | {"model": "other"}), 404, "model")
    check(server.http.get("/v1/models/other"), 404, "model")
    check(server.http.get("/v1/nothing"), 404, "")
    check(server.http.get("/v1/completions"), 405, "")
    with pytest.raises(openai.NotFoundError, match="other"):
        server.client.models.retrieve("other")


def test_head_is_get_without_its_body(server: Any) -> None:
    """Load balancers ask so."""
    for path in ("/health", "/ready", "/v1/models", "/metrics", "/", "/v1/models/other"):
        with_body, without = server.http.get(path), server.http.head(path)
        assert without.status_code == with_body.status_code, path
        assert without.content == b""
        assert without.headers["content-type"] == with_body.headers["content-type"]
        if path not in ("/health", "/metrics"):  # whose length changes
            assert without.headers["content-length"] == with_body.headers["content-length"]
    assert server.http.head("/v1/completions").status_code == 405
    assert 'handler="/v1/models",method="HEAD",status="2xx"' in server.http.get("/metrics").text


def test_null_and_harmless_values_are_fine(server: Any) -> None:
    body = TEXT | {
        "stop": None,
        "functions": None,
        "store": False,
        "service_tier": "auto",
        "user": "me",
        "suffix": None,
    }
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_names_as_long_as_paths(serve: Any) -> None:
    name = "/models" + "/folder" * 100
    with serve() as running:
        running.state.settings = ServerSettings(model_name=name)
        assert running.http.post("/v1/completions", json=TEXT | {"model": name}).json()["model"] == name
        assert running.client.models.retrieve(name).id == name


def test_models_and_versions(server: Any) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("small", "model", 256)
    assert server.client.models.retrieve("small") == model
    assert server.http.get("/version").json()["version"]
    assert server.http.get("/health").json()["status"] == "ready"
    assert server.http.get("/ready").status_code == 200


def test_json_is_one_line_for_every_client() -> None:
    text = "a\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029€😀"
    line = dumps({"text": text})
    assert json.loads(line) == {"text": text}
    assert len(line.decode().splitlines()) == 1
    assert "€😀".encode() in line
    assert json.loads(dumps(["\ud800€"])) == ["\ud800€"]


def test_keys(serve: Any) -> None:
    with serve(api_keys=("right", "also-right")) as running:
        body = TEXT
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "right"},
            {"authorization": "Basic right"},
        ):
            answer = post(running, body, header)
            check(answer, 401, "")
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("right", "also-right"):
            assert post(running, body, {"authorization": f"Bearer {key}"}).status_code == 200
        assert post(running, None, {}).status_code == 200


def post(running: Any, body: Any, headers: dict[str, str]) -> Any:
    if body is None:
        return httpx.get(f"{running.url}/health")
    return httpx.post(f"{running.url}/v1/completions", json=body, headers=headers)


def test_large_bodies(serve: Any) -> None:
    with serve(max_body_bytes=1000) as running:
        body = TEXT | {"user": "x" * 1000}
        check(running.http.post("/v1/completions", json=body), 413, "")

        def pieces() -> Any:  # without a content-length
            yield json.dumps(body).encode()

        answer = running.http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        check(answer, 413, "")
