"""Reasoning: how a chat template marks it, and its way from text to a message's field of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from puna.engine.chat_template import ChatTemplate
from puna.engine.detokenizer import Detokenizer
from puna.engine.tokenizer import Tokenizer
from puna.scheduling.sampling_params import Mark, ReasoningMarks
from puna.serving.tool_parsers import overlap

# What DeepSeek R1, Qwen3 and many after them write around it, and what Mistral does.
_PAIRS: Final = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The marks of one answer's reasoning. `is_open`: the prompt ends with `begin`, so the text begins in it."""

    begin: str
    end: str
    is_open: bool

    @classmethod
    def of(cls, template: ChatTemplate, prompt: str, continued: str | None) -> Reasoning | None:
        """None where the template marks none, or the prompt says that there is to be none.

        `prompt` is what the template wrote; `continued` the last message's text, where that is to be gone on with.
        """
        for begin, end in _PAIRS:
            if not template.mentions(end):
                continue
            written = prompt.rstrip()
            if continued is not None:
                opened, closed = continued.rfind(begin), continued.rfind(end)
                return cls(begin, end, True) if opened > closed or written.endswith(begin) else None
            if written.endswith(end):
                return None
            return cls(begin, end, written.endswith(begin))
        return None

    def marks(self, tokenizer: Tokenizer) -> ReasoningMarks:
        begin, end = mark_of(self.begin, tokenizer), mark_of(self.end, tokenizer)
        return ReasoningMarks(begin=begin, end=end, is_open=self.is_open)

    def count(self, token_ids: Sequence[int], prompt: Sequence[int], tokenizer: Tokenizer) -> int:
        """How many of an answer's tokens are reasoning, with its marks."""
        splitter, text = ReasoningSplitter(self), Detokenizer(tokenizer, skip_special_tokens=False)
        for token_id in prompt[-8:]:  # which decide how the first token reads
            text.push(token_id)
        for number, token_id in enumerate(token_ids):
            splitter.push(text.push(token_id))
            if splitter.is_over:
                return number + 1 if splitter.was_reasoning else 0
        return len(token_ids) if splitter.was_reasoning else 0


def mark_of(text: str, tokenizer: Tokenizer) -> Mark:
    """The mark's token where that is a special one."""
    token_id = tokenizer.token_to_id(text)
    return token_id if token_id is not None and token_id in tokenizer.special_ids else text


class ReasoningSplitter:
    """For one answer: takes a text piece by piece and tells its reasoning from the rest, cut as it may be.

    Reasoning comes first or not at all. White space around it, and before the rest, is none of either.
    """

    def __init__(self, reasoning: Reasoning) -> None:
        self._marks = reasoning
        self._held = ""
        self._has_text = False  # of where it is now
        self.was_reasoning = reasoning.is_open
        self._may_begin = True
        self.is_over = False

    def push(self, text: str) -> tuple[str, str]:
        """The text's reasoning and its rest, as far as they are sure."""
        self._held += text
        if self._may_begin:
            self._begin()
        reasoning = self._inside() if not (self._may_begin or self.is_over) else ""
        return reasoning, self._rest() if self.is_over else ""

    def flush(self) -> tuple[str, str]:
        """What was held back, since no more text comes."""
        held, self._held = self._held, ""
        if self.is_over or not self.was_reasoning:
            return "", held
        return (held.rstrip() if self._has_text else held.strip()), ""

    def _begin(self) -> None:
        """Past the mark. Some models write it though their prompt ends with it."""
        text, begin = self._held.lstrip(), self._marks.begin
        if text.startswith(begin):
            self._held = text[len(begin) :]
            self.was_reasoning = True
        elif begin.startswith(text):  # it may yet become one
            return
        elif not self.was_reasoning:
            self.is_over = self._has_text = True
        self._may_begin = False

    def _inside(self) -> str:
        text, mark, after = self._held.partition(self._marks.end)
        sure = text if mark else text[: len(text) - overlap(text, self._marks.end)]
        told = sure.rstrip()  # white space at its end may yet have text behind it
        self._held = after if mark else text[len(told) :]
        if not self._has_text:
            told = told.lstrip()
        self.is_over = bool(mark)
        self._has_text = not mark and (self._has_text or bool(told))
        return told

    def _rest(self) -> str:
        held = self._held if self._has_text else self._held.lstrip()
        self._has_text = self._has_text or bool(held)
        self._held = ""
        return held
