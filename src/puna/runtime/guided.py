"""Guided decoding: schemas, regular expressions, EBNF grammars and choices compiled to masks over the vocabulary.

The matching is llguidance's (docs/guided_decoding.md says why), an optional package. This file decides what is let
through to it, and sees to it that anything that cannot be held to is an error before a token is sampled.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from puna.runtime.ebnf import Grammar
from puna.runtime.guided_spans import after_reasoning, lark_literal, lark_mark, spans_lark
from puna.scheduling.sampling_params import GuidedDecoding, GuidedSpans, ReasoningMarks

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Without forcing, every token that fits is allowed; with it, only the one that llguidance takes for canonical.
_HEADER = '%llguidance {"no_forcing": true}\n'
# One space, or a line break with its indentation: a model may write JSON on one line or indented, but it cannot
# lose itself in endless white space.
_JSON_WHITESPACE = r"( |\r?\n[ \t]{0,64})"
# Not \u: the same text in two spellings would get a property's name past the schema, and half a surrogate pair is no
# text at all.
_JSON_ESCAPES = 'nrbtf\\"'
_CONTROL = re.compile(r"\\u00(?:[01][0-9a-f]|7f)")
_KEYS_TO_SCHEMAS = frozenset(["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
_KEYS_TO_DATA = frozenset(["enum", "const", "default", "examples", "required", "type"])


class UnenforceableError(ValueError):
    """A constraint that is written well and that cannot be held to: unsatisfiable, or of a kind that is not known."""


@dataclass(frozen=True, kw_only=True)
class GuidedLimits:
    """What is refused as too large; a server's callers may send anything.

    schema_bytes: of the schema as JSON. regex_length, grammar_length: characters. choices: how many.
    choice_bytes: of all of them together. cached_grammars: how many compiled ones are kept, the latest used.
    """

    schema_bytes: int = 256 * 1024
    regex_length: int = 16 * 1024
    grammar_length: int = 64 * 1024
    choices: int = 10_000
    choice_bytes: int = 256 * 1024
    cached_grammars: int = 64


class _Vocabulary:
    """What llguidance reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("grammars are matched without forcing, which needs no tokenizer")


@dataclass(frozen=True)
class _Backend:
    """llguidance, with a vocabulary."""

    library: Any
    tokenizer: LLTokenizer
    limits: LLParserLimits


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the latest ones. Safe to use from several threads.

    token_bytes: for each id its bytes, None for a special token; grammars never allow those. vocab_size: of the logits,
    which may be more than there are tokens. eos_token_ids: the tokens that end a text.
    Costs nothing until the first grammar comes, which loads llguidance and tells it the vocabulary (half a second for
    128k tokens).
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes | None],
        eos_token_ids: Collection[int],
        vocab_size: int,
        limits: GuidedLimits | None = None,
    ) -> None:
        self.limits = limits or GuidedLimits()
        self._token_bytes = token_bytes
        self._eos = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._backend: _Backend | None = None
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, guided: GuidedDecoding) -> CompiledGrammar:
        """Takes from a millisecond to some hundred for the largest schemas; a kept one is looked up.

        Raises ValueError, saying what is wrong, for what is too large, is malformed, uses something that cannot be
        enforced, or that no text of this vocabulary can begin to fulfil; and if llguidance is not installed.
        """
        with self._lock:
            if self._backend is None:
                self._backend = self._load()
            backend = self._backend
        lark = self._to_lark(guided, backend)
        with self._lock:
            compiled = self._cache.get(lark)
            if compiled is not None:
                self._cache.move_to_end(lark)
                return compiled
        # Not under the lock: what others have asked for need not wait for it.
        compiled = self._compile(lark, backend)
        with self._lock:
            self._cache[lark] = compiled
            while len(self._cache) > self.limits.cached_grammars:
                self._cache.popitem(last=False)
        return compiled

    def matcher(self, guided: GuidedDecoding) -> Matcher:
        """A matcher at the start of a grammar, for one sequence. Raises ValueError as `compile` does."""
        return self.compile(guided).matcher()

    def _load(self) -> _Backend:
        try:
            import llguidance
        except ImportError as error:
            raise ValueError("guided decoding needs llguidance: pip install 'puna[guided]'") from error
        eos, vocab_size = sorted(self._eos), self._vocab_size
        if not eos or eos[0] < 0 or eos[-1] >= vocab_size:
            raise ValueError(f"eos_token_ids are {eos}: guided decoding needs at least one, within 0..{vocab_size - 1}")
        if any(self._token_bytes[vocab_size:]):
            raise ValueError(
                f"the tokenizer has {len(self._token_bytes)} tokens and the model only {vocab_size}: take the "
                "tokenizer that belongs to it"
            )
        tokens: list[bytes] = []
        special = []
        for token_id in range(vocab_size):
            token = self._token_bytes[token_id] if token_id < len(self._token_bytes) else None
            if token_id in self._eos or not token:
                special.append(token_id)
                token = b"<%d>" % token_id
            tokens.append(token)
        vocabulary: Any = _Vocabulary(tokens, special, eos[0])
        return _Backend(
            llguidance,
            llguidance.LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=eos),
            llguidance.LLParserLimits(verbose_errors=False),
        )

    def _compile(self, lark: str, backend: _Backend) -> CompiledGrammar:
        matcher = backend.library.LLMatcher(backend.tokenizer, _HEADER + lark, log_level=0, limits=backend.limits)
        if matcher.is_error():
            # Schemas are read before they come here; of the others this is where their spelling shows.
            kind = UnenforceableError if "%json" in lark else ValueError
            raise kind(f"the grammar cannot be compiled: {_first_lines(matcher.get_error())}")
        compiled = CompiledGrammar(matcher, self._eos, self._vocab_size)
        # The first mask finds grammars that allow nothing, and warms the state that all matchers share.
        try:
            compiled.matcher().fill_bitmask(torch.empty(compiled.num_words, dtype=torch.int32))
        except ValueError as error:
            raise UnenforceableError(
                "the grammar allows no text at all, or none that this vocabulary can spell"
            ) from error
        return compiled

    def _to_lark(self, guided: GuidedDecoding, backend: _Backend) -> str:
        if guided.spans is not None:
            return self._spans_lark(guided.spans, guided.reasoning)
        lark = self._body_lark(guided, backend)
        return lark if guided.reasoning is None else after_reasoning(guided.reasoning, lark)

    def _spans_lark(self, spans: GuidedSpans, reasoning: ReasoningMarks | None) -> str:
        bodies = []
        for marks, schema in spans.bodies:
            checked = _checked_schema(schema, self.limits.schema_bytes)
            bodies.append(" ".join([*map(lark_mark, marks), _json(checked)]))
        return spans_lark(spans, bodies, reasoning)

    def _body_lark(self, guided: GuidedDecoding, backend: _Backend) -> str:
        if guided.json_object:
            return "start: " + _json({"type": "object"})
        if guided.json_schema is not None:
            return "start: " + _json(_checked_schema(guided.json_schema, self.limits.schema_bytes))
        if guided.regex is not None:
            _check_size("regex", len(guided.regex), self.limits.regex_length, "characters")
            return f"start: /{backend.library.regex_to_lark(_without_anchors(guided.regex), '')}/"
        if guided.grammar is not None:
            _check_size("grammar", len(guided.grammar), self.limits.grammar_length, "characters")
            return Grammar.parse(guided.grammar).to_lark()
        choices = list(dict.fromkeys(guided.choice or ()))
        _check_size("choice", len(choices), self.limits.choices, "texts")
        _check_size("choice", sum(len(text.encode()) for text in choices), self.limits.choice_bytes, "bytes")
        return "start: CHOICE\nCHOICE: " + " | ".join(map(lark_literal, choices))


class CompiledGrammar:
    """What `GrammarCompiler.compile` returns: makes a matcher for each text."""

    def __init__(self, prototype: LLMatcher, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._prototype = prototype
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size

    @property
    def num_words(self) -> int:
        """Of a bitmask."""
        return (self.vocab_size + 31) // 32

    def matcher(self) -> Matcher:
        return Matcher(self, self._prototype.deep_copy())


class Matcher:
    """Where one text is in its grammar. Made by `CompiledGrammar.matcher`; not to be shared between threads."""

    def __init__(self, grammar: CompiledGrammar, matcher: LLMatcher) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._has_ended = False

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Writes which tokens are allowed next: int32 [ceil(vocab_size / 32)] on the CPU, bit i % 32 of word i // 32.

        Raises ValueError for another tensor, and where the grammar has got stuck: no token can go on, or it is too
        complex here to say which ones can.
        """
        if (
            row.shape != (self._grammar.num_words,)
            or row.dtype != torch.int32
            or row.device.type != "cpu"
            or not row.is_contiguous()
        ):
            raise ValueError(
                f"the bitmask is {row.dtype} {list(row.shape)} on {row.device}: it must be contiguous int32 "
                f"[{self._grammar.num_words}] on the CPU"
            )
        self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
        # After an error llguidance's mask allows the end of the text; that would be unfinished text.
        if self._matcher.is_error():
            raise ValueError(
                "guided decoding is stuck: no token of this vocabulary fits the grammar here, or it is too complex "
                f"({_first_lines(self._matcher.get_error()) or self._matcher.stop_reason()})"
            )

    def advance(self, token_id: int) -> None:
        """Takes the token that was sampled. Raises ValueError, and stays where it is, if it is not allowed here."""
        if self._has_ended:
            raise ValueError(f"token {token_id} comes after the end of a guided text")
        if token_id in self._grammar.eos_token_ids:
            if not self._matcher.is_accepting():
                raise ValueError(f"token {token_id} would end a guided text before it is complete")
            self._has_ended = True
        # llguidance breaks down for good over ids out of range.
        elif not 0 <= token_id < self._grammar.vocab_size or self._matcher.try_consume_tokens([token_id]) != 1:
            raise ValueError(f"token {token_id} is not allowed here by the grammar")

    def copy(self) -> Matcher:
        """An independent matcher at the same place, for a sequence that is forked."""
        copied = Matcher(self._grammar, self._matcher.deep_copy())
        copied._has_ended = self._has_ended
        return copied

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the text may come now, or it has come. As costly as a mask."""
        if self._has_ended or not self._matcher.is_accepting():
            return self._has_ended
        row = torch.empty(self._grammar.num_words, dtype=torch.int32)
        self.fill_bitmask(row)
        allowed = sum(int(word).bit_count() for word in row[row != 0].to(torch.int64).bitwise_and(0xFFFFFFFF))
        return allowed == len(self._grammar.eos_token_ids)


def _check_size(name: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise ValueError(f"guided {name} has {size} {unit}, more than the {limit} allowed")


def _first_lines(error: str) -> str:
    """llguidance's message without the grammar that it quotes, which is our translation and no one wrote."""
    error = error.replace("<non-verbose/>", "")
    lines = [line for line in error.splitlines() if line.strip() and not re.match(r"\s*(\d+ \||\^)", line)]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", line).strip() for line in lines)[:500]


def _without_anchors(regex: str) -> str:
    """Without '^' first and '$' last, which say nothing where the whole text must match."""
    regex = regex.removeprefix("^")
    body = regex.removesuffix("$")
    is_escaped = (len(body) - len(body.rstrip("\\"))) % 2 == 1
    return regex if is_escaped else body


def _json(schema: Mapping[str, Any]) -> str:
    options = {"whitespace_pattern": _JSON_WHITESPACE, "json_allowed_escapes": _JSON_ESCAPES}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _checked_schema(schema: str | Mapping[str, Any], max_bytes: int) -> Mapping[str, Any]:
    """The schema as it was written, in the order of its properties, free of what llguidance would not hold to."""
    if isinstance(schema, str):
        _check_size("json_schema", len(schema.encode("utf-8", "replace")), max_bytes, "bytes")
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from error
    _check_size("json_schema", len(text), max_bytes, "bytes")
    if not isinstance(value, Mapping):
        raise ValueError(f"json_schema is {text[:100]}: it must be an object")
    for part in _subschemas(value):
        if "x-guidance" in part:
            raise ValueError("json_schema has 'x-guidance', which could turn checks off: leave it out")
        least = part.get("minProperties", 0)
        required = part.get("required", [])
        # Names of further properties may repeat, and a repeated one counts only once.
        if (
            isinstance(least, (int, float))
            and isinstance(required, list)
            and least > max(1, len(set(map(str, required))))
        ):
            raise ValueError(
                f"json_schema has minProperties {least}, which cannot be enforced beyond the required properties: "
                "name them in 'required'"
            )
    if _CONTROL.search(text):
        raise ValueError(
            "json_schema has control characters in a name, a value or a pattern: only \\n, \\r, \\t, \\b and \\f can "
            "be written in guided JSON"
        )
    return value


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, Mapping):
            yield part
            for key, value in part.items():
                if key in _KEYS_TO_SCHEMAS and isinstance(value, Mapping):
                    waiting += value.values()
                elif key not in _KEYS_TO_DATA:
                    waiting.append(value)
