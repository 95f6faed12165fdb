"""/v1/chat/completions through OpenAI's client: roles, streams, log-probabilities, structured output."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest

MESSAGES: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"model": "small", "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_the_template_sees_every_role(server: Any) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]
    found = server.http.post("/tokenize", json={"messages": messages}).json()
    text = server.http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]
    assert text == "[system]be\nbrief[user]hi[assistant]yes[user]more[a]"
    assert found["count"] == len(found["tokens"])
    answer = server.client.chat.completions.create(messages=messages, max_tokens=3, **GREEDY)
    assert answer.usage.prompt_tokens == found["count"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"


def test_stream_has_the_role_once_and_joins_to_the_whole(server: Any) -> None:
    options: dict[str, Any] = {"messages": MESSAGES, "max_completion_tokens": 15, "n": 2, "seed": 3, "model": "small"}
    whole = server.client.chat.completions.create(logprobs=True, top_logprobs=2, **options)
    stream = server.client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, **options
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    counts = [usage.model_dump(exclude={"prompt_tokens_details"}) for usage in (chunks[-1].usage, whole.usage)]
    assert counts[0] == counts[1]  # the second time, the prompt was cached
    for index in (0, 1):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert parts[0].delta.role == "assistant"
        assert [part.delta.role for part in parts[1:]] == [None] * (len(parts) - 1)
        assert "".join(part.delta.content or "" for part in parts) == whole.choices[index].message.content
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == whole.choices[index].finish_reason
        joined = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert joined == whole.choices[index].logprobs.content
        assert all(len(entry.top_logprobs) == 2 for entry in joined)
        text = b"".join(bytes(entry.bytes) for entry in joined).decode(errors="replace")
        assert text == whole.choices[index].message.content


def test_raw_stream_is_as_documented(server: Any) -> None:
    body = {"model": "small", "messages": MESSAGES, "max_tokens": 4, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"] == "mine-1"
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-mine-1"}
    assert all("usage" not in chunk for chunk in chunks)
    assert all(choice["index"] == 0 for chunk in chunks for choice in chunk["choices"])


def test_async_client_and_parse(server: Any) -> None:
    class Point(pydantic.BaseModel):
        x: bool
        name: str = pydantic.Field(max_length=5)

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.parse(
                        model="small", messages=MESSAGES, response_format=Point, max_tokens=120, seed=seed
                    )
                    for seed in range(3)
                )
            )

    for answer in asyncio.run(run()):
        assert isinstance(answer.choices[0].message.parsed, Point)
        assert answer.choices[0].finish_reason == "stop"


def test_stream_helper(server: Any) -> None:
    extra = {"guided_choice": ["yes", "no"]}
    with server.client.chat.completions.stream(messages=MESSAGES, model="small", extra_body=extra) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(texts) == final.choices[0].message.content
    assert final.choices[0].message.content in extra["guided_choice"]


def test_continue_final_message(server: Any) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "we"}]
    body = {"messages": messages, "continue_final_message": True}
    tokens = server.http.post("/tokenize", json=body).json()["tokens"]
    assert server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"].endswith("[assistant]we")
    chat = server.client.chat.completions.create(
        messages=messages, max_tokens=5, model="small", temperature=0, extra_body={"continue_final_message": True}
    )
    plain = server.client.completions.create(prompt=tokens, max_tokens=5, model="small", temperature=0)
    assert chat.choices[0].message.content == plain.choices[0].text


@pytest.mark.parametrize("value", [0.5, -1])
def test_penalties_change_the_answer(server: Any, value: float) -> None:
    options: dict[str, Any] = {**GREEDY, "messages": MESSAGES, "max_tokens": 40}
    plain = server.client.chat.completions.create(**options).choices[0].message.content
    assert (
        server.client.chat.completions.create(frequency_penalty=2 * value, **options).choices[0].message.content
        != plain
    )
