"""Guided decoding: random walks over allowed tokens end in text that json, jsonschema, re or a plain parser accept."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import torch

from puna.runtime.guided import CompiledGrammar, GrammarCompiler, GuidedLimits, Matcher
from puna.scheduling.sampling_params import GuidedDecoding

WALKS = 40
MAX_STEPS = 600

# Byte-level BPE: all bytes, and tokens over the edges of JSON, words and characters.
_MERGED = [
    b'{"',
    b'":',
    b'": "',
    b'",',
    b'", "',
    b'"}',
    b"}}",
    b'"]',
    b"], [",
    b": ",
    b", ",
    b"\n  ",
    b"00",
    b"12",
    b"tr",
]
_MERGED += [
    b"rue",
    b"null",
    b"name",
    b"age",
    b" the",
    b"ab",
    b"abc",
    b"bc",
    b"(a",
    b"a)",
    b"\\n",
    b'\\"',
    b"red",
    b"dark ",
]
_MERGED += [
    "ü".encode(),
    "本".encode(),
    "日本".encode(),
    "本".encode()[:2],
    "é".encode()[1:] + b'"',
    b"\xf0\x9f",
    b"\xe6",
]
BYTE_LEVEL: list[bytes | None] = [None, None, *(bytes((byte,)) for byte in range(256)), *dict.fromkeys(_MERGED), None]
# sentencepiece with byte fallback: control tokens, 256 bytes, then pieces of whole characters, spaces being marks.
_PIECES = (
    '▁|▁▁|a|b|c|d|e|r|k|n|m|t|u|l|s|x|0|1|2|5|9|-|.|+|(|)|[|]|{|}|,|:|"|\\|{"|":|▁"|",|,▁"|▁name|name|age|▁a|ab|red'
    "|ü|日|本|日本"
)
FALLBACK: list[bytes | None] = [
    None,
    None,
    None,
    *(bytes((byte,)) for byte in range(256)),
    *(piece.replace("▁", " ").encode() for piece in _PIECES.split("|")),
]
VOCABULARIES = {"byte-level": BYTE_LEVEL, "byte-fallback": FALLBACK}
EOS = (1, 0)


def make_compiler(name: str, limits: GuidedLimits | None = None) -> GrammarCompiler:
    # More logits than tokens, as models that pad their vocabulary have.
    return GrammarCompiler(VOCABULARIES[name], EOS, len(VOCABULARIES[name]) + 7, limits)


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compiler(vocabulary: str) -> GrammarCompiler:
    return make_compiler(vocabulary)


@pytest.fixture(scope="module")
def byte_level() -> GrammarCompiler:
    return make_compiler("byte-level")


def allowed(matcher: Matcher, vocab_size: int) -> list[int]:
    row = torch.full(((vocab_size + 31) // 32,), -1, dtype=torch.int32)
    matcher.fill_bitmask(row)
    words = row.to(torch.int64).bitwise_and(0xFFFFFFFF).tolist()
    ids = [word * 32 + bit for word, bits in enumerate(words) for bit in range(32) if bits >> bit & 1]
    assert all(token_id < vocab_size for token_id in ids)
    return ids


def walk(compiler: GrammarCompiler, name: str, guided: GuidedDecoding, seed: int) -> tuple[str, list[str]]:
    """A text of random allowed tokens, and every text before which the end was allowed. Ends as soon as it can late."""
    tokens, rng = VOCABULARIES[name], random.Random(seed)
    matcher = compiler.matcher(guided)
    text, endings = b"", []
    for step in range(MAX_STEPS):
        ids = allowed(matcher, len(tokens) + 7)
        ends = [token_id for token_id in ids if token_id in EOS]
        others = [token_id for token_id in ids if token_id not in EOS]
        assert ends in ([], sorted(EOS))
        assert all(token_id < len(tokens) and tokens[token_id] for token_id in others)
        assert matcher.is_finished == (bool(ends) and not others)
        if ends:
            endings.append(text.decode("utf-8"))
        else:
            with pytest.raises(ValueError, match="before it is complete"):
                matcher.advance(EOS[0])
        if ends and (not others or rng.random() < 0.3 + step / 100):
            matcher.advance(rng.choice(ends))
            assert matcher.is_finished
            with pytest.raises(ValueError, match="after the end"):
                matcher.advance(others[0] if others else 5)
            return text.decode("utf-8"), endings
        # Closing marks get likelier with time, or random JSON would hardly ever end.
        closing = [i for i in others if (tokens[i] or b"")[:1] in b'"}])' or tokens[i] == b"c"]
        chosen = rng.choice(closing if closing and rng.random() < 0.2 + step / 60 else others)
        matcher.advance(chosen)
        text += tokens[chosen] or b""
    raise AssertionError(f"no end after {MAX_STEPS} tokens: {text!r}")


SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 5},
            "age": {"type": "integer", "minimum": -5, "maximum": 129},
            "tags": {"type": "array", "items": {"enum": ["red", "dark red", 'a"b\\', "ü", None, 2]}, "minItems": 1},
            "at": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    "required last": {
        "type": "object",
        "properties": {"b": {"type": "boolean"}, "a": {"type": "null"}, "c": {"const": {"k": [1]}}},
        "required": ["c", "a"],
    },
    "additional typed": {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 2}},
        "additionalProperties": {"type": "integer", "minimum": 7},
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
    "array bounds": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"enum": [1, "x"]}], "items": False, "minItems": 2},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}(日|ü)+\\\\?$", "maxLength": 6},
    "free pattern": {"type": "string", "pattern": "x[0-9]", "maxLength": 8},
    "recursive": {
        "$defs": {
            "n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "additionalProperties": False}
        },
        "$ref": "#/$defs/n",
    },
    "siblings": {"$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s", "minLength": 2, "maxLength": 3},
    "any of": {
        "anyOf": [{"type": "integer", "exclusiveMaximum": 3}, {"type": "string", "maxLength": 2}, {"const": []}]
    },
    "any of required": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 30}, {"maximum": 50}, {"multipleOf": 5}]},
    "number range": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 12},
    "unicode name": {"type": "object", "properties": {"größe": {"const": "日本"}}, "required": ["größe"]},
    "date": {"type": "string", "format": "date"},
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_schema_walks_validate(compiler: GrammarCompiler, vocabulary: str, schema: str) -> None:
    checker = jsonschema.Draft202012Validator(
        SCHEMAS[schema], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    texts = set()
    for seed in range(WALKS):
        text, endings = walk(compiler, vocabulary, GuidedDecoding(json_schema=SCHEMAS[schema]), seed)
        for ending in endings:
            checker.validate(json.loads(ending))
        texts.add(text)
    assert len(texts) > 3 or schema in ("all of", "any of required", "tuple", "unicode name")


def test_schema_as_text_means_the_same(compiler: GrammarCompiler) -> None:
    schema = SCHEMAS["nested"]
    assert compiler.compile(GuidedDecoding(json_schema=json.dumps(schema))) is compiler.compile(
        GuidedDecoding(json_schema=schema)
    )


def test_json_object_walks_are_objects(compiler: GrammarCompiler, vocabulary: str) -> None:
    for seed in range(4 * WALKS):
        _, endings = walk(compiler, vocabulary, GuidedDecoding(json_object=True), seed)
        assert all(isinstance(json.loads(ending), dict) for ending in endings)


@pytest.mark.parametrize(
    "regex",
    [
        r"(19|20)[0-9]{2}-[01][0-9]",
        r"^[a-c]+(x|日本)?$",
        r"a/b\n\"'\\[/]?",
        r"^ab|c$",
        r"[^a-z]{1,3}",
        r"(?i)red|\$",
        r"x\$$",
        r"(?P<first>a)(?:b|c)*?d",
        r".{2}",
    ],
)
def test_regex_walks_match(compiler: GrammarCompiler, vocabulary: str, regex: str) -> None:
    for seed in range(WALKS):
        _, endings = walk(compiler, vocabulary, GuidedDecoding(regex=regex), seed)
        assert all(re.fullmatch(regex, ending) for ending in endings), endings


CHOICES = ["red", "dark red", "reddish", "日本", "日", 'a"b\\\n', "/x/", "{", "ü"]


def test_choice_walks_reach_all_choices_and_nothing_else(compiler: GrammarCompiler, vocabulary: str) -> None:
    found = {walk(compiler, vocabulary, GuidedDecoding(choice=CHOICES), seed)[0] for seed in range(300)}
    assert found == set(CHOICES)


def test_multi_byte_character_comes_in_parts(byte_level: GrammarCompiler) -> None:
    matcher = byte_level.matcher(GuidedDecoding(choice=["日"]))
    ids = {token: i for i, token in enumerate(BYTE_LEVEL)}
    for byte in "日".encode():
        # One byte, and no other token that begins like it but goes on differently.
        assert ids[bytes((byte,))] in allowed(matcher, len(BYTE_LEVEL) + 7)
        assert not matcher.is_finished
        matcher.advance(ids[bytes((byte,))])
    assert matcher.is_finished


def spell(matcher: Matcher, text: str) -> bool:
    """Whether the text is accepted byte by byte, and may end there."""
    ids = {token: i for i, token in enumerate(BYTE_LEVEL)}
    try:
        for byte in text.encode():
            matcher.advance(ids[bytes((byte,))])
        matcher.advance(EOS[0])
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('{"a":1,"b":[1,2]}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        (json.dumps({"a": 1, "b": [1, 2]}, indent=2), True),
        (json.dumps({"a": 1, "b": [1, 2]}, indent="\t"), True),
        ('{ "a" : 1 }', True),
        ('{"a":  1}', False),
        ('{\n\n"a": 1}', False),
        (' {"a": 1}', False),
        ('{"a": 1}\n', False),
        ('{"a": 1' + "\n" + " " * 65 + "}", False),
        # A name in another spelling would be a further property to the matcher, and the same one to a reader.
        ('{"\\u0061": 1}', False),
    ],
)
def test_white_space_and_escapes_of_json(byte_level: GrammarCompiler, text: str, accepted: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert spell(byte_level.matcher(GuidedDecoding(json_schema=schema)), text) is accepted


UNCOMPILABLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "unique items": ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "not": ({"json_schema": {"not": {"const": 1}}}, "not"),
    "if": ({"json_schema": {"if": {"minimum": 5}, "then": {"minimum": 8}}}, "if"),
    "contains": ({"json_schema": {"contains": {"type": "integer"}}}, "contains"),
    "deep inside": ({"json_schema": {"properties": {"a": {"items": {"propertyNames": {}}}}}}, "propertyNames"),
    "one of": ({"json_schema": {"oneOf": [{"minimum": 0}, {"maximum": 9}]}}, "oneOf"),
    "unevaluated": ({"json_schema": {"unevaluatedProperties": False}}, "unevaluatedProperties"),
    "unknown type": ({"json_schema": {"type": "strnig"}}, "strnig"),
    "unknown format": ({"json_schema": {"type": "string", "format": "nothing"}}, "format"),
    "unresolved reference": ({"json_schema": {"$ref": "#/$defs/none"}}, "none"),
    "remote reference": ({"json_schema": {"$ref": "http://example.com/schema.json"}}, "example.com"),
    "circle": ({"json_schema": {"$ref": "#"}}, "no text"),
    "unsatisfiable": ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum"),
    "look-ahead in pattern": ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "look-a"),
    "options": ({"json_schema": {"x-guidance": {"lenient": True}, "uniqueItems": True}}, "x-guidance"),
    "repeated names": ({"json_schema": {"type": "object", "minProperties": 3}}, "minProperties"),
    "control character": ({"json_schema": {"enum": ["a\x01"]}}, "control"),
    "not JSON": ({"json_schema": "{"}, "no JSON"),
    "not JSON either": ({"json_schema": {"const": object()}}, "no JSON"),
    "not an object": ({"json_schema": "[1]"}, "object"),
    "open parenthesis": ({"regex": "(a"}, "unclosed"),
    "look-ahead": ({"regex": "(?=a)b"}, "look-a"),
    "back-reference": ({"regex": r"(a)\1"}, "backreference"),
    "empty class": ({"regex": r"[^\s\S]"}, "no text"),
    "no rules": ({"grammar": "hello"}, "line 1"),
    "no root": ({"grammar": 'a ::= "x"'}, "root"),
    "undefined rule": ({"grammar": 'root ::= "x" other'}, "other"),
    "endless rule": ({"grammar": 'root ::= "x" | a\na ::= "y" a'}, "end"),
    "open group": ({"grammar": 'root ::= "x"\n  ("y"'}, "line 2"),
    "open text": ({"grammar": 'root ::= "x'}, "line 1"),
    "nested": ({"grammar": "root ::= " + "(" * 200 + '"a"' + ")" * 200}, "nested"),
    "backward range": ({"grammar": "root ::= [z-a]"}, "upside down"),
    "second rule": ({"grammar": 'root ::= "x"\nroot ::= "y"'}, "second"),
}


@pytest.mark.parametrize("case", UNCOMPILABLE)
def test_uncompilable_is_an_error_that_names_it(byte_level: GrammarCompiler, case: str) -> None:
    fields, message = UNCOMPILABLE[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        byte_level.compile(GuidedDecoding(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": {"enum": ["x" * 2000]}},
        {"json_schema": json.dumps({"title": "x" * 2000})},
        {"regex": "x" * 101},
        {"grammar": 'root ::= "' + "x" * 300 + '"'},
        {"choice": ["a", "b", "c", "d"]},
        {"choice": ["x" * 101]},
    ],
)
def test_too_large_is_an_error(fields: dict[str, Any]) -> None:
    limits = GuidedLimits(schema_bytes=1000, regex_length=100, grammar_length=200, choices=3, choice_bytes=100)
    with pytest.raises(ValueError, match="more than the"):
        make_compiler("byte-level", limits).compile(GuidedDecoding(**fields))


def test_vocabulary_that_cannot_spell_it_is_an_error() -> None:
    compiler = GrammarCompiler([b"a", b"b", None], [2], 3)
    with pytest.raises(ValueError, match="spell"):
        compiler.compile(GuidedDecoding(regex="xyz"))
    # Found on the way: an error as well, and not an unfinished text.
    matcher = compiler.matcher(GuidedDecoding(regex="abc"))
    row = torch.zeros(1, dtype=torch.int32)
    for token_id in (0, 1):
        matcher.fill_bitmask(row)
        assert row.item() == 1 << token_id
        matcher.advance(token_id)
    with pytest.raises(ValueError, match="stuck"):
        matcher.fill_bitmask(row)


def test_disallowed_token_is_an_error_and_changes_nothing(byte_level: GrammarCompiler) -> None:
    matcher = byte_level.matcher(GuidedDecoding(regex="ab+"))
    size = len(BYTE_LEVEL) + 7
    ids = {token: i for i, token in enumerate(BYTE_LEVEL)}
    matcher.advance(ids[b"a"])
    before = allowed(matcher, size)
    for wrong in (ids[b"a"], len(BYTE_LEVEL) - 1, size - 1, size + 1000, -1):
        with pytest.raises(ValueError, match=f"token {wrong} is not allowed"):
            matcher.advance(wrong)
    assert allowed(matcher, size) == before
    matcher.advance(ids[b"b"])


def test_matchers_and_copies_are_independent(byte_level: GrammarCompiler) -> None:
    compiled = byte_level.compile(GuidedDecoding(choice=["abc", "abx", "c"]))
    assert isinstance(compiled, CompiledGrammar)
    first, second = compiled.matcher(), compiled.matcher()
    ids = {token: i for i, token in enumerate(BYTE_LEVEL)}
    first.advance(ids[b"ab"])
    copied = first.copy()
    first.advance(ids[b"c"])
    assert first.is_finished
    assert spell(second, "c")
    assert not copied.is_finished
    assert spell(copied, "x")
    assert spell(compiled.matcher(), "abc")


def test_cache_keeps_the_latest_used() -> None:
    compiler = make_compiler("byte-level", GuidedLimits(cached_grammars=2))
    first, second, third = (GuidedDecoding(regex=regex) for regex in ("a", "b", "c"))
    compiled = compiler.compile(first)
    of_second = compiler.compile(second)
    assert compiler.compile(GuidedDecoding(regex="a")) is compiled
    compiler.compile(third)
    assert compiler.compile(first) is compiled
    assert compiler.compile(second) is not of_second


def test_order_of_properties_makes_another_grammar(byte_level: GrammarCompiler) -> None:
    properties = {"a": {"const": 1}, "b": {"const": 2}}
    swapped = dict(reversed(properties.items()))
    for named, text in ((properties, '{"a":1,"b":2}'), (swapped, '{"b":2,"a":1}')):
        schema = {"type": "object", "properties": named, "required": ["a", "b"]}
        assert spell(byte_level.matcher(GuidedDecoding(json_schema=schema)), text)


def test_threads_may_share_a_compiler() -> None:
    compiler = make_compiler("byte-level")
    cases = [GuidedDecoding(json_schema=schema) for schema in SCHEMAS.values()] * 3

    def run(index: int) -> str:
        return walk(compiler, "byte-level", cases[index], seed=index)[0]

    alone = [run(index) for index in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(len(cases)))) == alone


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(3, dtype=torch.int32),
        torch.zeros((len(BYTE_LEVEL) + 38) // 32, dtype=torch.int64),
        torch.zeros(2 * ((len(BYTE_LEVEL) + 38) // 32), dtype=torch.int32)[::2],
    ],
)
def test_wrong_bitmask_is_an_error(byte_level: GrammarCompiler, row: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="bitmask"):
        byte_level.matcher(GuidedDecoding(regex="a")).fill_bitmask(row)


@pytest.mark.parametrize("eos", [[], [-1], [5]])
def test_wrong_eos_is_an_error(eos: list[int]) -> None:
    with pytest.raises(ValueError, match="eos_token_ids"):
        GrammarCompiler([b"a", None], eos, 5).compile(GuidedDecoding(regex="a"))


def test_tokenizer_larger_than_the_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="belongs"):
        GrammarCompiler([None, b"a", b"b"], [0], 2).compile(GuidedDecoding(regex="a"))


def test_missing_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'puna[guided]'")):
        make_compiler("byte-level").compile(GuidedDecoding(regex="a"))
