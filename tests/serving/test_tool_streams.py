"""Calls in streams: told as they are written, the same wherever the text is cut; and held to strict schemas."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.engine import Engine
from puna.serving.message import MessageWriter, joined
from puna.serving.protocol import ChatRequest
from puna.serving.state import ServerSettings, ServerState
from puna.serving.tools import Dialect, forcing, parser_for
from serving.conftest import Running, listening
from serving.test_tools import LIMA, MESSAGES, SHORT, TEMPLATES, TIME, WEATHER, with_template

QUOTED = '{"city": "a \\"}] </tool_call> \\\\", "days": [{"x": "{["}, -1.5e3, true]}'
Calls = list[tuple[str, str]]
# What the parsers make of texts that the table of test_tools does not have: dialect, text, content, calls.
MORE: tuple[tuple[Dialect, str, str | None, Calls], ...] = (
    (
        "hermes",
        f'<tool_call>{{"name": "weather", "arguments": {QUOTED}}}</tool_call>\n\nDone.',
        "\n\nDone.",
        [("weather", QUOTED)],
    ),
    ("hermes", f'<tool_call>{{"arguments": {LIMA}, "name": "weather"}}</tool_call>', None, [("weather", LIMA)]),
    ("hermes", '<tool_call>{"id": 7, "name": "time", "arguments": "{\\"a\\": 1}"}', None, [("time", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {"a": [1, "b', None, [("time", '{"a": [1, "b')]),
    (
        "hermes",
        '<tool_call>[{"name": "time", "arguments": {}}, {"name": "time", "arguments": {}}]</tool_call>',
        None,
        [("time", "{}")] * 2,
    ),
    ("hermes", "a <tool_call> b", "a <tool_call> b", []),
    (
        "hermes",
        'x\n<tool_call>\n<tool_call>{"name": "time", "arguments": {}}</tool_call>',
        "x\n<tool_call>",
        [("time", "{}")],
    ),
    ("mistral", f'ok [TOOL_CALLS]weather[ARGS]{LIMA}[TOOL_CALLS]time{{}}', "ok", [("weather", LIMA), ("time", "{}")]),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "time", "arguments": {}, "id": "abcdef123"}, {"name": "time", "arguments": {}}]',
        None,
        [("time", "{}")] * 2,
    ),
    ("mistral", f"[TOOL_CALLS]time[CALL_ID]abc[ARGS]{LIMA}", None, [("time", LIMA)]),
    ("mistral", "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    ("llama", '{"type": "function", "name": "time", "parameters": {"a": 1}}', None, [("time", '{"a": 1}')]),
    ("llama", '{"name": "time"}', '{"name": "time"}', []),
    ("llama", '{"answer": [1, {"b": "c"}]} so', '{"answer": [1, {"b": "c"}]} so', []),
    ("llama", '[{"name": "time", "parameters": {}}]', None, [("time", "{}")]),
    ("llama", "[1, 2]", "[1, 2]", []),
    ("llama", "[link](https://a.b)", "[link](https://a.b)", []),
    ("llama", '{"name": "time", "parameters": {}}\nand so', "\nand so", [("time", "{}")]),
    ("pythonic", '[time(), weather(city="Lima")]', None, [("time", "{}"), ("weather", '{"city": "Lima"}')]),
)  # fmt: skip
PIECES = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "', 'time"', 'weather"'),
    *(', "arguments": ', ', "parameters": ', "{}", '{"a": "', '"}', "}", "]", "[", "{", '"', "\\", " ", "\n", ";", ","),
    *("time", "x", "(", ")", LIMA, "é"),
)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def deltas_of(dialect: Dialect, pieces: list[str], **fields: Any) -> list[dict[str, Any]]:
    request = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "tools": [WEATHER, TIME], **fields})
    writer = MessageWriter(
        parser_for(request, request.tools or [], dialect),
        dialect=dialect,
        only_one_call=request.parallel_tool_calls is False,
    )
    return [delta for piece in pieces for delta in writer.push(piece, None)] + writer.push("", "stop")


def calls_of(message: dict[str, Any]) -> Calls:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), MORE, ids=[f"{m[0]}-{m[1][:40]}" for m in MORE])
def test_more_texts(dialect: Dialect, text: str, content: str | None, calls: Calls) -> None:
    for pieces in ([text], list(text)):
        message = joined(deltas_of(dialect, pieces))
        assert (message["content"], calls_of(message)) == (content, calls)
        only = joined(deltas_of(dialect, pieces, parallel_tool_calls=False))
        assert calls_of(only) == calls[:1]


def check_stream(deltas: list[dict[str, Any]]) -> None:
    """What clients rely on: an index on every entry; id, type and name first and once; then pieces of arguments."""
    seen = 0
    for delta in deltas:
        assert list(delta) in (["content"], ["tool_calls"])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == seen
                assert call["type"] == "function"
                assert call["function"]["arguments"] == ""
                seen += 1
            else:
                assert set(call) == {"index", "function"}
                assert call["index"] == seen - 1
                assert set(call["function"]) == {"arguments"}
                assert call["function"]["arguments"]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["hermes", "mistral", "mistral_args", "llama", "pythonic"]),
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.sampled_from([m[1] for m in MORE]),
    st.lists(st.integers(0, 10_000), max_size=25),
    st.booleans(),
)
def test_any_text_gives_the_same_message_wherever_it_is_cut(
    dialect: Dialect, text: str, places: list[int], parallel: bool
) -> None:
    whole = joined(deltas_of(dialect, [text], parallel_tool_calls=parallel))
    deltas = deltas_of(dialect, cut(text, places), parallel_tool_calls=parallel)
    check_stream(deltas)
    message = joined(deltas)
    assert message["content"] == whole["content"]
    assert calls_of(message) == calls_of(whole)
    if not calls_of(whole):
        assert (whole["content"] or "") == text  # what is no call loses nothing


@pytest.mark.parametrize(
    ("dialect", "head"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": '),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": '),
        ("mistral_args", "[TOOL_CALLS]weather[ARGS]"),
        ("llama", '{"name": "weather", "parameters": '),
    ],
)
def test_arguments_come_as_they_are_written(dialect: Dialect, head: str) -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "tools": [WEATHER]})
    writer = MessageWriter(parser_for(request, request.tools or [], dialect), dialect=dialect)
    assert writer.push(head, None) == []
    (first, begun) = writer.push('{"ci', None)
    assert first["tool_calls"][0]["function"] == {"name": "weather", "arguments": ""}
    assert begun["tool_calls"] == [{"index": 0, "function": {"arguments": '{"ci'}}]
    (more,) = writer.push('ty": "', None)
    assert more["tool_calls"] == [{"index": 0, "function": {"arguments": 'ty": "'}}]


FORCED = f'[{{"name": "weather", "parameters": {QUOTED}}}, {{"name": "time", "parameters": {{}}}}]'


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(FORCED)), st.lists(st.integers(0, 10_000), max_size=25))
def test_forced_calls_that_are_cut_off_leave_no_content(length: int, places: list[int]) -> None:
    """Arguments end where the text does; of a call that has not come so far there is nothing."""
    text = FORCED[:length]
    deltas = deltas_of("hermes", cut(text, places), tool_choice="required")
    check_stream(deltas)
    message = joined(deltas)
    assert not message["content"]
    begun = [
        (name, arguments[: max(0, length - FORCED.index(arguments))])
        for name, arguments in (("weather", QUOTED), ("time", "{}"))
        if length > FORCED.index(arguments)
    ]
    assert calls_of(message) == begun


STRICT: dict[str, Any] = {"type": "function", "function": SHORT["function"] | {"strict": True}}
FREE: dict[str, Any] = {"type": "function", "function": {"name": "free", "strict": False}}
# Calls of `go` and of `free` as each dialect writes them, with these arguments.
WRITES: dict[Dialect, str] = {
    "hermes": 'so <tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call> and <tool_call>',
    "mistral": '[TOOL_CALLS][{{"name": "{}", "arguments": {}}}]',
    "mistral_args": "[TOOL_CALLS]{}{}",  # this tokenizer has no [ARGS]
    "llama": '{{"name": "{}", "parameters": {}}}; {{',
}
ARGS_TEMPLATE = TEMPLATES["mistral"].replace("[{{ f | tojson }}]", "{{ f.name }}[ARGS]{{ f.arguments | tojson }}")
PYTHONIC_TEMPLATE = TEMPLATES["mistral"].replace(
    "[TOOL_CALLS][{{ f | tojson }}]", "[{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v }}{% endfor %})]"
)


@pytest.fixture(scope="module")
def dialects(make_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    folder = make_folder(max_position_embeddings=2048)
    templates = {**TEMPLATES, "mistral_args": ARGS_TEMPLATE, "pythonic": PYTHONIC_TEMPLATE}
    # One engine, since a request may bring its template where it is trusted.
    model = with_template(folder, templates["hermes"], tmp_path_factory.mktemp("strict") / "model")
    engine = Engine.from_pretrained(str(model))
    state = ServerState(ServerSettings(model_name="small", trusts_request_template=True), engine, "ready")
    with listening(state) as running:
        yield {"running": running, **templates}  # type: ignore[dict-item]
    engine.shutdown()


@pytest.mark.parametrize("dialect", list(WRITES))
def test_strict_calls_are_held_to_their_schema(dialects: dict[str, Any], dialect: Dialect) -> None:
    parts = dialects["running"].state.engine.parts
    request = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "tools": [STRICT, FREE]})
    guided = forcing(request, request.tools or [], dialect, parts.tokenizer)
    assert guided is not None

    def stops_at(text: str) -> str | None:
        """What could not come next; None where all of it could."""
        matcher = parts.grammars.matcher(guided)
        for place, token in enumerate(parts.tokenizer.encode(text, add_special_tokens=False)):
            try:
                matcher.advance(token)
            except ValueError:
                return text[place:]
        return None

    for name, arguments in (("go", '{"to": "N"}'), ("free", '{"ab": [1, {}]}'), ("free", "{}")):
        assert stops_at(WRITES[dialect].format(name, arguments)) is None
    assert (stops_at(WRITES[dialect].format("go", '{"to": "W"}')) or "").startswith("W")
    assert (stops_at(WRITES[dialect].format("go", '{"x": 1}')) or "").startswith("x")
    assert (stops_at(WRITES[dialect].format("rm", "{}")) or "").startswith("rm")
    assert stops_at("plain text, with <a> [b] and {c}") is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_call_is_made_whole(dialects: dict[str, Any], stream: bool) -> None:
    running = dialects["running"]
    (brace,) = running.http.post("/tokenize", json={"prompt": "{", "add_special_tokens": False}).json()["tokens"]
    body = {
        "model": "small",
        "messages": MESSAGES,
        "tools": [STRICT],
        "chat_template": dialects["llama"],
        "max_tokens": 300,
        "stream": stream,
        "seed": 1,
        # A random model begins no call by itself; behind the brace the grammar has the word.
        "logit_bias": {str(brace): 100},
    }
    answer = running.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert sum("tool_calls" in delta for delta in deltas) > 5  # piece by piece
        message = joined(deltas)
    else:
        message = answer.json()["choices"][0]["message"]
    calls = calls_of(message)
    assert calls
    for name, arguments in calls:
        assert name == "go"
        assert json.loads(arguments)["to"] in ("N", "S")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "go"}}])
def test_forced_calls_end_where_max_tokens_does(dialects: dict[str, Any], choice: Any) -> None:
    running = dialects["running"]
    body = {"model": "small", "messages": MESSAGES, "tools": [SHORT], "tool_choice": choice, "seed": 1}
    before: Calls = []
    for max_tokens in range(1, 90, 6):
        limited = body | {"max_tokens": max_tokens}
        answer = running.http.post("/v1/chat/completions", json=limited).json()["choices"][0]
        assert not answer["message"]["content"]
        calls = calls_of(answer["message"])
        # What was there stays, and goes on.
        assert len(calls) >= len(before)
        for (name, arguments), (old_name, old) in zip(calls, before, strict=False):
            assert name == old_name == "go"
            assert arguments.startswith(old)
        before = calls
        stream = running.http.post("/v1/chat/completions", json=limited | {"stream": True})
        chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        message = joined([choice["delta"] for chunk in chunks for choice in chunk["choices"]])
        assert (message["content"] or None, calls_of(message)) == (answer["message"]["content"] or None, calls)
        assert chunks[-1]["choices"][0]["finish_reason"] == answer["finish_reason"]
        if answer["finish_reason"] == "length":
            continue
        assert answer["finish_reason"] == "tool_calls"
        assert all(json.loads(arguments)["to"] in ("N", "S") for _, arguments in calls)
    assert before


def test_strict_calls_in_python_are_refused_by_name(dialects: dict[str, Any]) -> None:
    body = {"model": "small", "messages": MESSAGES, "tools": [TIME, STRICT], "chat_template": dialects["pythonic"]}
    answer = dialects["running"].http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools.1.function.strict"


def test_allowed_tools(dialects: dict[str, Any]) -> None:
    running = dialects["running"]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [_named("go")]}}
    for seed in range(3):
        answer = running.client.chat.completions.create(
            model="small",
            messages=MESSAGES,
            tools=[TIME, SHORT],
            tool_choice=choice,
            seed=seed,
            parallel_tool_calls=False,
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "go"
    choice["allowed_tools"]["tools"] = [_named("rm")]  # type: ignore[index]
    body = {"model": "small", "messages": MESSAGES, "tools": [TIME], "tool_choice": choice}
    answer = running.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
