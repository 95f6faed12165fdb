"""Tool calls: how a model's template writes them, what forces them, and their way from text to calls."""

from __future__ import annotations

import ast
import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from puna.engine.tokenizer import Tokenizer
from puna.scheduling.sampling_params import GuidedDecoding
from puna.serving.errors import bad_request
from puna.serving.protocol import ChatRequest, Tool

# hermes: <tool_call>{"name", "arguments"}</tool_call>, as Qwen has it. mistral: [TOOL_CALLS][{"name", "arguments"}].
# llama: {"name", "parameters"} alone or after <|python_tag|>, several with ; between; or [name(key=value)], as Python.
Dialect = Literal["hermes", "mistral", "llama"]
_PROBE: Final = "puna_probe"
_CALL_OPEN: Final = "<tool_call>"
_CALL_CLOSE: Final = "</tool_call>"
_MISTRAL: Final = "[TOOL_CALLS]"
_PYTHON_TAG: Final = "<|python_tag|>"
_MOST_CHARS: Final = 200_000  # of a text that is read as Python


@dataclass(frozen=True, slots=True)
class Call:
    """`arguments` is JSON, as OpenAI has it."""

    name: str
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What a piece of text brought: what is content, and calls that are complete."""

    content: str = ""
    calls: list[Call] = field(default_factory=list)


class ToolParser(Protocol):
    """Takes a text piece by piece; the joined results do not depend on how it is cut."""

    def push(self, text: str) -> Parsed: ...
    def flush(self) -> Parsed: ...


def dialect_of(tokenizer: Tokenizer) -> Dialect | None:
    """From what the chat template writes for a call of the past; None where it knows no tools."""
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
    user = {"role": "user", "content": "x"}
    call = {"id": "abc123def", "type": "function", "function": {"name": _PROBE, "arguments": {"key": "value"}}}
    try:
        offered = tokenizer.render_chat([user], [tool])
        if _PROBE not in offered:
            return None
    except ValueError:
        return None
    try:
        called = tokenizer.render_chat(
            [user, {"role": "assistant", "content": "", "tool_calls": [call]}], [tool], False
        )
    except ValueError:
        called = offered  # what it tells the model of the format must do
    if _CALL_OPEN in called:
        return "hermes"
    return "mistral" if _MISTRAL in called else "llama"


def offered_tools(request: ChatRequest) -> list[Tool]:
    """The tools that the model may call. Raises ApiError for a choice among tools that are not there."""
    choice, tools = request.tool_choice, request.tools or []
    if not tools and choice not in (None, "none"):
        raise bad_request("tool_choice needs tools", "tool_choice")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("two of the tools have the same name", "tools")
    if request.named_tool is not None and request.named_tool not in names:
        raise bad_request(f"tool_choice names {request.named_tool!r}, which is none of the tools", "tool_choice")
    if choice == "none":
        return []
    if not request.forces_tools:
        strict = next((i for i, tool in enumerate(tools) if tool.function.strict), None)
        if strict is not None:
            place = f"tools.{strict}.function.strict"
            raise bad_request(
                f"{place}: arguments are held to their schema only where tool_choice forces a call", place
            )
    return tools


def forcing(request: ChatRequest, tools: list[Tool]) -> GuidedDecoding | None:
    """What makes the model call: the arguments of the named tool, or a list of calls of any."""
    if not request.forces_tools:
        return None
    if request.named_tool is not None:
        (tool,) = (tool for tool in tools if tool.function.name == request.named_tool)
        return GuidedDecoding(json_schema=tool.function.schema_)
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        schema = dict(tool.function.schema_)
        for key in ("$defs", "definitions"):
            for name, definition in schema.pop(key, {}).items():
                if definitions.setdefault(key, {}).setdefault(name, definition) != definition:
                    raise bad_request(f"two of the tools define {name!r} differently: name one otherwise", "tools")
        call = {"name": {"const": tool.function.name}, "parameters": schema}
        calls.append(
            {"type": "object", "properties": call, "required": ["name", "parameters"], "additionalProperties": False}
        )
    most = {"maxItems": 1} if request.parallel_tool_calls is False else {}
    return GuidedDecoding(
        json_schema={"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, **definitions}
    )


def parser_for(request: ChatRequest, tools: list[Tool], dialect: Dialect | None) -> ToolParser | None:
    """For one answer. A named tool needs none: the text is its arguments."""
    if not tools or request.named_tool is not None:
        return None
    names = frozenset(tool.function.name for tool in tools)
    found: ToolParser
    if request.tool_choice == "required":
        found = _WholeParser(("[",), names)
    elif dialect == "hermes":
        found = _HermesParser(names)
    else:
        found = _WholeParser((_MISTRAL,) if dialect == "mistral" else ("{", "[", _PYTHON_TAG), names)
    return _FirstOnly(found) if request.parallel_tool_calls is False else found


def call_id(dialect: Dialect | None) -> str:
    """Mistral's templates insist on nine letters and digits."""
    return uuid.uuid4().hex[:9] if dialect == "mistral" else f"call_{uuid.uuid4().hex[:24]}"


class _HermesParser:
    """Calls between tags, with text before and after. What stands there and is no call stays content, tags included.

    White space beside a call is none of the content.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        self._has_call = False

    def push(self, text: str) -> Parsed:
        self._held += text
        found = Parsed()
        while True:
            before, opening, rest = self._held.partition(_CALL_OPEN)
            if not opening:
                sure = self._held[: len(self._held) - _overlap(self._held, _CALL_OPEN)].rstrip()
                found.content += sure
                self._held = self._held[len(sure) :]
                return found
            inside, closing, after = rest.partition(_CALL_CLOSE)
            if not closing:
                return found
            calls = _json_calls(inside, self._names)
            found.content += before.rstrip() if calls else before + opening + inside + closing
            found.calls += calls
            self._has_call = self._has_call or bool(calls)
            self._held = after

    def flush(self) -> Parsed:
        # Some models leave out the last tag.
        before, _, inside = self._held.partition(_CALL_OPEN)
        calls = _json_calls(inside, self._names)
        held, self._held = self._held, ""
        if calls:
            return Parsed(before.rstrip(), calls)
        return Parsed(held.rstrip() if self._has_call else held)


class _WholeParser:
    """A text that begins with one of `starts` is calls or content as a whole, which shows at its end."""

    def __init__(self, starts: tuple[str, ...], names: frozenset[str]) -> None:
        self._starts = starts
        self._names = names
        self._held = ""
        self._is_content = False

    def push(self, text: str) -> Parsed:
        if self._is_content:
            return Parsed(text)
        self._held += text
        begin = self._held.lstrip()
        if any(begin.startswith(start) or start.startswith(begin) for start in self._starts):
            return Parsed()
        self._is_content = True
        held, self._held = self._held, ""
        return Parsed(held)

    def flush(self) -> Parsed:
        held, self._held = self._held, ""
        text = held.strip().removeprefix(_MISTRAL).removeprefix(_PYTHON_TAG)
        calls = _json_calls(text, self._names) or _python_calls(text, self._names)
        return Parsed("" if calls else held, calls)


class _FirstOnly:
    """parallel_tool_calls false: the calls after the first one are dropped."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser
        self._has_call = False

    def push(self, text: str) -> Parsed:
        return self._cut(self._parser.push(text))

    def flush(self) -> Parsed:
        return self._cut(self._parser.flush())

    def _cut(self, parsed: Parsed) -> Parsed:
        kept = [] if self._has_call else parsed.calls[:1]
        self._has_call = self._has_call or bool(kept)
        return Parsed(parsed.content, kept)


def _overlap(text: str, mark: str) -> int:
    """How much of the text's end may be the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _json_calls(text: str, names: frozenset[str]) -> list[Call]:
    """Objects or lists of them, with ; or white space between. Empty where anything else is found."""
    decoder, position, values = json.JSONDecoder(), 0, list[Any]()
    text = text.strip()
    try:
        while position < len(text):
            value, position = decoder.raw_decode(text, position)
            values += value if isinstance(value, list) else [value]
            while position < len(text) and text[position] in "; \n\t\r":
                position += 1
    except (ValueError, RecursionError):
        return []
    calls = []
    for value in values:
        arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
        if not isinstance(value, dict) or value.get("name") not in names or not isinstance(arguments, dict | str):
            return []
        text_of = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(Call(value["name"], text_of))
    return calls


def _python_calls(text: str, names: frozenset[str]) -> list[Call]:
    """[name(key=value, ...), ...] with literals; nothing is ever run."""
    if len(text) > _MOST_CHARS:
        return []
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        calls = []
        for node in tree.elts:
            if not isinstance(node, ast.Call) or node.args or ast.unparse(node.func) not in names:
                return []
            given = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
            if len(given) < len(node.keywords):
                return []
            calls.append(Call(ast.unparse(node.func), json.dumps(given, ensure_ascii=False, allow_nan=False)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
    return calls


def _literal(node: ast.expr) -> Any:
    """Python's literals, and JSON's names for three of them. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in node.keys):
            raise ValueError("keys of JSON are texts")
        return {
            ast.literal_eval(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key
        }
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("not a value of JSON")
    return value
