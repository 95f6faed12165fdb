"""The bytes that each token of a vocabulary stands for, which is what guided decoding matches against a grammar."""

from __future__ import annotations

from puna.engine.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """For each id below `tokenizer.vocab_size` the UTF-8 (or a part of it) that the token adds to a running text.

    None for special tokens, ids without a token, and tokens without text. Space marks are spaces, also at the start
    of a text, where decoding may drop one.
    """
    stream = tokenizer.decode_stream(skip_special_tokens=True)
    return [
        None if token_id in tokenizer.special_ids or not (text := stream.token_bytes(token_id)) else text
        for token_id in range(tokenizer.vocab_size)
    ]
