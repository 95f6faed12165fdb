"""vLLM's extensions through extra_body of OpenAI's own client, whole and streamed: each shows in what comes back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
LONG = "a prompt of more than two blocks of sixteen tokens"


class Asked:
    """One request to one of the endpoints, and its one choice, joined where it was streamed."""

    def __init__(self, server: Any, chat: bool, stream: bool, **fields: Any) -> None:
        options: dict[str, Any] = {"model": "small", "max_tokens": 24, "seed": 4, "temperature": 1.3}
        prompt = fields.pop("prompt", "hi")
        extra = {name: fields.pop(name) for name in list(fields) if name not in ("temperature", "stop", "max_tokens")}
        options |= {"extra_body": extra, "stream": stream, **fields}
        if stream:
            options["stream_options"] = {"include_usage": True}
        if chat:
            messages = extra.pop("messages", [{"role": "user", "content": prompt}])
            answer = server.client.chat.completions.create(messages=messages, **options)
        else:
            answer = server.client.completions.create(prompt=prompt, **options)
        chunks = list(answer) if stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        if chat:
            self.text = "".join((c.delta if stream else c.message).content or "" for c in choices)
        else:
            self.text = "".join(choice.text for choice in choices)
        self.token_ids = [i for choice in choices for i in getattr(choice, "token_ids", None) or ()]
        self.prompt_token_ids = getattr(chunks[0] if chat else choices[0], "prompt_token_ids", None)
        self.finish_reason = choices[-1].finish_reason
        self.stop_reason = choices[-1].stop_reason
        self.usage = chunks[-1].usage
        self.answer = answer


@pytest.fixture(params=["chat", "text", "chat-stream", "text-stream"])
def ask(request: Any, server: Any) -> Any:
    kind = request.param
    return lambda **fields: Asked(server, kind.startswith("chat"), kind.endswith("stream"), **fields)


def test_sampling(ask: Any) -> None:
    greedy = ask(temperature=0).text
    assert ask().text != greedy
    for fields in ({"top_k": 1}, {"min_p": 1.0}):
        assert ask(**fields).text == greedy
    assert ask(temperature=0, repetition_penalty=3.0).text != greedy
    (first, *_) = ask(temperature=0, return_token_ids=True).token_ids
    assert first not in ask(temperature=0, bad_words=[greedy[:1]], return_token_ids=True).token_ids
    assert set(ask(allowed_token_ids=[50, 51], ignore_eos=True, return_token_ids=True).token_ids) <= {50, 51}


def test_where_texts_end(ask: Any, server: Any) -> None:
    full = ask(ignore_eos=True, return_token_ids=True)
    assert (len(full.token_ids), full.finish_reason) == (24, "length")
    stopped = ask(ignore_eos=True, stop_token_ids=[full.token_ids[3]], min_tokens=2, return_token_ids=True)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", full.token_ids[3])
    assert 2 < stopped.usage.completion_tokens <= 4
    assert ask(min_tokens=24, return_token_ids=True).usage.completion_tokens == 24
    text = {"guided_choice": ["one two"]}
    assert ask(stop=["two"], **text).text == "one "
    assert ask(stop=["two"], include_stop_str_in_output=True, **text).text == "one two"
    late = ask(deadline=1e-6)
    assert (late.finish_reason, late.stop_reason) == ("length", "deadline")
    assert ask(deadline=1000.0).stop_reason is None


def test_guides(ask: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    # `c` and `k` and not `y`: some tokens of this model end its texts.
    for fields, matches in (
        ({"guided_json": schema}, lambda text: json.loads(text)["a"] in (1, 2)),
        ({"guided_json": json.dumps(schema)}, lambda text: json.loads(text)["a"] in (1, 2)),
        ({"guided_regex": "[a-c]{3}"}, lambda text: re.fullmatch("[a-c]{3}", text)),
        ({"guided_grammar": 'root ::= "a" | "b" root'}, lambda text: re.fullmatch("b*a", text)),
        ({"guided_choice": ["one", "two"]}, lambda text: text in ("one", "two")),
        ({"structured_outputs": {"json": schema}}, lambda text: json.loads(text)["a"] in (1, 2)),
        ({"structured_outputs": {"regex": "[a-c]{3}"}}, lambda text: re.fullmatch("[a-c]{3}", text)),
        ({"structured_outputs": {"choice": ["one", "two"]}}, lambda text: text in ("one", "two")),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, lambda text: text == "a"),
        ({"structured_outputs": {"json_object": True}}, lambda text: text.startswith("{")),
        ({"response_format": {"type": "json_object"}}, lambda text: text.startswith("{")),
    ):
        found = ask(max_tokens=60, **fields)
        assert matches(found.text), (fields, found.text)


def test_token_ids(ask: Any, server: Any) -> None:
    found = ask(return_token_ids=True, ignore_eos=True, prompt=LONG)
    assert len(found.token_ids) == found.usage.completion_tokens
    assert len(found.prompt_token_ids) == found.usage.prompt_tokens
    text = server.http.post("/detokenize", json={"tokens": found.token_ids}).json()["prompt"]
    assert text == found.text
    assert LONG in server.http.post("/detokenize", json={"tokens": found.prompt_token_ids}).json()["prompt"]


def test_what_shares_the_cache_and_what_comes_first(ask: Any, request: Any) -> None:
    salt = request.node.name  # each kind of request has its own
    cached = [
        ask(prompt=LONG, cache_salt=one, priority=-1).usage.prompt_tokens_details.cached_tokens
        for one in (salt, salt, salt + "x")
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 32


def test_special_tokens(ask: Any) -> None:
    # The small model's <s> is a special token: it shows only where it is not skipped.
    fields = {"allowed_token_ids": [0], "ignore_eos": True, "max_tokens": 2}
    assert ask(**fields).text == ""
    assert ask(skip_special_tokens=False, **fields).text == "<s><s>"


@pytest.mark.parametrize("stream", [False, True])
def test_of_conversations(server: Any, stream: bool) -> None:
    usual = Asked(server, True, stream)
    bare = Asked(server, True, stream, add_generation_prompt=False)
    assert usual.usage.prompt_tokens - bare.usage.prompt_tokens == len("[a]")
    messages = [*MESSAGES, {"role": "assistant", "content": "so"}]
    going_on = Asked(server, True, stream, messages=messages, continue_final_message=True, return_token_ids=True)
    text = server.http.post("/detokenize", json={"tokens": going_on.prompt_token_ids}).json()["prompt"]
    assert text == "[user]hi[assistant]so"
    # The template writes the name of a variable that it has: none here, so nothing changes.
    assert Asked(server, True, stream, chat_template_kwargs={"x": 1}).usage.prompt_tokens == usual.usage.prompt_tokens


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_logprobs(server: Any, chat: bool) -> None:
    answer = Asked(server, chat, False, prompt_logprobs=2, prompt="abc").answer
    found = answer.prompt_logprobs if chat else answer.choices[0].prompt_logprobs
    assert len(found) == answer.usage.prompt_tokens
    assert found[0] is None
    for position in found[1:]:
        assert {entry["rank"] for entry in position.values()} >= {1, 2}


@pytest.mark.parametrize("chat", [False, True])
def test_usage_in_every_chunk(server: Any, chat: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    common: dict[str, Any] = {"model": "small", "max_tokens": 8, "stream": True, "stream_options": options, "seed": 1}
    create = server.client.chat.completions.create if chat else server.client.completions.create
    chunks = list(create(**common, **({"messages": MESSAGES} if chat else {"prompt": "hi"})))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2]
    assert chunks[-1].choices == []
