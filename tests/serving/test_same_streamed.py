"""A stream's pieces joined are the whole answer, for random combinations of fields: texts, calls, reasoning,
log-probabilities, ids, endings and usage."""

from __future__ import annotations

import json
import random
from typing import Any, Final

import pytest

from puna.serving.message import joined
from serving.conftest import Running
from serving.test_fields import MESSAGES, full  # noqa: F401  the server
from serving.test_tools import SHORT, TIME

GO: Final = {"type": "function", "function": {"name": "go"}}
HERMES: Final = '<tool_call>{"name": "go", "arguments": {"to": "N"}}</tool_call>'
# For each field some of its values; a test takes some of the fields.
SHARED: Final[dict[str, list[Any]]] = {
    "n": [2, 3],
    "temperature": [0, 0.5, 1.7],
    "top_p": [0.8],
    "top_k": [3, 20],
    "min_p": [0.05],
    "stop": ["a", ["e", "xyz"], ["\n"]],
    "include_stop_str_in_output": [True],
    "stop_token_ids": [[53, 60]],
    "min_tokens": [2],
    "presence_penalty": [1.5],
    "frequency_penalty": [-0.5],
    "repetition_penalty": [1.2],
    "logit_bias": [{"53": 5, "60": -100}],
    "bad_words": [["T"]],
    "skip_special_tokens": [False],
    "return_token_ids": [True],
    "ignore_eos": [True],
    "deadline": [1000],
    "guided_choice": [["one", "two", "grün 😀"], [f"<think>hm</think>\n\nso {HERMES} and"], ["<think>no end"]],
    "guided_regex": ["[a-c]{3,9}"],
    "response_format": [{"type": "json_object"}],
}
CHAT: Final[dict[str, list[Any]]] = SHARED | {
    "logprobs": [True],
    "tools": [[TIME, SHORT]],
    "tool_choice": ["auto", "none", "required", GO],
    "parallel_tool_calls": [False],
    "include_reasoning": [False],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "continue_final_message": [True],
}
TEXT: Final[dict[str, list[Any]]] = SHARED | {
    "prompt": ["hi", ["a", "b"], [5, 6], [[5], [6, 7, 8]]],
    "logprobs": [0, 3],
    "echo": [True],
}


def some(fields: dict[str, list[Any]], chooser: random.Random) -> dict[str, Any]:
    return {name: chooser.choice(values) for name, values in fields.items() if chooser.random() < 0.2}


def post(running: Running, path: str, body: dict[str, Any]) -> Any:
    return running.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def joined_logprobs(pieces: list[Any]) -> dict[str, Any] | None:
    given = [piece for piece in pieces if piece is not None]
    if not given:
        return None
    return {name: [one for piece in given for one in piece[name]] if given[0][name] is not None else None
            for name in given[0]}  # fmt: skip


def calls_of(message: dict[str, Any]) -> list[Any]:
    return [call["function"] for call in message.get("tool_calls") or []]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_is_the_whole_answer(full: Running, chat: bool, seed: int) -> None:  # noqa: F811
    chooser = random.Random(seed)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"model": "small", "seed": seed, "max_tokens": chooser.choice([1, 3, 12, 40, 90])}
    body |= {"messages": MESSAGES} if chat else {"prompt": "hi"}
    body |= some(CHAT if chat else TEXT, chooser)
    answer = post(full, path, body)
    streamed = post(full, path, body | {"stream": True, "stream_options": {"include_usage": True}})
    if answer.status_code != 200:
        assert answer.status_code in (400, 422)
        error = answer.json()["error"]
        if streamed.status_code == 200:  # a contradiction that shows on the way
            assert json.loads(streamed.text.split("\n\n")[-3].removeprefix("data: ")) == {"error": error}
        else:
            assert (streamed.status_code, streamed.json()["error"]) == (answer.status_code, error)
        return
    whole = answer.json()
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    *chunks, last = map(json.loads, events)
    assert last["choices"] == []
    # The second request finds the first one's prompt in the cache.
    assert last["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {"prompt_tokens_details": None}
    for choice in whole["choices"]:
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        for name in ("finish_reason", "stop_reason"):
            assert pieces[-1].get(name) == choice[name], name
        assert joined_logprobs([piece.get("logprobs") for piece in pieces]) == choice["logprobs"]
        if body.get("return_token_ids"):
            assert [i for piece in pieces for i in piece.get("token_ids", ())] == choice["token_ids"]
        if chat:
            message = joined([piece["delta"] for piece in pieces])
            assert (message["content"] or None) == (choice["message"]["content"] or None)
            assert calls_of(message) == calls_of(choice["message"])
            for name in ("reasoning", "reasoning_content"):
                assert (message.get(name) or None) == (choice["message"].get(name) or None)
        else:
            assert "".join(piece["text"] for piece in pieces) == choice["text"]
