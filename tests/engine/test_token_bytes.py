"""token_bytes: for every kind of tokenizer, the tokens' bytes joined are the text."""

from __future__ import annotations

import pytest
import tokenizers

from puna.engine.token_bytes import TokenBytes
from puna.engine.tokenizer import Tokenizer

from .conftest import TRICKY_TEXTS, SaveTokenizer


def joined(tokenizer: Tokenizer, text: str) -> bytes:
    table = TokenBytes(tokenizer)
    assert len(table) == tokenizer.vocab_size
    parts = [table[token_id] for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert None not in parts
    return b"".join(part for part in parts if part is not None)


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_byte_level_joins_to_the_text(
    save_tokenizer: SaveTokenizer, byte_level: tokenizers.Tokenizer, text: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level))
    assert joined(tokenizer, text).decode("utf-8") == text


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_byte_fallback_joins_to_the_text_after_the_dummy_space(
    save_tokenizer: SaveTokenizer, byte_fallback: tokenizers.Tokenizer, text: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_fallback))
    # "x" first, since some add no dummy space before a space; the mark itself and the space are one to them.
    assert joined(tokenizer, "x" + text).decode("utf-8").removeprefix(" ") == "x" + text.replace("▁", " ")


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_sentencepiece_joins_to_the_text_after_the_dummy_space(
    save_tokenizer: SaveTokenizer, llama_model: bytes, text: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(llama_model))
    assert joined(tokenizer, text).decode("utf-8").removeprefix(" ") == text.replace("▁", " ")


def test_bytes_and_parts_of_characters_are_kept(save_tokenizer: SaveTokenizer, llama_model: bytes) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(llama_model))
    table = TokenBytes(tokenizer)
    assert table[tokenizer.token_to_id("<0xE2>") or 0] == b"\xe2"
    assert {bytes((byte,)) for byte in range(256)} <= set(table)


def test_special_tokens_have_none(save_tokenizer: SaveTokenizer, byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level))
    table = TokenBytes(tokenizer)
    assert {i for i, token in enumerate(table) if token is None} == tokenizer.special_ids
    # Added, but not special: ordinary text.
    assert table[tokenizer.token_to_id("<tool_call>") or 0] == b"<tool_call>"
