"""Tool calls: how a model's template writes them, which are offered, and what holds the model to their schemas."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, Final, Literal

from puna.engine.chat_template import ChatTemplate
from puna.engine.tokenizer import Tokenizer
from puna.scheduling.sampling_params import GuidedDecoding, GuidedSpans, Mark
from puna.serving.errors import bad_request
from puna.serving.protocol import ChatRequest, Tool
from puna.serving.reasoning import mark_of
from puna.serving.tool_parsers import (
    ARGS,
    CALL_CLOSE,
    CALL_OPEN,
    TOOL_CALLS,
    ForcedParser,
    HermesParser,
    LlamaParser,
    MistralParser,
    ToolParser,
)

# hermes: <tool_call>{"name", "arguments"}</tool_call>, as Qwen has it. mistral: [TOOL_CALLS][{"name", "arguments"}];
# mistral_args: [TOOL_CALLS]name[ARGS]{...}, its later way. llama: {"name", "parameters"} alone or after <|python_tag|>,
# several with ; between. pythonic: [name(key=value)].
Dialect = Literal["hermes", "mistral", "mistral_args", "llama", "pythonic"]
_PROBE: Final = "puna_probe"


def dialect_of(template: ChatTemplate) -> Dialect | None:
    """From what the chat template writes for a call of the past; None where it knows no tools."""
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
    user = {"role": "user", "content": "x"}
    call = {"id": "abc123def", "type": "function", "function": {"name": _PROBE, "arguments": {"key": "value"}}}
    try:
        offered = template.render([user], [tool])
        if _PROBE not in offered:
            return None
    except ValueError:
        return None
    try:
        called = template.render([user, {"role": "assistant", "content": "", "tool_calls": [call]}], [tool], False)
    except ValueError:
        called = offered  # what it tells the model of the format must do
    if CALL_OPEN in called:
        return "hermes"
    if TOOL_CALLS in called:
        return "mistral_args" if TOOL_CALLS + _PROBE in called else "mistral"
    return "pythonic" if f"[{_PROBE}(" in called else "llama"


async def tools_dialect(template: ChatTemplate) -> Dialect:
    """Raises ApiError where the template knows no tools."""
    found = await asyncio.to_thread(dialect_of, template)
    if found is None:
        raise bad_request("this model's chat template knows no tools: leave them out", "tools")
    return found


def as_for_template(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_none=True) for tool in tools] or None


def offered_tools(request: ChatRequest) -> list[Tool]:
    """The tools that the model may call. Raises ApiError for a choice among tools that are not there."""
    choice, tools = request.tool_choice, request.tools or []
    if not tools and choice not in (None, "none"):
        raise bad_request("tool_choice needs tools", "tool_choice")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("two of the tools have the same name", "tools")
    allowed = request.allowed_tools
    chosen = allowed if request.named_tool is None else (request.named_tool,)
    unknown = next((name for name in chosen or () if name not in names), None)
    if unknown is not None:
        raise bad_request(f"tool_choice names {unknown!r}, which is none of the tools", "tool_choice")
    if choice == "none":
        return []
    return tools if allowed is None else [tool for tool in tools if tool.function.name in allowed]


def forcing(
    request: ChatRequest, tools: list[Tool], dialect: Dialect | None, tokenizer: Tokenizer
) -> GuidedDecoding | None:
    """What makes the model call, or holds calls to their schemas: the arguments of the named tool, a list of calls of
    any, or, where one of the tools is strict, free text with such calls in it."""
    if not tools:
        return None
    if request.named_tool is not None:
        (tool,) = (tool for tool in tools if tool.function.name == request.named_tool)
        return GuidedDecoding(json_schema=tool.function.schema_)
    if request.forces_tools:
        calls, definitions = _call_schemas(tools, "parameters")
        most = {"maxItems": 1} if request.parallel_tool_calls is False else {}
        return GuidedDecoding(
            json_schema={"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, **definitions}
        )
    strict = next((tool.function.name for tool in tools if tool.function.strict), None)
    if strict is None:
        return None
    if dialect == "pythonic":
        place = f"tools.{[tool.function.name for tool in request.tools or []].index(strict)}.function.strict"
        raise bad_request(
            f"{place}: this model writes its calls as Python, which no schema describes: leave it out, or have "
            "tool_choice force a call",
            place,
        )
    return GuidedDecoding(spans=_spans(tools, dialect, tokenizer))


def _spans(tools: list[Tool], dialect: Dialect | None, tokenizer: Tokenizer) -> GuidedSpans:
    if dialect == "mistral_args":
        # Some of its tokenizers have no such mark between name and arguments.
        args = [mark_of(ARGS, tokenizer)] if tokenizer.token_to_id(ARGS) is not None else []
        named = [((tool.function.name, *args), _arguments_schema(tool)) for tool in tools]
        return GuidedSpans(begin=mark_of(TOOL_CALLS, tokenizer), bodies=named)
    calls, definitions = _call_schemas(tools, "parameters" if dialect == "llama" else "arguments")
    body: dict[str, Any] = {"anyOf": calls, **definitions}
    if dialect == "mistral":
        body = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **definitions}
    bodies: list[tuple[tuple[Mark, ...], dict[str, Any]]] = [((), body)]
    if dialect == "hermes":
        return GuidedSpans(begin=mark_of(CALL_OPEN, tokenizer), bodies=bodies, end=mark_of(CALL_CLOSE, tokenizer))
    return GuidedSpans(begin=mark_of(TOOL_CALLS, tokenizer) if dialect == "mistral" else None, bodies=bodies)


def _call_schemas(tools: list[Tool], key: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of each tool's calls, and the definitions that they share, which belong to the root."""
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for tool in tools:
        schema = dict(_arguments_schema(tool))
        for where in ("$defs", "definitions"):
            shared = schema.pop(where, {})
            if not isinstance(shared, dict):
                raise bad_request(f"{where} of the tool {tool.function.name!r} is no object of schemas", "tools")
            for name, definition in shared.items():
                if definitions.setdefault(where, {}).setdefault(name, definition) != definition:
                    raise bad_request(f"two of the tools define {name!r} differently: name one otherwise", "tools")
        call = {"name": {"const": tool.function.name}, key: schema}
        calls.append({"type": "object", "properties": call, "required": ["name", key], "additionalProperties": False})
    return calls, definitions


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    return {"type": "object"} if tool.function.strict is False else tool.function.schema_


def needs_special_tokens(dialect: Dialect | None, tokenizer: Tokenizer) -> bool:
    """Whether the marks of calls are special tokens, which then must show in the text."""
    if dialect == "hermes":
        return isinstance(mark_of(CALL_OPEN, tokenizer), int)
    return dialect is not None


def parser_for(request: ChatRequest, tools: list[Tool], dialect: Dialect | None) -> ToolParser | None:
    """For one answer. A named tool needs none: the text is its arguments."""
    if not tools or request.named_tool is not None:
        return None
    names = frozenset(tool.function.name for tool in tools)
    if request.forces_tools:
        return ForcedParser(names)
    if dialect == "hermes":
        return HermesParser(names)
    if dialect in ("mistral", "mistral_args"):
        return MistralParser(names)
    # Strict calls are JSON: nothing would hold those in Python to their schemas.
    return LlamaParser(names, pythonic=not any(tool.function.strict for tool in tools))


def call_id(dialect: Dialect | None) -> str:
    """Mistral's templates insist on nine letters and digits."""
    is_mistral = dialect in ("mistral", "mistral_args")
    return uuid.uuid4().hex[:9] if is_mistral else f"call_{uuid.uuid4().hex[:24]}"
