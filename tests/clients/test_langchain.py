"""langchain-openai: chat, tools, structured output, plain completions and embeddings."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pydantic
import pytest

from serving.conftest import Running

langchain_openai = pytest.importorskip("langchain_openai")
from langchain_core.exceptions import ContextOverflowError  # noqa: E402
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402

MESSAGES = [SystemMessage("be brief"), HumanMessage("hi")]


class Way(pydantic.BaseModel):
    """The way to go."""

    to: Literal["N", "S"]


@tool
def go(to: Literal["N", "S"]) -> str:
    """Goes."""
    return f"went {to}"


@pytest.fixture
def options(clients_server: Running) -> dict[str, Any]:
    return {"model": "small", "base_url": f"{clients_server.url}/v1", "api_key": "none", "max_retries": 0}


@pytest.fixture
def chat(options: dict[str, Any]) -> Any:
    return langchain_openai.ChatOpenAI(temperature=0, max_tokens=12, **options)


def test_invoke_stream_and_batch_are_the_same(clients_server: Running, chat: Any) -> None:
    messages: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = clients_server.client.chat.completions.create(
        model="small", messages=messages, temperature=0, max_tokens=12
    )
    answer = chat.invoke(MESSAGES)
    assert isinstance(answer, AIMessage)
    assert answer.content == expected.choices[0].message.content
    assert answer.response_metadata["finish_reason"] == expected.choices[0].finish_reason
    assert answer.usage_metadata["total_tokens"] == expected.usage.total_tokens
    chunks = list(chat.stream(MESSAGES, stream_usage=True))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.content == answer.content
    assert joined.usage_metadata["total_tokens"] == expected.usage.total_tokens
    assert [one.content for one in chat.batch([MESSAGES, MESSAGES])] == [answer.content] * 2

    async def use() -> tuple[str, str]:
        return (await chat.ainvoke(MESSAGES)).content, "".join(
            [chunk.content async for chunk in chat.astream(MESSAGES)]
        )

    assert asyncio.run(use()) == (answer.content, answer.content)


def test_logprobs_and_extensions(options: dict[str, Any]) -> None:
    extra = {"guided_choice": ["yes", "no"]}
    model = langchain_openai.ChatOpenAI(logprobs=True, top_logprobs=2, extra_body=extra, **options)
    answer = model.invoke("hi")
    assert answer.content in ("yes", "no")
    entries = answer.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith(answer.content)  # then comes the end's own token
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)


@pytest.mark.parametrize("choice", ["go", "any"])
def test_tools(options: dict[str, Any], choice: str) -> None:
    model = langchain_openai.ChatOpenAI(temperature=0, max_tokens=200, **options)
    bound = model.bind_tools([go], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke(MESSAGES)
    (call,) = answer.tool_calls
    assert call["name"] == "go"
    assert call["args"]["to"] in ("N", "S")
    chunks = list(bound.stream(MESSAGES))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert [(one["name"], one["args"]) for one in joined.tool_calls] == [("go", call["args"])]
    result = go.invoke(call)
    assert isinstance(result, ToolMessage)
    more = model.bind(max_tokens=4).invoke([*MESSAGES, answer, result])
    assert isinstance(more.content, str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(options: dict[str, Any], method: str) -> None:
    model = langchain_openai.ChatOpenAI(temperature=0, **options)
    assert model.with_structured_output(Way, method=method).invoke(MESSAGES).to in ("N", "S")
    as_dict = model.with_structured_output(Way.model_json_schema(), method=method, strict=True)
    assert as_dict.invoke(MESSAGES)["to"] in ("N", "S")


def test_json_mode(options: dict[str, Any]) -> None:
    model = langchain_openai.ChatOpenAI(temperature=0, extra_body={"guided_choice": ['{"to": "N"}']}, **options)
    assert model.invoke(MESSAGES).content == '{"to": "N"}'


def test_plain_completions(clients_server: Running, options: dict[str, Any]) -> None:
    expected = clients_server.client.completions.create(model="small", prompt="x", temperature=0, max_tokens=12)
    model = langchain_openai.OpenAI(temperature=0, max_tokens=12, **options)
    assert model.invoke("x") == expected.choices[0].text
    assert "".join(model.stream("x")) == expected.choices[0].text
    assert model.batch(["x", "y"])[0] == expected.choices[0].text


def test_embeddings(clients_server: Running, options: dict[str, Any]) -> None:
    texts = ["one", "two and more"]
    expected = clients_server.client.embeddings.create(model="small", input=texts, encoding_format="float")
    model = langchain_openai.OpenAIEmbeddings(check_embedding_ctx_length=False, **options)
    assert model.embed_documents(texts) == [pytest.approx(item.embedding) for item in expected.data]
    assert model.embed_query("one") == pytest.approx(expected.data[0].embedding)
    assert asyncio.run(model.aembed_query("one")) == pytest.approx(expected.data[0].embedding)


def test_embeddings_of_token_ids(
    clients_server: Running, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """langchain's default: texts become token ids first, which must be the model's, not OpenAI's from the network."""

    class Encoding:
        def encode_ordinary(self, text: str) -> list[int]:
            found = clients_server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
            return [int(token) for token in found["tokens"]]

        def encode(self, text: str, **_: Any) -> list[int]:
            return self.encode_ordinary(text)

    monkeypatch.setattr("tiktoken.encoding_for_model", lambda _: Encoding())
    texts = ["one", "two and more"]
    model = langchain_openai.OpenAIEmbeddings(check_embedding_ctx_length=True, **options)
    ids = [Encoding().encode(text) for text in texts]
    expected = clients_server.client.embeddings.create(model="small", input=ids, encoding_format="float")
    # langchain scales to length 1, which these have already.
    assert model.embed_documents(texts) == [pytest.approx(item.embedding, rel=1e-5) for item in expected.data]


def test_a_prompt_that_is_too_long_is_an_overflow_of_the_context(chat: Any) -> None:
    """Found by the words of the message: chains that shorten their history rely on it."""
    with pytest.raises(ContextOverflowError):
        chat.invoke([HumanMessage("x" * 5000)])
