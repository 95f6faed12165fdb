"""The tokenizer of a GGUF file: text to ids as llama.cpp does it, for the sentencepiece kind and the byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from puna.checkpoints.gguf_file import GGUFFile
from puna.checkpoints.gguf_vocabulary import GGUFVocabulary, TokenType, read_vocabulary
from puna.engine.detokenizer import ByteLevelStream, DecodeStream, SentencePieceStream, byte_level_alphabet
from puna.engine.detokenizer import Piece as DecodedPiece
from puna.engine.pre_tokenizers import PRE_TOKENIZERS
from puna.engine.sentencepiece_model import SPACE, BpeSegmenter, Piece, PieceType

_HIDDEN = (TokenType.CONTROL, TokenType.UNKNOWN)


class _Encoder(Protocol):
    """Plain text to ids, and back."""

    adds_bos: bool

    def encode(self, text: str, follows_text: bool) -> list[int]:
        """Ids of a text without special tokens. `follows_text`: it is not the first, and no token stands before it."""
        ...

    def decode_stream(self, skipped: frozenset[int]) -> DecodeStream: ...


class GGUFTokenizer:
    """Encodes and decodes as llama.cpp does; `puna.engine.tokenizer.Tokenizer` is the class to use it through.

    One thing is not as there: text that spells a control token is never that token unless `parse_special` is given.
    llama.cpp lets merges make it in some vocabularies.
    """

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError, and ValueError for a vocabulary that is damaged or of an unsupported kind."""
        vocabulary = read_vocabulary(GGUFFile(path))
        self.chat_templates = vocabulary.chat_templates
        self.vocab_size = len(vocabulary.tokens)
        self.named_ids = dict(vocabulary.named_ids)
        self._tokens = vocabulary.tokens
        self._ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        self.special_ids = frozenset(number for number, kind in enumerate(vocabulary.types) if kind in _HIDDEN)
        # llama.cpp looks for the longest in the whole text first, then for the next, whatever comes first in the text.
        found = sorted(
            (number for number, kind in enumerate(vocabulary.types) if kind in (*_HIDDEN, TokenType.USER_DEFINED)),
            key=lambda number: len(vocabulary.tokens[number].encode()),
            reverse=True,
        )
        self._found = tuple((vocabulary.tokens[number], number) for number in found)
        self._always_found = tuple((token, number) for token, number in self._found if number not in self.special_ids)
        self._encoder: _Encoder
        if vocabulary.model == "llama":
            self._encoder = _SentencePieceEncoder(vocabulary)
        else:
            try:
                self._encoder = _ByteLevelEncoder(vocabulary)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        adds_bos = self._encoder.adds_bos if vocabulary.add_bos is None else vocabulary.add_bos
        bos, eos = self.named_ids.get("bos_token"), self.named_ids.get("eos_token")
        self.prefix = [bos] if adds_bos and bos is not None else []
        self.suffix = [eos] if vocabulary.add_eos and eos is not None else []

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        follows_text = False
        for part in _split_at(text, self._found if parse_special else self._always_found):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encoder.encode(part, follows_text)
            follows_text = isinstance(part, str)
        return ids

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokens[token_id] if 0 <= token_id < self.vocab_size else None

    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream:
        return self._encoder.decode_stream(self.special_ids if skip_special_tokens else frozenset())


def _split_at(text: str, tokens: Iterable[tuple[str, int]]) -> list[str | int]:
    """The text with the tokens in it as their ids, without empty parts."""
    parts: list[str | int] = [text] if text else []
    for token, number in tokens:
        if token not in text:
            continue
        cut: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            first, *others = part.split(token)
            cut += [first] if first else []
            for other in others:
                cut += [number, other] if other else [number]
        parts = cut
    return parts


class _SentencePieceEncoder:
    adds_bos = True

    def __init__(self, vocabulary: GGUFVocabulary) -> None:
        # Unused pieces take part in merges there; other kinds do not come out of plain text.
        plain = (TokenType.NORMAL, TokenType.UNUSED)
        pieces = [
            # The sum makes 0.0 of -0.0, which llama.cpp does not tell apart as sentencepiece does.
            Piece(token, score + 0.0, PieceType.NORMAL if kind in plain else PieceType.CONTROL)
            for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
        ]
        self._segmenter = BpeSegmenter(pieces)
        ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        unknown = vocabulary.named_ids.get("unk_token")
        self._byte_ids = [ids.get(f"<0x{byte:02X}>", ids.get(chr(byte), unknown)) for byte in range(256)]
        self._adds_space = vocabulary.add_space_prefix is not False
        self._vocabulary = vocabulary

    def encode(self, text: str, follows_text: bool) -> list[int]:
        ids: list[int] = []
        prefix = SPACE if self._adds_space and not follows_text else ""
        for symbol, number in self._segmenter.segment(prefix + text.replace(" ", SPACE)):
            if number is not None:
                ids.append(number)
            else:
                byte_ids = (self._byte_ids[byte] for byte in symbol.encode("utf-8"))
                ids += [byte_id for byte_id in byte_ids if byte_id is not None]
        return ids

    def decode_stream(self, skipped: frozenset[int]) -> DecodeStream:
        tokens, types = self._vocabulary.tokens, self._vocabulary.types

        def lookup(token_id: int) -> DecodedPiece:
            if token_id in skipped or not 0 <= token_id < len(tokens) or types[token_id] is TokenType.UNUSED:
                return None
            token = tokens[token_id]
            return int(token[3:5], 16) if types[token_id] is TokenType.BYTE else token

        return SentencePieceStream(lookup, SPACE, self._adds_space, False)


class _ByteLevelEncoder:
    def __init__(self, vocabulary: GGUFVocabulary) -> None:
        """Raises ValueError for an unknown pre-tokenizer."""
        if vocabulary.pre not in PRE_TOKENIZERS:
            raise ValueError(
                f"the pre-tokenizer {vocabulary.pre!r} is not supported: puna knows {', '.join(PRE_TOKENIZERS)}"
            )
        rule = PRE_TOKENIZERS[vocabulary.pre]
        self.adds_bos = rule.adds_bos
        # Without the special tokens, so that no text can be one; merges that lead to them go with them.
        plain = {
            token: number
            for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            if kind not in _HIDDEN
        }
        self._tokenizer = tokenizers.Tokenizer(_build_bpe(plain, vocabulary.merges, rule.ignore_merges))
        self._tokenizer.pre_tokenizer = rule.build()
        self._vocabulary = vocabulary

    def encode(self, text: str, follows_text: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode_stream(self, skipped: frozenset[int]) -> DecodeStream:
        tokens, types = self._vocabulary.tokens, self._vocabulary.types
        alphabet = byte_level_alphabet()

        def lookup(token_id: int) -> bytes:
            if token_id in skipped or not 0 <= token_id < len(tokens) or types[token_id] is TokenType.UNUSED:
                return b""
            token = tokens[token_id]
            if types[token_id] is TokenType.NORMAL and all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode("utf-8")

        return ByteLevelStream(lookup)


def _build_bpe(vocabulary: dict[str, int], merges: Sequence[str], ignore_merges: bool) -> tokenizers.models.BPE:
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    try:
        return tokenizers.models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges)
    except Exception:  # The library raises bare Exceptions: here for a merge of, or to, what is no token.
        known = [(a, b) for a, b in pairs if a in vocabulary and b in vocabulary and a + b in vocabulary]
        return tokenizers.models.BPE(vocab=vocabulary, merges=known, ignore_merges=ignore_merges)
