"""Texts that are constrained in parts: after a block of reasoning, or only in spans between marks; as Lark rules."""

from __future__ import annotations

import json
import re

from puna.scheduling.sampling_params import GuidedSpans, Mark, ReasoningMarks

# Any text at all, and what may stand around a mark.
_ANY = r"(.|\n)*"
_SPACE = r"SPACE: /[ \t\r\n]{0,16}/"


def lark_literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def lark_mark(mark: Mark) -> str:
    return f"<[{mark}]>" if isinstance(mark, int) else lark_literal(mark)


def after_reasoning(marks: ReasoningMarks, lark: str) -> str:
    """The grammar `lark` behind a block of reasoning."""
    before = "reasoning SPACE" if marks.is_open else f"({lark_mark(marks.begin)} reasoning SPACE)?"
    return "\n".join([f"start: {before} body", *_until("reasoning", marks.end), _SPACE, f"body: %lark {{\n{lark}\n}}"])


def spans_lark(spans: GuidedSpans, bodies: list[str], reasoning: ReasoningMarks | None) -> str:
    """`bodies`: one rule for each of the spans' bodies."""
    lines = [f"body_{i}: {body}" for i, body in enumerate(bodies)] + [_SPACE]
    end = "" if spans.end is None else f" SPACE {lark_mark(spans.end)}"
    lines.append(f"span: SPACE ({' | '.join(f'body_{i}' for i in range(len(bodies)))}){end}")
    begins = [] if reasoning is None or isinstance(reasoning.begin, int) else [_escaped(reasoning.begin) + _ANY]
    if spans.begin is None:
        plain = [_unless(rf"[ \t\r\n]*\{{{_ANY}")]
        after, first = 'span (SPACE ";" span)* SPACE | AFTER', 'span (SPACE ";" span)* SPACE | FIRST'
        lines.append(f"AFTER: /{_ANY}/{plain[0]}")
        lines.append(f"FIRST: /{_ANY}/{''.join(plain + list(map(_unless, begins)))}")
    else:
        no_span = "" if isinstance(spans.begin, int) else _unless(_ANY + _escaped(spans.begin) + _ANY)
        refused = "".join(map(_unless, begins))
        after, first = "(text span)* AFTER", "(head span (text span)* AFTER) | FIRST"
        lines += _until("text", spans.begin) + _until("head", spans.begin, refused)
        lines += [f"AFTER: /{_ANY}/{no_span}", f"FIRST: /{_ANY}/{no_span}{refused}"]
    if reasoning is None:
        starts = [f"start: {after}"]
    elif reasoning.is_open:
        starts = ["start: reasoning after", f"after: {after}", *_until("reasoning", reasoning.end)]
    else:
        starts = [
            f"start: {lark_mark(reasoning.begin)} reasoning after | first",
            f"after: {after}",
            f"first: {first}",
            *_until("reasoning", reasoning.end),
        ]
    return "\n".join(starts + lines)


def _until(name: str, mark: Mark, unless: str = "") -> list[str]:
    """A rule for any text up to the mark and with it; a text that `unless` matches is none."""
    if isinstance(mark, int):  # no expression of characters matches a special token
        return [f"{name}: {name.upper()} {lark_mark(mark)}", f"{name.upper()}: /{_ANY}/{unless}"]
    return [f"{name}[lazy]: {name.upper()}", f"{name.upper()}: /{_ANY}{_escaped(mark)}/{unless}"]


def _unless(pattern: str) -> str:
    return f" & ~/{pattern}/"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
