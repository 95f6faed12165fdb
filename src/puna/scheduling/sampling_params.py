"""SamplingParams: what a caller may ask of one generation, under the names that vLLM made common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    # A function of (token ids so far, logits [V]) that returns the logits to use; the tensor is torch's.
    LogitsProcessor = Callable[[Sequence[int], Any], Any]

MAX_LOGPROBS = 1000
_WHOLE_NUMBERS: Final = (
    "n",
    "top_k",
    "no_repeat_ngram_size",
    "seed",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
)


# What stands in a text to tell its parts apart: characters, or the id of a special token, which has none.
Mark = str | int


@dataclass(frozen=True, kw_only=True)
class ReasoningMarks:
    """Around reasoning, which comes before a text's constraint holds. `is_open`: the prompt has written `begin`."""

    begin: Mark
    end: Mark
    is_open: bool


@dataclass(frozen=True, kw_only=True)
class GuidedSpans:
    """Free text in which spans are constrained, such as calls of functions.

    A span follows a `begin` and is one of `bodies`, each with marks that stand before it and the schema of its JSON;
    `end` stands behind it. Where `begin` is None a text is either spans, with semicolons between, or free and then it
    does not begin with a brace.
    """

    begin: Mark | None
    bodies: Sequence[tuple[Sequence[Mark], Mapping[str, Any]]]
    end: Mark | None = None


@dataclass(frozen=True, kw_only=True)
class GuidedDecoding:
    """A constraint on the text: exactly one of a JSON schema, any JSON object, a regex, an EBNF grammar, a choice or
    spans. With `reasoning`, such a block may come first (and must, where it is open).

    Raises ValueError unless exactly one is given; whether it can be compiled is checked when the request is added.
    """

    json_schema: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    spans: GuidedSpans | None = None
    reasoning: ReasoningMarks | None = None

    def __post_init__(self) -> None:
        given = (self.json_schema, self.json_object or None, self.regex, self.grammar, self.choice, self.spans)
        if sum(value is not None for value in given) != 1:
            raise ValueError("guided decoding takes exactly one of json_schema, json_object, regex, grammar and choice")
        if self.choice is not None and (not self.choice or isinstance(self.choice, str) or "" in self.choice):
            raise ValueError(f"choice is {self.choice!r}: give a list of texts, none of them empty")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. Raises ValueError, naming the field, for values out of range.

    n: sequences for each prompt. temperature: 0 is greedy. top_k 0 or -1, top_p 1, min_p 0, typical_p 1,
    no_repeat_ngram_size 0, repetition_penalty 1, presence_penalty 0, frequency_penalty 0: off.
    repetition_penalty counts prompt and output, presence and frequency penalties the output alone.
    seed: the same seed gives the same tokens, whatever else runs; None draws one from the engine's.
    max_tokens: None means as many as the context holds. min_tokens: before that many, nothing may end the text.
    stop: texts before which the output ends; stop_token_ids: tokens that end it, and are not part of the text.
    logprobs: how many of the likeliest tokens to report beside the chosen one (0: that one alone); prompt_logprobs
    the same for the prompt. They are those of the model, before penalties and temperature.
    logit_bias: added to the logits of tokens. bad_words: texts that must not appear; allowed_token_ids: all others
    may not.
    logits_processors: functions (token ids so far, logits [V]) -> logits [V], applied after penalties and bans, before
    the grammar and temperature.
    guided: a constraint on the text. echo: the prompt's text stands before the output's.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    guided: GuidedDecoding | None = None
    skip_special_tokens: bool = True
    echo: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            # A fraction would be found out in the middle of a step, which others share.
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{name} is {value!r}: it must be a whole number")
        ranges = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 (off) or above"),
            ("min_p", 0 <= self.min_p <= 1, "in 0..1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in -2..2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in -2..2"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or above"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "in 0..max_tokens"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts, none of them empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"in 0..{MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"in 0..{MAX_LOGPROBS}",
            ),
            ("allowed_token_ids", self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "not empty"),
            ("bad_words", not isinstance(self.bad_words, str) and "" not in self.bad_words, "a list of texts"),
            ("logit_bias", all(-100 <= bias <= 100 for bias in self.logit_bias.values()), "in -100..100 each"),
        )
        for name, holds, wanted in ranges:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {wanted}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n is {self.n} with temperature 0: all would be the same, so raise the temperature")
        if self.guided is not None and self.ignore_eos:
            raise ValueError(
                "ignore_eos is set with guided: the end of sequence is what ends a guided text, so leave it out"
            )
