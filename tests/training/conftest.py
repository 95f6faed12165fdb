"""A small text and the options of a small run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.training.run import ModelShape, Sources
from puna.training.tokenizer import END_OF_TEXT
from puna.training.trainer import TrainingOptions


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Forty documents of sentences that can be learnt, with characters of one to four bytes."""
    draw = random.Random(7)
    documents = []
    for _ in range(40):
        sentences = [
            f"The {draw.choice(['dog', 'cat', 'llama', 'café'])} {draw.choice(['sees', 'likes'])} a "
            f"{draw.choice(['red', 'big', 'naïve', '😀'])} {draw.choice(['ball', 'house', 'tree'])}."
            for _ in range(8)
        ]
        documents.append(" ".join(sentences))
    file = tmp_path / "text.txt"
    file.write_text(f"\n{END_OF_TEXT}\n".join(documents), encoding="utf-8")
    return file


@pytest.fixture
def sources(text_file: Path, tmp_path: Path) -> Sources:
    return Sources(data=[text_file], out=tmp_path / "out", eval_fraction=0.1)


@pytest.fixture
def shape() -> ModelShape:
    return ModelShape(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_hidden_size=48, vocab_size=300)


@pytest.fixture
def options() -> Callable[..., TrainingOptions]:
    """Makes the options of a run of 20 short steps, with changes."""

    def make(**changes: Any) -> TrainingOptions:
        values: dict[str, Any] = {
            "steps": 20,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "context": 32,
            "learning_rate": 3e-3,
            "warmup_steps": 4,
            "weight_decay": 0.1,
            "gradient_clip": 1.0,
            "dtype": "float32",
            "save_dtype": "float32",
            "eval_every": 0,
            "save_every": 5,
            "seed": 3,
        }
        return TrainingOptions(**{**values, **changes})

    return make
