"""The trained tokenizer: any text goes there and back, in puna and in transformers alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from puna.engine.tokenizer import Tokenizer
from puna.training.tokenizer import END_OF_TEXT, train_tokenizer

TEXTS = (
    "",
    "Once upon a time",
    "  two  spaces\n\n\ttab ",
    "naïve café 東京 😀 \x00\x7f",
    "a<|endoftext|>b",
    "don't 12345",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in train_tokenizer(["Once upon a time there was a time."] * 3, 280, 64).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # transformers wants to know
    return tmp_path


def test_text_comes_back(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
        assert 0 not in ids[1:], "the marker in a text is text"
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(" time", add_special_tokens=False)) == 1, "merges were learnt"


def test_transformers_reads_the_same(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs.encode(text) == tokenizer.encode(text, parse_special=True)
        assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert theirs.eos_token == theirs.bos_token == END_OF_TEXT
    assert len(theirs) == tokenizer.vocab_size <= 280


def test_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 256.*257"):
        train_tokenizer(["text"], 256, 64)
