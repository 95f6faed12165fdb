"""Answers as the makers of the models write them down, Meta, Mistral, Qwen and DeepSeek: read alike in every cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from puna.serving.message import MessageWriter
from puna.serving.protocol import ChatRequest
from puna.serving.reasoning import Reasoning
from puna.serving.tools import Dialect, parser_for
from serving.test_tools import MESSAGES, TIME, WEATHER

LIMA = '{"city": "Lima"}'
LLAMA = '{"city": "São Paulo 🦙", "note": "a \\"b\\" ]}; [TOOL_CALLS] </tool_call>", "n": [-1.5e3, {"x": null}]}'
OPENED, MAYBE = Reasoning("<think>", "</think>", True), Reasoning("<think>", "</think>", False)
MAGISTRAL = Reasoning("[THINK]", "[/THINK]", False)
W, T = "weather", "time"

# dialect, the template's marks of reasoning, text, reasoning, content, calls
ANSWERS: tuple[tuple[Dialect | None, Reasoning | None, str, str | None, str | None, list[tuple[str, Any]]], ...] = (
    # DeepSeek-R1 and its distills, whose template ends with <think>, and the first one, which did not
    (None, OPENED, "Okay, so 1 < 2.\n\nHmm.\n</think>\n\n**2** is more.", "Okay, so 1 < 2.\n\nHmm.",
     "**2** is more.", []),
    (None, OPENED, "\n</think>\n\nYes.", None, "Yes.", []),
    (None, OPENED, "\n\n</think>\n\n\\boxed{4}\n", None, "\\boxed{4}\n", []),
    (None, OPENED, "I think that <think> is a tag, é 🦙", "I think that <think> is a tag, é 🦙", None, []),
    (None, MAYBE, "<think>\n\n</think>\n\nHi! 🦙", None, "Hi! 🦙", []),
    (None, MAYBE, "<think>\nOkay.\n</think>\n\nHi!", "Okay.", "Hi!", []),
    # Qwen3: thinking, then calls between tags; and with enable_thinking false, when the prompt has closed the block
    ("hermes", MAYBE, f'<think>\nThe user asks.\n</think>\n\n<tool_call>\n{{"name": "weather", "arguments": {LIMA}}}\n'
     "</tool_call>", "The user asks.", None, [(W, LIMA)]),
    ("hermes", MAYBE, '<think>\nSo.\n</think>\n\nLet me look.\n\n<tool_call>\n'
     f'{{"name": "weather", "arguments": {LLAMA}}}\n</tool_call>\n'
     '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', "So.", "Let me look.",
     [(W, LLAMA), (T, "{}")]),
    ("hermes", None, f'<tool_call>\n{{"name": "weather", "arguments": {LLAMA}}}\n</tool_call>', None, None,
     [(W, LLAMA)]),
    ("hermes", OPENED, 'Is it <tool_call>?\n</think>\n\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
     "Is it <tool_call>?", None, [(T, "{}")]),
    # Hermes 2 Pro writes the arguments first
    ("hermes", None, f'<tool_call>\n{{"arguments": {LIMA}, "name": "weather"}}\n</tool_call>', None, None, [(W, LIMA)]),
    # Llama 3.1 and 3.2, JSON: with and without the tag and the type, several in a row, spread over lines
    ("llama", None, f'{{"name": "weather", "parameters": {LIMA}}}', None, None, [(W, LIMA)]),
    ("llama", None, f'<|python_tag|>{{"name": "weather", "parameters": {LLAMA}}}', None, None, [(W, LLAMA)]),
    ("llama", None, f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {LIMA}}}', None, None,
     [(W, LIMA)]),
    ("llama", None, f'{{"type": "function", "function": "x", "name": "weather", "parameters": {LIMA}}}', None, None,
     [(W, LIMA)]),
    ("llama", None, f'{{"name": "weather", "parameters": {LIMA}}}; {{"name": "time", "parameters": {{}}}}', None, None,
     [(W, LIMA), (T, "{}")]),
    ("llama", None, f'<|python_tag|>{{"name": "weather", "parameters": {LIMA}}}\n<|python_tag|>{{"name": "time", '
     '"parameters": {}}', None, None, [(W, LIMA), (T, "{}")]),
    ("llama", None, '\n\n{\n  "name": "weather",\n  "parameters": {\n    "city": "Lima"\n  }\n}', None, None,
     [(W, '{\n    "city": "Lima"\n  }')]),
    # What calls nothing that was offered is text: Meta's built-in tools, its tags for functions, an answer in JSON
    ("llama", None, '<|python_tag|>brave_search.call(query="llamas")', None,
     '<|python_tag|>brave_search.call(query="llamas")', []),
    ("llama", None, f"<function=weather>{LIMA}</function>", None, f"<function=weather>{LIMA}</function>", []),
    ("llama", None, '{"name": "Anna", "parameters": {}}', None, '{"name": "Anna", "parameters": {}}', []),
    # Llama 3.2, Python
    ("pythonic", None, "[weather(city='Lima'), time()]", None, None, [(W, LIMA), (T, "{}")]),
    ("pythonic", None, "\n[\n    weather(city='a)] \\'b', days=[1, -2.5, {'x': None}], now=True),\n]\n", None, None,
     [(W, json.dumps({"city": "a)] 'b", "days": [1, -2.5, {"x": None}], "now": True}))]),
    ("pythonic", None, "[weather(city=open('/etc/passwd'))]", None, "[weather(city=open('/etc/passwd'))]", []),
    ("pythonic", None, "[1, 2] are numbers", None, "[1, 2] are numbers", []),
    # Mistral: tokenizers v3 (a list, a space before it) and v7 (none, with ids), v11 (name, id, arguments), v13 (no id)
    ("mistral", None, f'[TOOL_CALLS] [{{"name": "weather", "arguments": {LLAMA}}}]', None, None, [(W, LLAMA)]),
    ("mistral", None, f'[TOOL_CALLS] [{{"name": "weather", "arguments": {LIMA}}}, {{"name": "time", '
     '"arguments": {}}]', None, None, [(W, LIMA), (T, "{}")]),
    ("mistral", None, f'[TOOL_CALLS][{{"name": "weather", "arguments": {LIMA}, "id": "VvvODy9mT"}}]', None, None,
     [(W, LIMA)]),
    ("mistral", None, f'I will look. [TOOL_CALLS][{{"id": "VvvODy9mT", "name": "weather", "arguments": {LIMA}}}]', None,
     "I will look.", [(W, LIMA)]),
    ("mistral_args", None, f"[TOOL_CALLS]weather[CALL_ID]VvvODy9mT[ARGS]{LLAMA}", None, None, [(W, LLAMA)]),
    ("mistral_args", None, f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{LIMA}[TOOL_CALLS]time"
     "[CALL_ID]f6g7h8i9j[ARGS]{}", None, None, [(W, LIMA), (T, "{}")]),
    ("mistral_args", None, f"[TOOL_CALLS]weather[ARGS]{LIMA}[TOOL_CALLS]time[ARGS]{{}}", None, None,
     [(W, LIMA), (T, "{}")]),
    ("mistral_args", None, f"Wait.[TOOL_CALLS]weather[ARGS]{LLAMA}", None, "Wait.", [(W, LLAMA)]),
    ("mistral_args", MAGISTRAL, f"[THINK]Is it [ARGS]?[/THINK]Well.[TOOL_CALLS]weather[ARGS]{LIMA}", "Is it [ARGS]?",
     "Well.", [(W, LIMA)]),
)  # fmt: skip


def read(dialect: Dialect | None, marks: Reasoning | None, pieces: list[str]) -> tuple[Any, Any, list[tuple[str, str]]]:
    request = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "tools": [WEATHER, TIME]})
    parser = parser_for(request, request.tools or [], dialect) if dialect else None
    writer = MessageWriter(parser, dialect=dialect, reasoning=marks)
    message = writer.message(
        [delta for piece in pieces for delta in writer.push(piece, None)] + writer.push("", "stop")
    )
    assert message.get("reasoning") == message.get("reasoning_content")
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return message.get("reasoning"), message["content"], [(one["name"], one["arguments"]) for one in functions]


@pytest.mark.parametrize(
    ("dialect", "marks", "text", "reasoning", "content", "calls"),
    ANSWERS,
    ids=[f"{answer[0]}-{number}" for number, answer in enumerate(ANSWERS)],
)
def test_every_cut(
    dialect: Dialect | None,
    marks: Reasoning | None,
    text: str,
    reasoning: str | None,
    content: str | None,
    calls: list[tuple[str, str]],
) -> None:
    expected = (reasoning, content, calls)
    assert read(dialect, marks, [text]) == expected
    assert read(dialect, marks, list(text)) == expected
    for size in (2, 3, 5, 7):
        assert read(dialect, marks, [text[at : at + size] for at in range(0, len(text), size)]) == expected
    for first in range(len(text) + 1):
        assert read(dialect, marks, [text[:first], text[first:]]) == expected
        assert read(dialect, marks, [text[:first], text[first : first + 4], text[first + 4 :]]) == expected
    for _, arguments in calls:
        json.loads(arguments)
