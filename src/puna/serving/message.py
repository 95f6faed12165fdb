"""MessageWriter: an answer's text as deltas of a message (reasoning, content, tool calls); and deltas joined again."""

from __future__ import annotations

from typing import Any

from puna.serving.reasoning import Reasoning, ReasoningSplitter
from puna.serving.tool_parsers import Arguments, CallStart, Content, Event, ToolParser
from puna.serving.tools import Dialect, call_id


class MessageWriter:
    """For one answer. The joined deltas do not depend on how the text is cut.

    Without a parser, and without the name of a tool that was forced, all text but the reasoning is content.
    `shows_reasoning` false leaves the reasoning out; `only_one_call` the calls behind the first.
    """

    def __init__(
        self,
        parser: ToolParser | None = None,
        *,
        named_tool: str | None = None,
        dialect: Dialect | None = None,
        reasoning: Reasoning | None = None,
        shows_reasoning: bool = True,
        only_one_call: bool = False,
    ) -> None:
        self._parser = parser
        self._named_tool = named_tool
        self._dialect = dialect
        self._splitter = None if reasoning is None else ReasoningSplitter(reasoning)
        self._shows_reasoning = shows_reasoning
        self._only_one_call = only_one_call
        self._num_calls = 0

    def push(self, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        """The deltas that this text brings; with a `finish_reason` also those of what was held back."""
        deltas: list[dict[str, Any]] = []
        reasoning = ""
        if self._splitter is not None:
            reasoning, text = self._splitter.push(text)
            if finish_reason is not None:
                last, rest = self._splitter.flush()
                reasoning, text = reasoning + last, text + rest
        if reasoning and self._shows_reasoning:
            deltas.append(_reasoning_fields(reasoning))
        events: list[Event] = [Content(text)] if text else []
        if self._named_tool is not None:
            start = [CallStart(self._named_tool)] if text and not self._num_calls else []
            events = [*start, Arguments(text)] if text else []
        elif self._parser is not None:
            events = self._parser.push(text)
            if finish_reason is not None:
                events += self._parser.flush()
        for event in events:
            self._add(event, deltas)
        return deltas

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def message(self, deltas: list[dict[str, Any]]) -> dict[str, Any]:
        """What the deltas join to, for an answer that is not streamed."""
        message = joined(deltas)
        if self._splitter is not None and self._splitter.was_reasoning:
            message["content"] = message["content"] or None
        if self._splitter is not None and self._shows_reasoning:
            message = {**_reasoning_fields(None), **message}
        return message

    def _add(self, event: Event, deltas: list[dict[str, Any]]) -> None:
        last = deltas[-1] if deltas else {}
        if isinstance(event, Content):
            if "content" in last:
                last["content"] += event.text
            else:
                deltas.append({"content": event.text})
            return
        if isinstance(event, CallStart):
            self._num_calls += 1
        if self._only_one_call and self._num_calls > 1:
            return
        index = self._num_calls - 1
        if isinstance(event, CallStart):
            head = {"name": event.name, "arguments": ""}
            call = {"index": index, "id": call_id(self._dialect), "type": "function", "function": head}
        else:
            call = {"index": index, "function": {"arguments": event.text}}
        deltas.append({"tool_calls": [call]})


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's deltas are."""
    content = "".join(delta.get("content", "") for delta in deltas)
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls[part["index"]] = {key: value for key, value in part.items() if key != "index"}
                calls[part["index"]]["function"] = dict(part["function"])
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if calls or reasoning:
        message["content"] = content or None
    if calls:
        message["tool_calls"] = list(calls.values())
    return message | (_reasoning_fields(reasoning) if reasoning else {})


def _reasoning_fields(text: str | None) -> dict[str, Any]:
    """Under both names: DeepSeek's, and the one that vLLM has now. Clients read one or the other."""
    return {"reasoning_content": text, "reasoning": text}
