"""TokenBytes: the bytes that each token of a vocabulary stands for, which guided decoding matches against a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from puna.engine.tokenizer import Tokenizer


class TokenBytes(Sequence[bytes | None]):
    """For each id below `tokenizer.vocab_size` the UTF-8 (or a part of it) that the token adds to a running text.

    None for special tokens, ids without a token, and tokens without text. Space marks are spaces, also at the start
    of a text, where decoding may drop one. Each is worked out when it is asked for: a whole vocabulary of 128k takes a
    quarter of a second, which only those should wait who use a grammar.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special_ids = tokenizer.special_ids
        self._size = tokenizer.vocab_size
        self._stream = tokenizer.decode_stream(skip_special_tokens=True)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> bytes | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes | None]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes | None] | None:
        if isinstance(index, slice):
            return [self._of(token_id) for token_id in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"there is no token {index} in a vocabulary of {self._size}")
        return self._of(index % self._size)

    def _of(self, token_id: int) -> bytes | None:
        return None if token_id in self._special_ids else self._stream.token_bytes(token_id) or None
