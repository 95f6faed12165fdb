"""Chunks that are written from a pattern are those that JSON's encoder writes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from hypothesis import given
from hypothesis import strategies as st

from puna.serving.errors import dumps
from puna.serving.streaming import TextChunks


@given(st.lists(st.tuples(st.integers(0, 3), st.text())), st.text())
def test_text_chunks_are_the_same_as_whole_ones(pieces: list[tuple[int, str]], name: str) -> None:
    def make(index: int, text: str) -> dict[str, Any]:
        return {"model": name, "choices": [{"index": index, "delta": {"content": text}, "logprobs": None}]}

    chunks = TextChunks(make)
    for index, text in pieces:
        assert chunks.write(index, text) == dumps(make(index, text))
