"""litellm through its `openai/` provider: answers, streams, tools, embeddings, and errors as its own classes."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

from serving.conftest import Running

# Read when it is imported: the list of prices is the package's own, instead of one from the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
litellm = pytest.importorskip("litellm")

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "go",
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["N", "S"]}},
            "required": ["to"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def options(clients_server: Running, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(litellm, "telemetry", False)
    litellm.suppress_debug_info = True
    return {
        "model": "openai/small",
        "api_base": f"{clients_server.url}/v1",
        "api_key": "none",
        "max_retries": 0,
        "max_tokens": 12,
        "temperature": 0,
    }


def test_completion_streamed_or_not_sync_and_async(clients_server: Running, options: dict[str, Any]) -> None:
    expected = clients_server.client.chat.completions.create(
        model="small", messages=MESSAGES, max_tokens=12, temperature=0
    )
    text = expected.choices[0].message.content
    whole = litellm.completion(messages=MESSAGES, **options)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == expected.choices[0].finish_reason
    assert whole.usage.total_tokens == expected.usage.total_tokens
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.usage.total_tokens for chunk in chunks if getattr(chunk, "usage", None)] == [whole.usage.total_tokens]
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert rebuilt.choices[0].message.content == text

    async def use() -> tuple[str, str]:
        answer = await litellm.acompletion(messages=MESSAGES, **options)
        stream = await litellm.acompletion(messages=MESSAGES, stream=True, **options)
        return answer.choices[0].message.content, "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(use()) == (text, text)


def test_text_completion(clients_server: Running, options: dict[str, Any]) -> None:
    options["model"] = "text-completion-openai/small"
    text = clients_server.client.completions.create(model="small", prompt="x", max_tokens=12, temperature=0)
    answer = litellm.text_completion(prompt="x", **options)
    assert answer.choices[0].text == text.choices[0].text
    chunks = litellm.text_completion(prompt="x", stream=True, **options)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == text.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_tools(options: dict[str, Any], stream: bool) -> None:
    options |= {"max_tokens": 200, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "go"}}}
    answer = litellm.completion(messages=MESSAGES, stream=stream, **options)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=MESSAGES)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "go"
    assert json.loads(call.function.arguments)["to"] in ("N", "S")
    assert answer.choices[0].finish_reason == "tool_calls"
    back = [*MESSAGES, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    more = litellm.completion(messages=back, **(options | {"tool_choice": "none", "max_tokens": 3}))
    assert more.choices[0].message.role == "assistant"


def test_json_schema(options: dict[str, Any]) -> None:
    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "way", "strict": True, "schema": schema}}
    answer = litellm.completion(messages=MESSAGES, response_format=form, **(options | {"max_tokens": 200}))
    assert json.loads(answer.choices[0].message.content)["to"] in ("N", "S")


def test_embedding(clients_server: Running, options: dict[str, Any]) -> None:
    where = {name: options[name] for name in ("model", "api_base", "api_key")}
    expected = clients_server.client.embeddings.create(model="small", input=["a", "b"], encoding_format="float")
    found = litellm.embedding(input=["a", "b"], **where)
    assert [item["embedding"] for item in found.data] == [item.embedding for item in expected.data]


def test_errors(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=MESSAGES, **(options | {"temperature": -1}))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=MESSAGES, **(options | {"model": "openai/another"}))
    with pytest.raises(litellm.ContextWindowExceededError):  # found by the words of the message
        litellm.completion(messages=[{"role": "user", "content": "x" * 5000}], **options)
