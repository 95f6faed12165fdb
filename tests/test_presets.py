"""PRESETS beside the published config.json files that tests/data has copies of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from puna.config import LLaMAConfig
from puna.config.presets import PRESETS
from puna.planning.memory import parameter_counts

WELL_KNOWN = json.loads((Path(__file__).parent / "data" / "well_known_configs.json").read_text())
SAME = {
    "llama-2-7b": "Llama-2-7b",
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "tinyllama-1.1b": "TinyLlama-1.1B",
    "smollm2-135m": "SmolLM2-135M",
    "mistral-7b": "Mistral-7B-v0.3",
    "qwen3-0.6b": "Qwen3-0.6B",
    "mixtral-8x7b": "Mixtral-8x7B",
}
# Millions of parameters, as the models' cards have them.
MILLIONS = {
    "llama-3.2-3b": 3213,
    "llama-3.3-70b": 70554,
    "qwen2.5-0.5b": 494,
    "qwen2.5-7b": 7616,
    "qwen3-8b": 8191,
}


@pytest.mark.parametrize("name", SAME)
def test_preset_is_the_published_file(name: str) -> None:
    published = LLaMAConfig.from_fields(WELL_KNOWN[SAME[name]]["config"])
    assert dataclasses.replace(PRESETS[name], dtype=published.dtype) == published


@pytest.mark.parametrize("name", MILLIONS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert round(parameter_counts(PRESETS[name]).total / 1e6) == MILLIONS[name]


def test_every_preset_is_checked() -> None:
    assert {*SAME, *MILLIONS} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_written_as_a_config_json(name: str) -> None:
    assert LLaMAConfig.from_fields(PRESETS[name].to_hugging_face()) == PRESETS[name]
