"""Constraints that hold only behind reasoning, or in spans: which texts they let through, where they stop others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from puna.runtime.guided import GrammarCompiler, UnenforceableError
from puna.scheduling.sampling_params import GuidedDecoding, GuidedSpans, Mark, ReasoningMarks

pytest.importorskip("llguidance", reason="needs the extra `guided`")

NUM_SPECIAL, EOS = 6, 1
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"json_schema": SCHEMA},
    {"regex": r'\{"a":1\}'},
    {"choice": ['{"a":1}', "b"]},
    {"grammar": 'root ::= x\nx ::= "{" "\\"a\\":1" "}"'},
)
# Written out, and as special tokens, which have no text.
THINK: tuple[tuple[Mark, Mark], ...] = (("<think>", "</think>"), (2, 3))
CALL: tuple[tuple[Mark, Mark], ...] = (("<tool_call>", "</tool_call>"), (4, 5))
BEFORE_END = "hm {"


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokens = [*[None] * NUM_SPECIAL, *(bytes([i]) for i in range(256))]
    return GrammarCompiler(tokens, [EOS], len(tokens))


def state(compiler: GrammarCompiler, guided: GuidedDecoding, *text: Mark) -> str:
    """complete, open, or the text that was let through up to where it was stopped."""
    matcher = compiler.compile(guided).matcher()
    taken = b""
    for part in text:
        for token in [part] if isinstance(part, int) else [NUM_SPECIAL + byte for byte in part.encode()]:
            try:
                matcher.advance(token)
            except ValueError:
                return taken.decode()
            taken += b"" if isinstance(part, int) else bytes([token - NUM_SPECIAL])
    try:
        matcher.advance(EOS)
    except ValueError:
        return "open"
    return "complete"


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=[next(iter(c)) for c in CONSTRAINTS])
@pytest.mark.parametrize(("begin", "end"), THINK)
def test_the_constraint_holds_behind_reasoning(
    compiler: GrammarCompiler, constraint: dict[str, Any], begin: Mark, end: Mark
) -> None:
    opened = GuidedDecoding(**constraint, reasoning=ReasoningMarks(begin=begin, end=end, is_open=True))
    for text in ((BEFORE_END, end, '\n\n{"a":1}'), (end, '{"a":1}')):
        assert state(compiler, opened, *text) == "complete"
    assert state(compiler, opened, BEFORE_END) == "open"
    assert state(compiler, opened, BEFORE_END, end, "x").startswith(BEFORE_END)
    offered = GuidedDecoding(**constraint, reasoning=ReasoningMarks(begin=begin, end=end, is_open=False))
    for text in ((begin, BEFORE_END, end, '\n\n{"a":1}'), ('{"a":1}',)):
        assert state(compiler, offered, *text) == "complete"
    assert state(compiler, offered, begin, "x") == "open"
    assert state(compiler, offered, "x") == ""


@pytest.mark.parametrize(("open_", "close"), CALL)
@pytest.mark.parametrize("think", [None, *THINK])
@pytest.mark.parametrize("is_open", [False, True])
def test_spans_are_held_to_their_schema(
    compiler: GrammarCompiler, open_: Mark, close: Mark, think: tuple[Mark, Mark] | None, is_open: bool
) -> None:
    reasoning = None if think is None else ReasoningMarks(begin=think[0], end=think[1], is_open=is_open)
    guided = GuidedDecoding(spans=GuidedSpans(begin=open_, bodies=[((), SCHEMA)], end=close), reasoning=reasoning)
    thoughts: tuple[Mark, ...] = ()
    if think is not None:
        # A call in there is none; and a special token can't come there.
        called = open_ if isinstance(open_, str) else ""
        thoughts = (*(() if is_open else (think[0],)), "hm ", called, '{"b"', think[1])
    heads = [thoughts] if is_open else [(), thoughts]
    for head in heads:
        assert state(compiler, guided, *head) == "complete"
        assert state(compiler, guided, *head, "text <") == "complete"
        call: tuple[Mark, ...] = (open_, '\n{"a": 1}\n', close)
        assert state(compiler, guided, *head, "see", *call, " so ", *call) == "complete"
        for before in ((), call):
            assert state(compiler, guided, *head, *before, " x ", open_, '{"b"').endswith('{"')
        assert state(compiler, guided, *head, open_, '{"a"') == "open"


@pytest.mark.parametrize("args", ["[ARGS]", 2])
def test_bodies_have_marks_of_their_own(compiler: GrammarCompiler, args: Mark) -> None:
    bodies = [(("f", args), SCHEMA), (("g", args), {"type": "object"})]
    guided = GuidedDecoding(spans=GuidedSpans(begin=4, bodies=bodies))
    assert state(compiler, guided, "hi", 4, "f", args, '{"a":1}', 4, "g", args, '{"b":3}') == "complete"
    assert state(compiler, guided, 4, "f", args, '{"b"').endswith('{"')
    assert state(compiler, guided, 4, "x") == ""


@pytest.mark.parametrize("think", [None, *THINK])
def test_spans_that_are_the_whole_text(compiler: GrammarCompiler, think: tuple[Mark, Mark] | None) -> None:
    reasoning = None if think is None else ReasoningMarks(begin=think[0], end=think[1], is_open=False)
    guided = GuidedDecoding(spans=GuidedSpans(begin=None, bodies=[((), SCHEMA)]), reasoning=reasoning)
    heads: list[Sequence[Mark]] = [()] if think is None else [(), (think[0], '{"b"', think[1])]
    for head in heads:
        for text in ("", ' {"a":1}', '{"a":1}; {"a":2}', "hello {"):
            assert state(compiler, guided, *head, text) == "complete"
        assert state(compiler, guided, *head, '\n {"b"').endswith('{"')


@pytest.mark.parametrize(
    "schema",
    [{"type": "integer", "minimum": 5, "maximum": 3}, {"type": "nothing"}, {"type": "array", "uniqueItems": True}],
)
def test_well_written_and_impossible(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    with pytest.raises(UnenforceableError):
        compiler.compile(GuidedDecoding(json_schema=schema))
    for malformed in (GuidedDecoding(regex="["), GuidedDecoding(json_schema="{"), GuidedDecoding(grammar="x")):
        with pytest.raises(ValueError, match=r"regex|JSON|line 1") as error:
            compiler.compile(malformed)
        assert not isinstance(error.value, UnenforceableError)
