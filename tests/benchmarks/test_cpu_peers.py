"""benchmarks/cpu_peers.py: its engines' processes agree about one model, and its page says what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from puna.config import LLaMAConfig, RotaryScaling

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PEERS: Final = ROOT / "benchmarks" / "peers"
CONFIG: Final = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    hidden_size=64,
    mlp_hidden_size=96,
    vocab_size=320,
    max_position_embeddings=16384,
    dtype="bfloat16",
    rotary_scaling=RotaryScaling(
        type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    tie_embeddings=True,
)
TOKENS: Final = [3, 141, 59, 265, 35, 89, 79, 3, 238, 46]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    load("make_model").write_folder(found, CONFIG)
    return found


def answers(script: str, folder: Path) -> list[dict[str, Any]]:
    """What an engine's process says to: how it started, a score, a prefill, a batch's decode, its memory."""
    settings = {"file": str(folder), "threads": 1, "batch": 2, "context": 64, "vocab_size": CONFIG.vocab_size}
    commands: list[dict[str, Any]] = [
        {"score": TOKENS},
        {"prompt_tokens": 9, "new_tokens": 1, "batch": 1},
        {"prompt_tokens": 9, "new_tokens": 6, "batch": 2},
        {},
    ]
    done = subprocess.run(
        [sys.executable, str(PEERS / script), json.dumps(settings)],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_puna_and_transformers_compute_the_same(folder: Path) -> None:
    both = [answers(script, folder) for script in ("puna_worker.py", "transformers_worker.py")]
    for started, score, prefill, decode, memory in both:
        assert 0 < started["load_seconds"] <= started["ready_seconds"]
        assert len(score["logprobs"]) == len(TOKENS) - 1
        assert prefill["prefill_seconds"] > 0
        assert decode["step_seconds"] > 0
        assert memory["peak"] >= memory["anonymous"] > 1 << 20
    ours, theirs = (score["logprobs"] for _, score, *_ in both)
    assert ours == pytest.approx(theirs, abs=0.02)
    assert max(ours) - min(ours) > 0.1


def test_rows_of_rotary_halves_become_pairs() -> None:
    import numpy as np

    rows = np.arange(8)[:, None] * np.ones((1, 3), dtype=np.int64)
    assert load("make_model").interleaved(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


RESULTS: Final[dict[str, Any]] = {
    "date": "2026-01-02",
    "machine": "A Processor",
    "shape": "llama-3.2-1b",
    "threads": 2,
    "pairs": 3,
    "versions": {"torch": "2.13.0"},
    "limit": {"read_bytes_per_second": 20e9, "int8": 1.5e12, "bfloat16": 4e11, "float32": 2e11},
    "formats": {
        "int8": {
            "resources": {"puna": {"ready_seconds": 1.25, "peak_memory_bytes": 3 << 20}},
            "differences": {"llama.cpp": 0.0125},
            "measurements": {
                name: {
                    "tokens_per_second": {"puna": 15.04, "llama.cpp": 10.0},
                    "percent_of_limit": {"puna": 96.4, "llama.cpp": 64.0},
                    "ratios": {"llama.cpp": [1.504, 1.25, 1.75]},
                }
                for name in ("decode", "prefill", "decode of 8")
            },
        }
    },
}


def test_the_page_has_the_numbers(tmp_path: Path) -> None:
    report = load("report")
    text = report.markdown(RESULTS)
    assert "| int8 | decode, 1 sequence | 15.0 (96 %) | 10.0 (64 %) | llama.cpp | **1.50** (1.25-1.75) |" in text.split(
        "\n"
    )
    assert "| int8 | puna | 1.25 s | 3 MiB |" in text.split("\n")
    assert "llama.cpp 0.013" in text or "llama.cpp 0.012" in text
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\nBefore.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n", encoding="utf-8")
    report.write_section(page, text)
    report.write_section(page, text)
    assert page.read_text(encoding="utf-8") == (
        f"# Title\n\nBefore.\n\n{report.BEGIN}\n{text}\n{report.END}\n\nAfter.\n"
    )
    plot = tmp_path / "plot.svg"
    report.draw(RESULTS, plot)
    assert "<svg" in plot.read_text(encoding="utf-8")
