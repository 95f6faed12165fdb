"""The openai package as its users write it: streams and their helpers, parsed answers, tools, errors, retries."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Literal

import openai
import pydantic
import pytest

from puna.scheduling.step_plan import StepPlan, StepResult
from serving.conftest import Running, Serve

MESSAGES: list[Any] = [{"role": "user", "content": "Which way?"}]
GREEDY: dict[str, Any] = {"model": "small", "temperature": 0, "max_tokens": 12}
# The helpers take an answer that was cut off for an error: this one ends.
ENDING: dict[str, Any] = {"model": "small", "temperature": 0, "extra_body": {"guided_regex": "[a-z ]{20}"}}


class Step(pydantic.BaseModel):
    """Short values: the model is random, and what is not bounded goes on for long."""

    model_config = pydantic.ConfigDict(extra="forbid")
    to: Literal["N", "S"]
    count: Literal[1, 2]


class Way(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    first: Step
    last: Step | None


def with_async(running: Running, use: Callable[[openai.AsyncOpenAI], Any]) -> Any:
    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return await use(client)

    return asyncio.run(run())


def test_models(clients_server: Running) -> None:
    client = clients_server.client
    (model,) = client.models.list()
    assert client.models.retrieve(model.id) == model
    assert model.owned_by == "puna"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("another")
    assert error.value.code == "model_not_found"


def test_completions_sync_async_and_streamed_are_the_same(clients_server: Running) -> None:
    options: dict[str, Any] = {"prompt": ["one", "two"], "n": 2, "temperature": 0.7, "seed": 5, "max_tokens": 12}
    whole = clients_server.client.completions.create(model="small", **options)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]

    async def use(client: openai.AsyncOpenAI) -> list[str]:
        found = [""] * 4
        async for chunk in await client.completions.create(model="small", stream=True, **options):
            for choice in chunk.choices:
                found[choice.index] += choice.text
        again = await client.completions.create(model="small", **options)
        assert [choice.text for choice in again.choices] == texts
        assert again.usage == whole.usage
        return found

    assert with_async(clients_server, use) == texts


def test_stream_helper_tells_events_and_the_whole(clients_server: Running) -> None:
    client = clients_server.client
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=1, **ENDING)
    include: Any = {"include_usage": True}
    with client.chat.completions.stream(
        messages=MESSAGES, logprobs=True, top_logprobs=1, stream_options=include, **ENDING
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "content.delta"]
    (done,) = [event for event in events if event.type == "content.done"]
    assert "".join(event.delta for event in deltas) == done.content == whole.choices[0].message.content
    assert deltas[-1].snapshot == done.content
    assert {event.type for event in events} >= {"chunk", "content.delta", "logprobs.content.delta", "content.done"}
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    assert final.usage.total_tokens == whole.usage.total_tokens
    assert final.id.startswith("chatcmpl-")


def test_async_stream_helper(clients_server: Running) -> None:
    whole = clients_server.client.chat.completions.create(messages=MESSAGES, **ENDING)

    async def use(client: openai.AsyncOpenAI) -> str:
        async with client.chat.completions.stream(messages=MESSAGES, **ENDING) as stream:
            return (await stream.get_final_completion()).choices[0].message.content or ""

    assert with_async(clients_server, use) == whole.choices[0].message.content


@pytest.mark.parametrize("seed", range(3))
def test_parsed_answers(clients_server: Running, seed: int) -> None:
    options: dict[str, Any] = {"model": "small", "messages": MESSAGES, "response_format": Way, "seed": seed}
    parsed = clients_server.client.chat.completions.parse(**options).choices[0].message
    assert isinstance(parsed.parsed, Way)
    with clients_server.client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert (streamed.parsed, streamed.content) == (parsed.parsed, parsed.content)

    async def use(client: openai.AsyncOpenAI) -> Any:
        return (await client.chat.completions.parse(**options)).choices[0].message.parsed

    assert with_async(clients_server, use) == parsed.parsed


def test_a_parsed_answer_that_is_cut_off_is_the_clients_own_error(clients_server: Running) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        clients_server.client.chat.completions.parse(
            model="small", messages=MESSAGES, response_format=Way, max_tokens=3
        )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Step"}}])
def test_parsed_tools(clients_server: Running, choice: Any) -> None:
    options: dict[str, Any] = {
        "model": "small",
        "messages": MESSAGES,
        "tools": [openai.pydantic_function_tool(Step)],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 1,
    }
    answer = clients_server.client.chat.completions.parse(**options).choices[0]
    (call,) = answer.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Step)
    assert answer.finish_reason == "tool_calls"
    with clients_server.client.chat.completions.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.name == "Step"
    assert done.parsed_arguments == call.function.parsed_arguments
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == done.arguments == call.function.arguments
    assert final.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments
    # The result goes back as the documentation of OpenAI has it: the message as it came, then the tool's.
    back: list[Any] = [*MESSAGES, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    more = clients_server.client.chat.completions.create(messages=back, tools=options["tools"][:0] or None, **GREEDY)
    assert more.choices[0].finish_reason in ("stop", "length")


def test_strict_tools_need_no_choice(clients_server: Running) -> None:
    """As pydantic_function_tool makes them; a random model calls none."""
    tools: Any = [openai.pydantic_function_tool(Step)]
    answer = clients_server.client.chat.completions.create(messages=MESSAGES, tools=tools, **GREEDY).choices[0]
    assert answer.finish_reason in ("length", "stop")
    assert answer.message.tool_calls is None


def test_embeddings(clients_server: Running) -> None:
    client = clients_server.client
    texts = ["one", "another one", "ü"]
    packed = client.embeddings.create(model="small", input=texts)  # asks for base64, and unpacks it
    plain = client.embeddings.create(model="small", input=texts, encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1, 2]
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert len({len(item.embedding) for item in packed.data}) == 1
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0

    async def use(client: openai.AsyncOpenAI) -> Any:
        return await client.embeddings.create(model="small", input=texts[1])

    assert with_async(clients_server, use).data[0].embedding == packed.data[1].embedding


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"made_up": 1}}, openai.BadRequestError, "made_up"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format.json_schema"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_classes(
    clients_server: Running, options: dict[str, Any], error: type[openai.APIStatusError], param: str, stream: bool
) -> None:
    with pytest.raises(error) as found:
        clients_server.client.chat.completions.create(
            **({"model": "small", "messages": MESSAGES, "stream": stream} | options)
        )
    assert found.value.param == param or param.startswith(str(found.value.param))
    assert found.value.type == "invalid_request_error"
    assert found.value.request_id
    assert isinstance(found.value, openai.APIStatusError)


def test_keys(serve: Serve) -> None:
    with serve(api_keys=("right",)) as running:
        assert running.client.models.list().data
        with pytest.raises(openai.AuthenticationError) as error:
            running.client.with_options(api_key="wrong").models.list()
        assert error.value.code == "invalid_api_key"


class Held:
    """An engine's steps, held until `open` is set."""

    def __init__(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        assert running.state.engine is not None
        executor = running.state.engine.parts.executor
        self.open = threading.Event()
        self._submit = executor.submit
        monkeypatch.setattr(executor, "submit", self.submit)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.open.wait()
        return self._submit(plan)


@pytest.fixture
def held(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, Held]]:
    """A server that runs one request, lets one wait, and makes no step."""
    with serve({"max_num_seqs": 1, "max_waiting": 1}) as running:
        it = Held(running, monkeypatch)
        yield running, it
        it.open.set()
        running.wait_until_idle()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited twenty seconds"
        time.sleep(0.005)


def test_a_full_queue_is_tried_again_as_the_server_says(held: tuple[Running, Held]) -> None:
    running, gate = held
    assert running.state.engine is not None
    scheduler = running.state.engine.parts.scheduler
    streams = []
    for ahead in (1, 2):
        streams.append(running.client.completions.create(model="small", prompt="x", max_tokens=2, stream=True))
        wait_for(lambda ahead=ahead: scheduler.num_running + scheduler.num_waiting == ahead and scheduler.num_running)
    with pytest.raises(openai.RateLimitError) as error:
        running.client.completions.create(model="small", prompt="x")
    assert error.value.code == "queue_full"
    wait = int(error.value.response.headers["retry-after"])
    # There is room again before the client asks once more; that it waits at all is what the header asks for.
    threading.Timer(0.1, gate.open.set).start()
    begin = time.monotonic()
    answer = running.client.with_options(max_retries=1).completions.create(model="small", prompt="x", max_tokens=2)
    assert time.monotonic() - begin >= wait
    assert answer.choices[0].finish_reason in ("length", "stop")
    for stream in streams:
        assert list(stream)


def test_a_timeout_ends_the_request(held: tuple[Running, Held]) -> None:
    running, gate = held
    assert running.state.engine is not None
    scheduler = running.state.engine.parts.scheduler
    with pytest.raises(openai.APITimeoutError):
        running.client.with_options(timeout=0.3).completions.create(model="small", prompt="x", max_tokens=200)
    gate.open.set()
    wait_for(lambda: not scheduler.has_work)


def test_raw_and_streaming_responses(clients_server: Running) -> None:
    client = clients_server.client
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, extra_headers={"x-request-id": "mine-7"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == "mine-7"
    assert raw.parse()._request_id == "mine-7"
    with client.chat.completions.with_streaming_response.create(messages=MESSAGES, stream=True, **GREEDY) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    text = "".join(
        choice["delta"].get("content") or "" for line in lines[:-1] for choice in json.loads(line[6:])["choices"]
    )
    assert text == raw.parse().choices[0].message.content


def test_ends_of_lines_within_texts_end_no_event(clients_server: Running) -> None:
    """httpx's and requests' iter_lines end lines at these, too, and openai's client does not."""
    text = "a\x85b\u2028c\u2029d\r\n\x0be"
    body = {"model": "small", "prompt": "x", "max_tokens": 40, "stream": True, "guided_choice": [text]}
    with clients_server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text
    extra = {"guided_choice": [text]}
    stream = clients_server.client.completions.create(
        model="small", prompt="x", max_tokens=40, stream=True, extra_body=extra
    )
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == text


def test_leaving_streams_frees_everything(clients_server: Running) -> None:
    """Sync by closing, async by breaking out, by cancelling the task; nothing runs afterwards."""
    long: dict[str, Any] = {"model": "small", "prompt": "x", "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    assert clients_server.state.engine is not None
    scheduler = clients_server.state.engine.parts.scheduler
    stream = clients_server.client.completions.create(stream=True, **long)
    next(iter(stream))
    assert scheduler.num_running == 1
    stream.close()
    wait_for(lambda: not scheduler.has_work)

    async def use(client: openai.AsyncOpenAI) -> None:
        async with await client.completions.create(stream=True, **long) as stream:
            async for _ in stream:
                break
        task = asyncio.create_task(client.completions.create(**long))
        while not scheduler.num_running:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with_async(clients_server, use)
    wait_for(lambda: not scheduler.has_work)


def test_a_failure_within_a_stream_is_an_error_of_the_client(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as running:
        gate = Held(running, monkeypatch)
        stream = running.client.completions.create(model="small", prompt="x", max_tokens=20, stream=True)

        def fail(plan: StepPlan) -> Future[StepResult]:
            raise RuntimeError("out of luck")

        gate._submit = fail
        gate.open.set()
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(stream)


def test_extensions_through_extra_body(clients_server: Running) -> None:
    extra = {"top_k": 1, "min_tokens": 4, "ignore_eos": True, "return_token_ids": True, "stop_token_ids": [5]}
    answer = clients_server.client.completions.create(model="small", prompt="x", max_tokens=4, extra_body=extra)
    assert answer.usage is not None
    assert answer.choices[0].token_ids is not None
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens
    for extra, pattern in (({"guided_choice": ["yes", "no"]}, ("yes", "no")), ({"guided_regex": "[ab]{2}"}, None)):
        text = clients_server.client.completions.create(model="small", prompt="x", extra_body=extra).choices[0].text
        assert text in pattern if pattern else set(text) <= {"a", "b"} and len(text) == 2
