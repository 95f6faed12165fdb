"""From sampling flags to what the engine takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from puna.cli.options import EarlyStopping, SamplingFlags
from puna.cli.sampling import num_bytes, request_settings
from puna.config import GenerationConfig
from puna.scheduling.beams import BeamParams
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=9)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ({}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"top_k": 5}, {"top_k": 5, "temperature": 1.0}),
        ({"top_p": 0.5}, {"top_p": 0.5, "temperature": 1.0}),
        ({"min_p": 0.1}, {"min_p": 0.1, "temperature": 1.0}),
        ({"typical_p": 0.5}, {"typical_p": 0.5, "temperature": 1.0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"seed": 3}, {"seed": 3}),
        ({"min_tokens": 4}, {"min_tokens": 4}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"logit_bias": ["5=-1.5", "6=2"]}, {"logit_bias": {5: -1.5, 6: 2.0}}),
        ({"bad_word": ["x"]}, {"bad_words": ("x",)}),
        ({"guided_json": ' {"type": "null"}'}, {"guided": GuidedDecoding(json_schema=' {"type": "null"}')}),
        ({"guided_regex": "a+"}, {"guided": GuidedDecoding(regex="a+")}),
        ({"guided_choice": ["yes", "no"]}, {"guided": GuidedDecoding(choice=("yes", "no"))}),
    ],
)
def test_each_flag_is_one_parameter(flags: dict[str, Any], changed: dict[str, Any]) -> None:
    settings = request_settings(SamplingFlags(**flags), GenerationConfig(), 9)
    assert settings.params == dataclasses.replace(GREEDY, **changed)
    assert settings.beams is None


def test_guides_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "string"}')
    (tmp_path / "grammar.ebnf").write_text('root ::= "a"')
    schema = request_settings(SamplingFlags(guided_json=str(tmp_path / "schema.json")), GenerationConfig(), 9)
    assert schema.params.guided == GuidedDecoding(json_schema='{"type": "string"}')
    grammar = request_settings(SamplingFlags(guided_grammar=tmp_path / "grammar.ebnf"), GenerationConfig(), 9)
    assert grammar.params.guided == GuidedDecoding(grammar='root ::= "a"')
    with pytest.raises(ValueError, match=r"--guided-json is '.*none\.json', which is no file"):
        request_settings(SamplingFlags(guided_json=str(tmp_path / "none.json")), GenerationConfig(), 9)


def test_recommended_values_hold_where_no_flag_says_otherwise() -> None:
    recommended = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.1
    )
    params = request_settings(SamplingFlags(top_k=3), recommended, 9, n=2).params
    assert params == SamplingParams(
        n=2, temperature=0.7, top_k=3, top_p=0.8, min_p=0.05, repetition_penalty=1.1, max_tokens=9
    )
    greedy = request_settings(SamplingFlags(temperature=0), recommended, 9).params
    assert greedy == dataclasses.replace(GREEDY, repetition_penalty=1.1)


def test_beams() -> None:
    flags = SamplingFlags(num_beams=3, length_penalty=0.5, early_stopping=EarlyStopping.never, ignore_eos=True)
    settings = request_settings(flags, GenerationConfig(do_sample=True), 9)
    assert settings.beams == BeamParams(width=3, length_penalty=0.5, early_stopping="never")
    assert settings.params == dataclasses.replace(GREEDY, ignore_eos=True)
    assert settings.num_sequences == 3
    plain = request_settings(SamplingFlags(num_beams=2, early_stopping=EarlyStopping.false), GenerationConfig(), 9)
    assert plain.beams == BeamParams(width=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_beams": 2, "stop": ["a"]}, "leave out --stop, or --num-beams"),
        ({"num_beams": 2, "repetition_penalty": 1.1, "min_tokens": 2}, "--repetition-penalty and --min-tokens"),
        ({"num_beams": 2, "guided_choice": ["a"]}, "leave out --guided-choice"),
        ({"num_beams": 2, "typical_p": 0.5}, "does not sample: leave out --typical-p"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "--guided-regex and --guided-choice are given"),
        ({"logit_bias": ["5"]}, "--logit-bias is '5'"),
        ({"logit_bias": ["x=1"]}, "--logit-bias is 'x=1'"),
        ({"logit_bias": ["5=200"]}, "logit_bias is {5: 200.0}"),
        ({"min_tokens": 10}, "min_tokens is 10"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
    ],
)
def test_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        request_settings(SamplingFlags(**flags), GenerationConfig(), 9)


def test_more_than_one_text_needs_randomness() -> None:
    with pytest.raises(ValueError, match="--n is 2, but the likeliest tokens are always the same"):
        request_settings(SamplingFlags(), GenerationConfig(), 9, n=2)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 KiB", 1536), ("77", 77), ("8B", 8), ("1TB", 10**12)],
)
def test_sizes(text: str, count: int) -> None:
    assert num_bytes(text, "--kv-cache-memory") == count


@pytest.mark.parametrize("text", ["", "2G", "-1", "GiB", "1e9", "2 gib", "0x10"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="--kv-cache-memory is"):
        num_bytes(text, "--kv-cache-memory")
