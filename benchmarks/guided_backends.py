"""xgrammar and llguidance side by side: compile time, mask time on a 128k vocabulary, and what they make of schemas.

Run: python benchmarks/guided_backends.py [FOLDER OF TEXTS]. A library that is not installed is left out; every library
gets one thread. The vocabulary is made here: byte-level BPE trained on the texts, filled up with generated tokens.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers

from puna.runtime.guided import GrammarCompiler, GuidedLimits
from puna.scheduling.sampling_params import GuidedDecoding

VOCAB_SIZE = 128_000
WORDS = (VOCAB_SIZE + 31) // 32


def make_vocabulary(folder: Path) -> list[bytes]:
    """VOCAB_SIZE different tokens; all single bytes are among them."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise ValueError(f"no .txt files in {folder}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=26_000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = {chr(byte): byte for byte in printable}
    stand_ins |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - printable))}
    tokens = dict.fromkeys(bytes((byte,)) for byte in range(256))
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens |= dict.fromkeys(bytes(stand_ins[character] for character in token) for token, _ in learned)
    for text in itertools.chain(_generated(), _pairs(texts)):
        if len(tokens) == VOCAB_SIZE:
            break
        tokens.setdefault(text.encode("utf-8"))
    if len(tokens) < VOCAB_SIZE:
        raise ValueError(f"only {len(tokens)} tokens from {folder}: give it more text")
    return list(tokens)


def _generated() -> Iterator[str]:
    """What big vocabularies have besides words: numbers, runs of space and punctuation, other scripts."""
    yield from (f"{number}" for number in range(1000))
    yield from (f"{number:03}" for number in range(1000))
    yield from (space * count for space in (" ", "\n", "\t", "-", "=", "*", "#") for count in range(2, 40))
    marks = "\"'{}[]():;,./\\<>=+-*&|!?_#@$%^~` \n"
    yield from map("".join, itertools.product(marks, repeat=2))
    yield from map("".join, itertools.product('"{}[]:,\\ \n', repeat=3))
    for start, end in ((0xC0, 0x250), (0x370, 0x530), (0x5D0, 0x6F0), (0x900, 0x980), (0x3040, 0x3100)):
        yield from (chr(point) for point in range(start, end))
    yield from (chr(point) for point in range(0x4E00, 0x4E00 + 8000))
    yield from (chr(point) for point in range(0xAC00, 0xAC00 + 3000))


def _pairs(texts: Iterable[str]) -> Iterator[str]:
    """Words as they stand in the texts, then in other cases and joined, as identifiers in programs are."""
    words = list(dict.fromkeys(word for text in texts for word in re.findall(r"[A-Za-z]{2,}", text)))
    for change in (str, str.lower, str.capitalize, str.upper):
        for word in words:
            yield change(word)
            yield " " + change(word)
    for first, second in itertools.product(words[:400], words[:400]):
        yield f"{first.lower()}_{second.lower()}"
        yield f" {first.lower()}{second.capitalize()}"


class Backend(Protocol):
    """One library: `compile` raises for what it refuses; `matcher` starts one text."""

    name: str

    def compile(self, kind: str, value: Any) -> Any: ...
    def matcher(self, compiled: Any) -> Any: ...
    def fill(self, matcher: Any, row: torch.Tensor) -> None: ...
    def advance(self, matcher: Any, token_id: int) -> bool: ...


class XGrammar:
    name = "xgrammar"

    def __init__(self, tokens: Sequence[bytes], eos: int) -> None:
        import xgrammar

        self._library = xgrammar
        info = xgrammar.TokenizerInfo(list(tokens), xgrammar.VocabType.RAW, stop_token_ids=[eos])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, value: Any) -> Any:
        if kind == "json":
            # Not strict: that would forbid what the schema allows, such as further properties.
            return self._compiler.compile_json_schema(json.dumps(value), strict_mode=False)
        if kind == "regex":
            return self._compiler.compile_regex(value)
        if kind == "choice":
            return self._compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, value)))
        return self._compiler.compile_grammar(value)

    def matcher(self, compiled: Any) -> Any:
        return self._library.GrammarMatcher(compiled)

    def fill(self, matcher: Any, row: torch.Tensor) -> None:
        matcher.fill_next_token_bitmask(row.unsqueeze(0))

    def advance(self, matcher: Any, token_id: int) -> bool:
        return bool(matcher.accept_token(token_id))


class LLGuidance:
    """As puna runs it, with its checks and its translation of EBNF."""

    name = "llguidance"

    def __init__(self, tokens: Sequence[bytes], eos: int) -> None:
        self._compiler = GrammarCompiler(tokens, [eos], len(tokens), GuidedLimits(cached_grammars=0))
        self._compiler.compile(GuidedDecoding(regex="a"))  # loads the vocabulary

    def compile(self, kind: str, value: Any) -> Any:
        field = {"json": "json_schema", "ebnf": "grammar"}.get(kind, kind)
        return self._compiler.compile(GuidedDecoding(**{field: value}))

    def matcher(self, compiled: Any) -> Any:
        return compiled.matcher()

    def fill(self, matcher: Any, row: torch.Tensor) -> None:
        matcher.fill_bitmask(row)

    def advance(self, matcher: Any, token_id: int) -> bool:
        matcher.advance(token_id)
        return True


def _large_schema() -> dict[str, Any]:
    kinds = [
        {"type": "string", "maxLength": 60},
        {"type": "integer", "minimum": 0, "maximum": 100000},
        {"type": "array", "items": {"type": "number"}, "maxItems": 8},
        {"enum": [f"value-{i}" for i in range(40)]},
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/address"}]},
        {"type": "string", "pattern": "^[a-z]{2,8}-[0-9]{1,4}$"},
    ]
    entry = {
        "type": "object",
        "properties": {f"field_{i}": kinds[i % len(kinds)] for i in range(120)},
        "required": [f"field_{i}" for i in range(120)],
        "additionalProperties": False,
    }
    address = {
        "type": "object",
        "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        "required": ["street", "city"],
        "additionalProperties": False,
    }
    return {
        "$defs": {"address": address, "entry": entry},
        "type": "object",
        "properties": {"entries": {"type": "array", "items": {"$ref": "#/$defs/entry"}}},
        "required": ["entries"],
        "additionalProperties": False,
    }


def _large_instance() -> dict[str, Any]:
    values = ["some words and über", 4711, [1, 2.5, -3e4], "value-17", None, "abc-123"]
    values[4] = {"street": "Main street 5", "city": "München"}
    return {"entries": [{f"field_{i}": values[i % len(values)] for i in range(120)}]}


SMALL_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ARITHMETIC = r"""
root ::= expression
expression ::= term ((" + " | " - ") term)*
term ::= factor (("*" | "/") factor)*
factor ::= [0-9]+ | [a-z] [a-z0-9_]* | "(" expression ")"
"""
ANYTHING = {"k": [1, {"text": "Once upon a time there was a queen, " * 3, "on": True}, None, 2.5], "z": {"y": "x"}}
JSON_GRAMMAR = r"""
root ::= object
value ::= (object | array | string | number | "true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,2})?
ws ::= "" | " " | "\n" [ \t]{0,20}
"""
CASES = {
    "JSON schema, small": ("json", SMALL_SCHEMA, json.dumps({"name": "Alice of Wonderland", "age": 42})),
    "JSON schema, 120 fields": ("json", _large_schema(), json.dumps(_large_instance(), ensure_ascii=False)),
    "any JSON object": ("json", {"type": "object"}, json.dumps(ANYTHING)),
    "regex, date and text": (
        "regex",
        r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9] [A-Z][a-z ]{3,200}\.",
        "1987-03-21 The queen of the garden walked over the high grassland and slept.",
    ),
    "EBNF, arithmetic": ("ebnf", ARITHMETIC, "(12 + abc*(7 - x1)/9) + (alpha - (33*width + 18))/total"),
    "EBNF, JSON": ("ebnf", JSON_GRAMMAR, json.dumps(ANYTHING)),
    "choice of 500": ("choice", [f"category {i}" for i in range(500)], "category 481"),
}

# schema, texts that it admits, texts that it does not. Properties in the schema's order, with json.dumps's spaces.
TRICKY: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "nested objects": (
        {"properties": {"a": {"properties": {"b": {"type": "integer"}}, "required": ["b"]}}, "type": "object"},
        ['{"a": {"b": 1}}', "{}", '{"a": {"b": 1, "c": 2}}', '{"a": 3}', '{"a": {"c": 2, "b": 1}}'],
        ['{"a": {}}', '{"a": {"b": "1"}}', "1"],
    ),
    "required order": (
        {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}, "required": ["a"]},
        ['{"b": 1, "a": 2}', '{"a": 2}', '{"a": 2, "b": 1}'],
        ['{"b": 1}', "{}"],
    ),
    "additionalProperties false": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        ['{"a": null}', "{}"],
        ['{"b": 1}', '{"a": 1, "b": 2}'],
    ),
    "additionalProperties typed": (
        {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
        ['{"a": "x", "q": 1}', '{"q": 1}', '{"ab": 1}', '{"a": "x"}'],
        ['{"a": 1}', '{"q": "x"}', '{"a": "x", "a": 1}', '{"\\u0061": 1}'],
    ),
    "enum and const": (
        {"enum": ["a", 1, None, {"k": [True]}, 'ü"\n']},
        ['"a"', "1", "null", '{"k": [true]}', '"ü\\"\\n"', '"\\u0061"', '{"k":[true]}', "1.0"],
        ['"b"', "2", "{}", '{"k": [false]}'],
    ),
    "minItems, maxItems": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        ["[1, 2]", "[1, 2, 3]"],
        ["[]", "[1]", "[1, 2, 3, 4]", '[1, "2"]'],
    ),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        ['[1, "a"]', "[]", "[1]"],
        ['["a"]', '[1, "a", 2]'],
    ),
    "pattern, not anchored": ({"type": "string", "pattern": "b+"}, ['"abc"', '"b"'], ['"ac"', '""']),
    "pattern, anchored": ({"type": "string", "pattern": "^[a-z]{2}$"}, ['"ab"'], ['"abc"', '"a"', '"AB"']),
    "pattern, quotes": ({"type": "string", "pattern": '^a"b\\\\$'}, ['"a\\"b\\\\"'], ['"ab"', '"a"b"']),
    "string lengths in characters": (
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"üü"', '"日本語"', '"👩👩"', '"\\n\\""'],
        ['"ü"', '"日本語!"'],
    ),
    "unicode names": (
        {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]},
        ['{"größe": 1}'],
        ['{"grosse": 1}', "{}"],
    ),
    "$ref, recursive": (
        {
            "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "required": []}},
            "$ref": "#/$defs/n",
        },
        ['{"next": {"next": {}}}', "{}"],
        ['{"next": 1}', '{"next": {"next": []}}'],
    ),
    "$ref with siblings": (
        {"$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s", "minLength": 2},
        ['"ab"'],
        ['"a"', "1"],
    ),
    "anyOf": (
        {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
        ["1", '"a"'],
        ['"ab"', "1.5", "null"],
    ),
    "anyOf with siblings": (
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ['{"a": 1}', '{"b": 1}'],
        ["{}", '{"c": 1}'],
    ),
    "allOf": (
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
        ["3", "5"],
        ["2", "6", '"x"'],
    ),
    "integer range": (
        {"type": "integer", "minimum": -7, "exclusiveMaximum": 123},
        ["-7", "0", "122", "99"],
        ["-8", "123", "1000", "1.5", "007", "-"],
    ),
    "number range": (
        {"type": "number", "exclusiveMinimum": 0.5, "maximum": 10},
        ["0.51", "10", "9.99"],
        ["0.5", "10.01", "0", "-1"],
    ),
    "format": ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-13-01"', '"yesterday"']),
    "uniqueItems": ({"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}}, ["[1, 2]"], ["[1, 1]"]),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, ["[1]"], ["[]", '["a"]']),
    "not": ({"type": "integer", "not": {"const": 1}}, ["2"], ["1"]),
    "oneOf, overlapping": (
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]},
        ["-1", "10"],
        ["5"],
    ),
    "if/then/else": (
        {"type": "integer", "if": {"minimum": 5}, "then": {"minimum": 8}},
        ["4", "8"],
        ["5"],
    ),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, ["10", "0"], ["7"]),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        ['{"a": 1, "b": 1}', '{"b": 1}'],
        ['{"a": 1}'],
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 1}}, ['{"a": 1}'], ['{"ab": 1}']),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
        ['{"n_x": 1}'],
        ['{"n_x": "a"}', '{"x": 1}'],
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
    "unevaluatedProperties": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        ['{"a": 1}'],
        ['{"b": 1}'],
    ),
    "unknown format": ({"type": "string", "format": "no-such-format"}, ['"a"'], []),
    "unknown keyword": ({"type": "integer", "x-unit": "kg"}, ["1"], ['"a"']),
    "unresolvable $ref": ({"$ref": "#/$defs/nothing"}, [], ["1"]),
    "unsatisfiable": ({"type": "integer", "minimum": 3, "maximum": 2}, [], ["1", "3"]),
    "false": ({"type": "object", "properties": {"a": False}}, ["{}"], ['{"a": 1}']),
    "wrong type of keyword": ({"type": "string", "maxLength": "3"}, [], ['"abcd"']),
    "unknown type": ({"type": "strnig"}, [], ['"abcd"', "1"]),
}


def longest_match(text: bytes, ids: dict[bytes, int], longest: int) -> list[int]:
    found = []
    start = 0
    while start < len(text):
        end = next(e for e in range(min(len(text), start + longest), start, -1) if text[start:e] in ids)
        found.append(ids[text[start:end]])
        start = end
    return found


def milliseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def measure_speed(backends: Sequence[Backend], tokens: Sequence[bytes]) -> None:
    ids = {token: i for i, token in enumerate(tokens)}
    columns = ("compile", "first", "median", "p99", "worst", "mean", "2nd run")
    print("\nmilliseconds".ljust(37) + "".join(f" {column:>8}" for column in columns))
    for name, (kind, value, text) in CASES.items():
        walk = longest_match(text.encode(), ids, 24)
        for backend in backends:
            compile_times = []
            for _ in range(3):
                elapsed, compiled = milliseconds(lambda b=backend, k=kind, v=value: b.compile(k, v))
                compile_times.append(elapsed)
            passes = []
            for _ in range(2):
                matcher = backend.matcher(compiled)
                row = torch.zeros(WORDS, dtype=torch.int32)
                times = []
                for token_id in walk:
                    elapsed, _ = milliseconds(lambda b=backend, m=matcher, r=row: b.fill(m, r))
                    times.append(elapsed)
                    if not (int(row[token_id // 32]) >> (token_id % 32)) & 1 or not backend.advance(matcher, token_id):
                        raise ValueError(f"{backend.name}, {name}: {tokens[token_id]!r} is refused in {text!r}")
                passes.append(times)
            first = passes[0]
            figures = [
                statistics.median(compile_times),
                first[0],
                statistics.median(first),
                sorted(first)[int(0.99 * (len(first) - 1))],
                max(first),
                statistics.mean(first),
                statistics.mean(passes[1]),
            ]
            print(f"{name:24} {backend.name:11}" + "".join(f" {figure:8.3f}" for figure in figures), flush=True)


def admits(backend: Backend, compiled: Any, text: str, eos: int) -> bool:
    """Whether the text, byte by byte, is let through to its end."""
    matcher = backend.matcher(compiled)
    row = torch.zeros(WORDS, dtype=torch.int32)
    for token_id in (*text.encode(), eos):
        backend.fill(matcher, row)
        if not (int(row[token_id // 32]) >> (token_id % 32)) & 1:
            return False
        if token_id != eos and not backend.advance(matcher, token_id):
            return False
    return True


def check_schemas(backends: Sequence[Backend], eos: int) -> None:
    """ok, or what goes wrong: too wide (admits what the schema does not) or too narrow (refuses what it does)."""
    print(f"\n{'schema':30}" + "".join(f" {backend.name:60}" for backend in backends))
    for name, (schema, good, bad) in TRICKY.items():
        results = []
        for backend in backends:
            try:
                compiled = backend.compile("json", schema)
                narrow = [text for text in good if not admits(backend, compiled, text, eos)]
                wide = [text for text in bad if admits(backend, compiled, text, eos)]
            except Exception as error:  # Each library has its own; anything but an answer is a refusal.
                results.append(f"error: {' '.join(str(error).split())[:50]}")
                continue
            parts = [f"TOO WIDE {' '.join(wide)}"] if wide else []
            parts += [f"too narrow {' '.join(narrow)}"] if narrow else []
            results.append("; ".join(parts) or "ok")
        print(f"{name:30}" + "".join(f" {result:60}" for result in results), flush=True)


def import_cost(name: str) -> str:
    probe = (
        f"import sys, time, torch; n = len(sys.modules); t = time.perf_counter(); import {name};"
        "print(f'{time.perf_counter() - t:.2f} s, {len(sys.modules) - n} modules, transformers ' +"
        "('imported' if 'transformers' in sys.modules else 'not imported'))"
    )
    return subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "text"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    torch.set_num_threads(1)
    tokens = [*make_vocabulary(folder)[: VOCAB_SIZE - 1], b"</s>"]
    backends: list[Backend] = []
    for kind in (XGrammar, LLGuidance):
        if importlib.util.find_spec(kind.name) is None:
            print(f"{kind.name}: not installed")
            continue
        cost = import_cost(kind.name)
        elapsed, backend = milliseconds(lambda k=kind: k(tokens, VOCAB_SIZE - 1))
        print(f"{kind.name}: import after torch {cost}; vocabulary of {VOCAB_SIZE} in {elapsed:.0f} ms")
        backends.append(backend)
    measure_speed(backends, tokens)
    check_schemas(backends, VOCAB_SIZE - 1)


if __name__ == "__main__":
    main()
