"""MessageWriter: an answer's text as deltas of a message, content and tool calls; and deltas joined to a message."""

from __future__ import annotations

from typing import Any

from puna.serving.tools import Call, Dialect, Parsed, ToolParser, call_id


class MessageWriter:
    """For one answer. Without a parser, and without the name of a tool that was forced, all text is content."""

    def __init__(self, parser: ToolParser | None, named_tool: str | None, dialect: Dialect | None) -> None:
        self._parser = parser
        self._named_tool = named_tool
        self._dialect = dialect
        self._num_calls = 0

    def push(self, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        """The deltas that this text brings; with a `finish_reason` also those of what was held back."""
        if self._named_tool is not None:
            deltas = [] if self._num_calls else self._call(Call(self._named_tool, ""))
            return [*deltas, {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else deltas
        if self._parser is None:
            return [{"content": text}] if text else []
        deltas = self._of(self._parser.push(text))
        return deltas if finish_reason is None else [*deltas, *self._of(self._parser.flush())]

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _of(self, parsed: Parsed) -> list[dict[str, Any]]:
        deltas = [{"content": parsed.content}] if parsed.content else []
        return deltas + [delta for call in parsed.calls for delta in self._call(call)]

    def _call(self, call: Call) -> list[dict[str, Any]]:
        """Its name, then its arguments."""
        index = self._num_calls
        self._num_calls += 1
        head = {"name": call.name, "arguments": ""}
        first = {"index": index, "id": call_id(self._dialect), "type": "function", "function": head}
        rest = {"index": index, "function": {"arguments": call.arguments}}
        return [{"tool_calls": [first]}, *([{"tool_calls": [rest]}] if call.arguments else [])]


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of an answer that is not streamed."""
    content = "".join(delta.get("content", "") for delta in deltas)
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls[part["index"]] = {**part, "function": dict(part["function"])}
                del calls[part["index"]]["index"]
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message |= {"content": content or None, "tool_calls": list(calls.values())}
    return message
