"""Guided decoding through LLM.generate: whatever the model would rather write, the text keeps to what was asked."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from puna.llm import LLM
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams
from puna.scheduling.scheduler import Scheduler

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob", "eve"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"(ab|cd){2,4}-[0-9]{3}"
GRAMMAR = """
root ::= term (" + " term){1,3}
term ::= digit | "(" root ")"
digit ::= [0-9]
"""
CHOICES = ["red", "reddish", "blue", "a longer choice, with spaces"]
# Keeps a random model from writing strings without end. Printable ASCII is 2 + its code - 33.
CLOSING = {2 + ord(character) - 33: 6.0 for character in '"}]'}


def guided(count: int, n: int = 1, **constraint: Any) -> list[SamplingParams]:
    return [
        SamplingParams(guided=GuidedDecoding(**constraint), max_tokens=120, seed=10 * i, n=n, temperature=1.2)
        for i in range(count)
    ]


def run(llm: LLM, params: list[SamplingParams]) -> list[list[str]]:
    """The texts, by request; all must have come to their end of sequence."""
    outputs = llm.generate(["write: "] * len(params), params)
    for output in outputs:
        for completion in output.outputs:
            assert completion.finish_reason == "stop"
            assert completion.stop_reason is None
            assert completion.token_ids[-1] in (1, 40, 90)
            assert completion.text == llm.decode(completion.token_ids[:-1])
    return [[completion.text for completion in output.outputs] for output in outputs]


def is_sum(text: str) -> bool:
    """GRAMMAR by hand: two to four terms, each a digit or such a sum in parentheses."""
    while True:
        shorter = re.sub(r"\(\d(?: \+ \d){1,3}\)", "0", text)
        if shorter == text:
            return re.fullmatch(r"\d(?: \+ \d){1,3}", text) is not None
        text = shorter


@pytest.mark.parametrize("n", [1, 4])
def test_json_schema(llm: LLM, n: int) -> None:
    as_mapping = run(llm, guided(8, n, json_schema=SCHEMA))
    for text in (text for texts in as_mapping for text in texts):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len({text for texts in as_mapping for text in texts}) > 6 * n
    assert run(llm, guided(8, n, json_schema=json.dumps(SCHEMA))) == as_mapping


def test_json_object(llm: LLM) -> None:
    params = [
        SamplingParams(
            guided=GuidedDecoding(json_object=True), max_tokens=250, seed=i, temperature=0.7, logit_bias=CLOSING
        )
        for i in range(12)
    ]
    outputs = [output.outputs[0] for output in llm.generate(["x"] * 12, params)]
    complete = [output.text for output in outputs if output.finish_reason == "stop"]
    assert len(complete) > 6
    for text in complete:
        assert isinstance(json.loads(text), dict)
    assert all(output.text.startswith("{") for output in outputs)


@pytest.mark.parametrize("n", [1, 3])
def test_regex(llm: LLM, n: int) -> None:
    texts = [text for texts in run(llm, guided(12, n, regex=REGEX)) for text in texts]
    assert all(re.fullmatch(REGEX, text) for text in texts)
    assert len(set(texts)) > len(texts) // 2


def test_choice(llm: LLM) -> None:
    texts = [text for (text,) in run(llm, guided(60, choice=CHOICES))]
    assert set(texts) == set(CHOICES)


@pytest.mark.parametrize("n", [1, 3])
def test_grammar(llm: LLM, n: int) -> None:
    outputs = llm.generate(["1 + "] * 12, guided(12, n, grammar=GRAMMAR))
    completions = [completion for output in outputs for completion in output.outputs]
    complete = [completion.text for completion in completions if completion.finish_reason == "stop"]
    assert len(complete) > len(completions) // 3  # the others are in parentheses within parentheses
    assert all(is_sum(text) for text in complete)
    assert any("(" in text for text in complete)


def test_greedy_takes_the_likeliest_that_is_allowed(llm: LLM) -> None:
    params = SamplingParams(guided=GuidedDecoding(regex="[a-f]{3}"), temperature=0, logprobs=0, max_tokens=8)
    (output,) = llm.generate("hello", params)
    whole: list[int] = []
    letters = [2 + ord(letter) - 33 for letter in "abcdef"]
    for _ in range(3):
        scores = {
            letter: llm.score({"prompt_token_ids": output.prompt_token_ids + whole}, [letter]).logprob
            for letter in letters
        }
        whole.append(max(letters, key=scores.__getitem__))
    assert output.outputs[0].token_ids[:3] == whole
    assert output.outputs[0].finish_reason == "stop"


def test_guided_among_free_ones_in_a_tight_cache(llm: LLM, tight_llm: LLM) -> None:
    """Preemption and chunks do not lose the place in the grammar, and leave their neighbours alone."""
    params = guided(10, regex=REGEX) + [SamplingParams(seed=i, max_tokens=30, ignore_eos=True) for i in range(10)]
    prompts = [{"prompt_token_ids": [5 + i] * (10 + 3 * i)} for i in range(20)]
    expected = llm.generate(prompts, params)
    found = tight_llm.generate(prompts, params)
    assert tight_llm.engine.parts.scheduler.num_preemptions > 0
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    assert all(re.fullmatch(REGEX, output.outputs[0].text) for output in found[:10])


def test_other_params_hold_within_the_grammar(llm: LLM) -> None:
    a, b = (2 + ord(letter) - 33 for letter in "ab")
    constraint = GuidedDecoding(regex="[ab]{4,}")

    def text(**params: Any) -> str:
        (output,) = llm.generate("x", SamplingParams(guided=constraint, max_tokens=8, temperature=0, **params))
        return output.outputs[0].text

    assert text(logit_bias={a: 100.0}) == "a" * 8
    assert text(logit_bias={b: 100.0}) == "b" * 8
    assert text(logit_bias={a: 100.0}, stop=["aaa"]) == ""
    assert text(logit_bias={a: 100.0}, no_repeat_ngram_size=2)[:2] == "aa"
    assert set(text(bad_words=["a"])) == {"b"}
    eos_is_likely = {1: 100.0, 40: 100.0, 90: 100.0}
    assert len(text(logit_bias=eos_is_likely)) == 4  # not before the grammar is complete
    assert len(text(logit_bias=eos_is_likely, min_tokens=6)) == 6


def _plans_once_idle(scheduler: Scheduler) -> int:
    """How many plans were made, when the last of the requests before has been cleared away."""
    while True:
        plans = scheduler._num_plans
        time.sleep(0.05)
        if plans == scheduler._num_plans and not scheduler.has_work:
            return plans


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"regex": "(ab"}, "cannot be compiled|regex"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": {"type": "no such type"}}, "cannot be compiled"),
        ({"grammar": "start: x"}, "the grammar"),
        ({"grammar": "root ::= missing"}, "'missing', which has no rule"),
        ({"choice": ["x" * 10**6]}, "more than the"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_runs(
    llm: LLM, constraint: dict[str, Any], words: str
) -> None:
    scheduler = llm.engine.parts.scheduler
    params = [SamplingParams(max_tokens=1), SamplingParams(guided=GuidedDecoding(**constraint))]
    before = _plans_once_idle(scheduler)
    with pytest.raises(ValueError, match=words):
        llm.generate(["bad", "good"], list(reversed(params)))
    assert scheduler._num_plans == before
    with pytest.raises(ValueError, match=words):  # the good one is cancelled
        llm.generate(["good", "bad"], params)
    assert llm.generate("good", SamplingParams(max_tokens=1))[0].finished


def test_exactly_one_constraint_and_an_end() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        GuidedDecoding(regex="a", choice=["b"])
    with pytest.raises(ValueError, match="exactly one"):
        GuidedDecoding()
    with pytest.raises(ValueError, match="choice is"):
        GuidedDecoding(choice=[])
    with pytest.raises(ValueError, match="ignore_eos"):
        SamplingParams(guided=GuidedDecoding(regex="a"), ignore_eos=True)
