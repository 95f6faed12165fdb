"""The Detokenizer: equal to a full decode, character by character, in constant work per token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from puna.engine.detokenizer import Detokenizer, make_stream_factory
from puna.engine.tokenizer import Tokenizer

from .conftest import CORPUS, TRICKY_TEXTS, metaspace_bpe_tokenizer

SaveTokenizer = Callable[..., Path]


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def test_byte_level_equals_tokenizers_on_any_ids(
    byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer
) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level))
    ids_strategy = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(ids=ids_strategy, skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        expected = byte_level.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, ids, skip)) == expected
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected

    check()


def test_byte_fallback_equals_tokenizers_where_bytes_are_text(
    byte_fallback: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer
) -> None:
    """Any mixture of pieces, specials and characters spelled in bytes; broken bytes are in the next test."""
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_fallback))
    byte_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    piece = st.integers(0, tokenizer.vocab_size - 1).filter(lambda i: i not in set(byte_ids)).map(lambda i: [i])
    character = st.characters(codec="utf-8").map(lambda c: [byte_ids[byte] for byte in c.encode()])
    space = st.just([tokenizer.token_to_id("▁")])

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(parts=st.lists(st.one_of(piece, character, space), max_size=12), skip=st.booleans())
    def check(parts: list[list[int]], skip: bool) -> None:
        ids = [token_id for part in parts for token_id in part]
        expected = byte_fallback.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, ids, skip)) == expected
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected

    check()


def test_broken_bytes_become_one_mark_each(byte_fallback: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_fallback))

    def ids(data: bytes) -> list[int]:
        return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]

    the = tokenizer.encode("the", add_special_tokens=False)
    assert stream(tokenizer, ids("é€".encode())) == ["", "é", "", "", "€", ""]
    assert stream(tokenizer, [*ids(b"\xe4\xbd"), *the])[2].startswith("\ufffd\ufffd")
    assert stream(tokenizer, ids(b"\xe4A\xf0\x9f\x98")) == ["", "\ufffdA", "", "", "", "\ufffd" * 3]
    assert "".join(stream(tokenizer, ids(b"\xed\xa0\x80\xc0\x80"))) == "\ufffd" * 5


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "sentencepiece"])
def test_characters_come_whole_and_at_once(
    kind: str, llama_model: bytes, byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer
) -> None:
    files = {"byte_level": byte_level, "byte_fallback": metaspace_bpe_tokenizer(True), "sentencepiece": llama_model}
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(files[kind]))
    for text in [*TRICKY_TEXTS, *CORPUS[:6]]:
        if "\ufffd" in text:
            continue
        if kind != "byte_level":
            text = text.replace("▁", " ")  # The mark stands for a space in these vocabularies.
        ids = tokenizer.encode(text)
        deltas = stream(tokenizer, ids)
        assert "".join(deltas) == tokenizer.decode(ids) == text
        assert "\ufffd" not in "".join(deltas)
        # Nothing is held back: before the flush, all text is out.
        assert deltas[-1] == ""


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_equals_tokenizers(scheme: str, save_tokenizer: SaveTokenizer) -> None:
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "▁▁a", "a", "▁b", "b▁", "<s>"])}
    oracle = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    oracle.decoder = decoders.Metaspace(prepend_scheme=scheme)
    oracle.add_special_tokens(["<s>"])
    _assert_equal_on_any_ids(oracle, save_tokenizer)


def test_no_decoder_equals_tokenizers(save_tokenizer: SaveTokenizer) -> None:
    oracle = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    _assert_equal_on_any_ids(oracle, save_tokenizer)


def _assert_equal_on_any_ids(oracle: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(oracle))

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, tokenizer.vocab_size), max_size=8))
    def check(ids: list[int]) -> None:
        assert "".join(stream(tokenizer, ids)) == oracle.decode(ids)

    check()


def test_work_per_token_does_not_grow(byte_level: tokenizers.Tokenizer) -> None:
    """Counts look-ups and kept state instead of time: one look-up per push, at most one unfinished character kept."""
    looked_up: list[int] = []

    def id_to_token(token_id: int) -> str | None:
        looked_up.append(token_id)
        return f"<0x{token_id:02X}>"

    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    decoding = make_stream_factory(decoder, id_to_token)(lambda token_id: False)
    for byte in "你好é".encode() * 500:
        decoding.push(byte)
        assert len(decoding._pending) < 4
    assert len(looked_up) == len(set("你好é".encode()))
