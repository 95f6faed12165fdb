"""Tool calls: the parsers, whole and cut anywhere; and through OpenAI's client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puna.engine.engine import Engine
from puna.engine.tokenizer import Tokenizer
from puna.serving.message import MessageWriter, joined
from puna.serving.protocol import ChatRequest
from puna.serving.state import ServerSettings, ServerState
from puna.serving.tools import Dialect, dialect_of, parser_for
from serving.conftest import Running, listening

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Lima", "Cusco"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"enum": [1, 2]}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
HEAD = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
TEMPLATES: dict[Dialect, str] = {
    "hermes": HEAD + EACH + "<tool_call>{{ f | tojson }}</tool_call>{% endfor %}" + TAIL,
    "mistral": HEAD + EACH + "[TOOL_CALLS][{{ f | tojson }}]{% endfor %}" + TAIL,
    "llama": HEAD + EACH + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }} }{% endfor %}' + TAIL,
}
NESTED = '{"city": null, "days": [-1, {"a": true}]}'
LIMA = '{"city": "Lima", "days": 2}'
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]

# dialect, text, content, calls
TEXTS: tuple[tuple[Dialect, str, str | None, list[tuple[str, str]]], ...] = (
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {LIMA}}}\n</tool_call>', None, [("weather", LIMA)]),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "time", "arguments": {}}</tool_call>\n'
        f'<tool_call>{{"name": "weather", "arguments": {LIMA}}}</tool_call>\n',
        "Let me see.",
        [("time", "{}"), ("weather", LIMA)],
    ),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}}', None, [("time", "{}")]),
    ("hermes", "a <tool_call>{broken</tool_call> b <tool", "a <tool_call>{broken</tool_call> b <tool", []),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {LIMA}}}]', None, [("weather", LIMA)]),
    ("mistral", "[TOOL] is no call", "[TOOL] is no call", []),
    ("llama", f'{{"name": "weather", "parameters": {LIMA}}}', None, [("weather", LIMA)]),
    (
        "llama",
        f'<|python_tag|>{{"name": "weather", "parameters": {LIMA}}}; {{"name": "time", "parameters": {{}}}}',
        None,
        [("weather", LIMA), ("time", "{}")],
    ),
    ("llama", '[weather(city="Lima", days=2), time()]', None, [("weather", LIMA), ("time", "{}")]),
    ("llama", "[weather(city=null, days=[-1, {'a': true}])]", None, [("weather", NESTED)]),
    ("llama", '[weather(city=__import__("os"))]', '[weather(city=__import__("os"))]', []),
    ("llama", '{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
    ("llama", "plain text", "plain text", []),
    ("llama", "[" * 5000, "[" * 5000, []),
)  # fmt: skip


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), TEXTS, ids=[f"{t[0]}-{t[1][:30]}" for t in TEXTS])
def test_texts(dialect: Dialect, text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "tools": [WEATHER, TIME]})
    if not calls:
        content = text  # whatever is no call of a known tool
    for size in (len(text), 1, 3, 7):
        writer = MessageWriter(parser_for(request, request.tools or [], dialect), dialect=dialect)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        deltas = [delta for piece in pieces for delta in writer.push(piece, None)] + writer.push("", "stop")
        message = joined(deltas)
        assert message["content"] == content
        found = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
        assert found == calls
        assert writer.finish_reason("stop") == ("tool_calls" if calls else "stop")
        assert writer.finish_reason("length") == "length"
        named = [call for delta in deltas for call in delta.get("tool_calls", []) if "id" in call]
        assert [call["index"] for call in named] == list(range(len(calls)))


def with_template(folder: Path, template: str, to: Path) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "tokenizer_config.json").read_text())
    (to / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return to


@pytest.mark.parametrize("dialect", list(TEMPLATES))
def test_dialects_are_told_from_templates(folder: Path, tmp_path: Path, dialect: Dialect) -> None:
    tokenizer = Tokenizer.from_pretrained(with_template(folder, TEMPLATES[dialect], tmp_path / "model"))
    assert tokenizer.chat_template is not None
    assert dialect_of(tokenizer.chat_template) == dialect
    plain = Tokenizer.from_pretrained(folder).chat_template
    assert plain is not None
    assert dialect_of(plain) is None


@pytest.fixture(scope="module")
def tool_server(make_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = make_folder(max_position_embeddings=2048)  # tools take some room
    model = with_template(folder, TEMPLATES["hermes"], tmp_path_factory.mktemp("tools") / "model")
    engine = Engine.from_pretrained(str(model))
    with listening(ServerState(ServerSettings(model_name="small"), engine, "ready")) as running:
        yield running
    engine.shutdown()


def create(running: Running, **options: Any) -> Any:
    return running.client.chat.completions.create(model="small", messages=MESSAGES, tools=[TIME, SHORT], **options)


BAD_DEFINITIONS = {"type": "function", "function": {"name": "a", "parameters": {"type": "object", "$defs": 5}}}
SHORT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "go",
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/p"}},
            "required": ["to"],
            "additionalProperties": False,
            "$defs": {"p": {"enum": ["N", "S"]}},
        },
    },
}


def streamed(chunks: Any) -> tuple[list[tuple[str, str]], str | None]:
    calls: list[list[str]] = []
    reason = None
    for chunk in chunks:
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(calls)
                    assert call.type == "function"
                    calls.append([call.function.name, ""])
                else:
                    assert call.function.name is None
                calls[call.index][1] += call.function.arguments
    return [(name, arguments) for name, arguments in calls], reason


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_as_its_schema_says(tool_server: Running, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "go"}}
    answer = create(tool_server, tool_choice=choice, stream=stream, seed=1)
    if stream:
        calls, reason = streamed(answer)
    else:
        found = answer.choices[0]
        calls, reason = [(c.function.name, c.function.arguments) for c in found.message.tool_calls], found.finish_reason
        assert found.message.content is None
    assert [name for name, _ in calls] == ["go"]
    assert json.loads(calls[0][1])["to"] in ("N", "S")
    assert reason == "tool_calls"


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_one_of_them(tool_server: Running, seed: int) -> None:
    options: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
    found = create(tool_server, **options).choices[0]
    (call,) = found.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "time" else arguments["to"] in ("N", "S")
    assert found.finish_reason == "tool_calls"
    calls, reason = streamed(create(tool_server, stream=True, **options))
    assert calls == [(call.function.name, call.function.arguments)]
    assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_auto_reads_what_the_model_writes(tool_server: Running, stream: bool) -> None:
    text = '<tool_call>{"name": "go", "arguments": {"to": "N"}}</tool_call>'
    for choice, expected in (("auto", [("go", '{"to": "N"}')]), ("none", [])):
        answer = create(tool_server, tool_choice=choice, stream=stream, extra_body={"guided_choice": [text]})
        if stream:
            calls, reason = streamed(answer)
        else:
            reason = answer.choices[0].finish_reason
            message = answer.choices[0].message
            calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
            assert message.content == (None if expected else text)
        assert calls == expected
        assert reason == ("tool_calls" if expected else "stop")


def test_the_results_go_back(tool_server: Running) -> None:
    call = create(tool_server, tool_choice={"type": "function", "function": {"name": "go"}}).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "done"}
    messages: list[Any] = [*MESSAGES, call, result]
    answer = tool_server.client.chat.completions.create(model="small", messages=messages, max_tokens=3)
    assert answer.choices[0].message.content is not None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [BAD_DEFINITIONS], "tool_choice": "required"}, "$defs"),
        ({"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
def test_bad_tools(tool_server: Running, fields: dict[str, Any], name: str) -> None:
    answer = tool_server.http.post("/v1/chat/completions", json={"model": "small", "messages": MESSAGES} | fields)
    assert answer.status_code == 400, answer.text
    assert name in answer.text


def test_templates_without_tools_refuse_them(server: Any) -> None:
    body = {"model": "small", "messages": MESSAGES, "tools": [TIME]}
    for path, fields in (("/v1/chat/completions", body), ("/tokenize", {"messages": MESSAGES, "tools": [TIME]})):
        answer = server.http.post(path, json=fields)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "tools"


def test_tokens_of_conversations_with_tools(tool_server: Running) -> None:
    counts = []
    for tools in ([], [TIME], [TIME, SHORT]):
        found = tool_server.http.post("/tokenize", json={"messages": MESSAGES, "tools": tools}).json()
        answer = tool_server.client.chat.completions.create(
            model="small", messages=MESSAGES, max_tokens=1, extra_body={"tools": tools, "return_token_ids": True}
        )
        assert found["tokens"] == answer.prompt_token_ids  # type: ignore[attr-defined]
        counts.append(found["count"])
    assert counts == sorted(set(counts))
