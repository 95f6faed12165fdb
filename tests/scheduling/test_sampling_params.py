"""SamplingParams and GuidedDecoding: what they refuse, by name; and the limits of a scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from puna.scheduling.beams import BeamParams
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams
from puna.scheduling.scheduler import SchedulerLimits


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 2, "temperature": 0}, "n is 2 with temperature 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"typical_p": 0.0}, "typical_p is 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 17}, "min_tokens is 17"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": 1001}, "prompt_logprobs is 1001"),
        ({"allowed_token_ids": []}, "allowed_token_ids is"),
        ({"bad_words": "word"}, "bad_words is 'word'"),
        ({"logit_bias": {3: 101.0}}, "logit_bias is"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**fields)


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="heat"):
        SamplingParams(heat=1.0)  # type: ignore[call-arg]


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(max_tokens=None, min_tokens=50).min_tokens == 50


@pytest.mark.parametrize(
    "fields",
    [{}, {"regex": "a", "grammar": "b"}, {"json_object": True, "choice": ["a"]}, {"choice": []}, {"choice": ["a", ""]}],
)
def test_guided_decoding_takes_one_constraint(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"exactly one|choice is"):
        GuidedDecoding(**fields)


def test_beams_and_limits() -> None:
    with pytest.raises(ValueError, match="beam_width is 0"):
        BeamParams(width=0)
    with pytest.raises(ValueError, match="early_stopping is 'maybe'"):
        BeamParams(width=2, early_stopping="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_num_batched_tokens is 3"):
        SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=3)
    with pytest.raises(ValueError, match="max_waiting is 0"):
        SchedulerLimits(max_waiting=0)
    with pytest.raises(ValueError, match="max_num_seqs is 0"):
        SchedulerLimits(max_num_seqs=0)
