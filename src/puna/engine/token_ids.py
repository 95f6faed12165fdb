"""token_id_tokenizer: what stands in for a tokenizer where prompts are token ids and nobody reads the text."""

from __future__ import annotations

from puna.engine.detokenizer import DecodeStream
from puna.engine.tokenizer import Tokenizer


def token_id_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer for a model that has none, such as one of random weights. Token 7 reads "<7>"; encoding a text raises
    ValueError.
    """
    return Tokenizer(_TokenIds(vocab_size), {})


class _TokenIds:
    def __init__(self, vocab_size: int) -> None:
        self.prefix: list[int] = []
        self.suffix: list[int] = []
        self.named_ids: dict[str, int] = {}
        self.special_ids: frozenset[int] = frozenset()
        self.vocab_size = vocab_size

    def encode(self, text: str, parse_special: bool) -> list[int]:
        raise ValueError("this model has no tokenizer: give the prompt as token ids")

    def token_to_id(self, token: str) -> int | None:
        number = token.removeprefix("<").removesuffix(">")
        known = number.isdecimal() and token == f"<{int(number)}>" and int(number) < self.vocab_size
        return int(number) if known else None

    def id_to_token(self, token_id: int) -> str | None:
        return f"<{token_id}>" if 0 <= token_id < self.vocab_size else None

    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream:
        return _TokenIdStream()


class _TokenIdStream:
    def push(self, token_id: int) -> str:
        return f"<{token_id}>"

    def flush(self) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return f"<{token_id}>".encode()
