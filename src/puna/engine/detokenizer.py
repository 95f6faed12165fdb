"""Token ids to text, one id at a time: the decoders of tokenizer files as streams, and the Detokenizer over them.

Every decoder here is a state machine that keeps at most one unfinished character, so that a stream costs the same per
token at any length, and a full decode is the same stream run to its end.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from puna.engine.tokenizer import Tokenizer

# What a token id stands for: text, a byte of a UTF-8 character (byte fallback), or nothing (a skipped or unknown id).
Piece = str | int | None
PieceLookup = Callable[[int], Piece]
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class DecodeStream(Protocol):
    def push(self, token_id: int) -> str:
        """The text that this token finishes."""

    def flush(self) -> str:
        """The text that is left: unfinished characters, as U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 of a text when it is not the text's first; empty if it adds nothing."""


class Detokenizer:
    """Turns the ids of one sequence into text as they come.

    The joined results of `push` and the final `flush` are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._stream = tokenizer.decode_stream(skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The newly finished text; empty while a character is incomplete."""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._stream.flush()


class ByteLevelStream:
    """Tokens are strings over 256 printable characters that stand for bytes (GPT-2, Llama 3, Qwen)."""

    def __init__(self, lookup: Callable[[int], bytes]) -> None:
        self._lookup = lookup
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._lookup(token_id))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

    def token_bytes(self, token_id: int) -> bytes:
        return self._lookup(token_id)


class PieceStream:
    """Tokens are text or, with byte fallback, single bytes.

    A byte that is no part of a UTF-8 character becomes one U+FFFD, as in sentencepiece. (`tokenizers` replaces every
    byte of a run if any is wrong, which would hold back whole runs and take back characters that were complete.)
    """

    def __init__(self, lookup: PieceLookup) -> None:
        self._lookup = lookup
        self._pending = b""

    def push(self, token_id: int) -> str:
        piece = self._lookup(token_id)
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._pending += bytes((piece,))
            return self._on_bytes(self._decode_pending(final=False))
        finished = self._on_bytes(self._decode_pending(final=True)) if self._pending else ""
        return finished + self._on_piece(piece)

    def flush(self) -> str:
        return self._on_bytes(self._decode_pending(final=True))

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._lookup(token_id)
        if isinstance(piece, int):
            return bytes((piece,))
        return b"" if piece is None else self._inside_text(piece).encode("utf-8")

    def _decode_pending(self, final: bool) -> str:
        text = ""
        while self._pending:
            try:
                decoded, size = codecs.utf_8_decode(self._pending, "strict", final)
            except UnicodeDecodeError as error:
                text += self._pending[: error.start].decode("utf-8") + "\ufffd"
                self._pending = self._pending[error.start + 1 :]
                continue
            self._pending = self._pending[size:]
            return text + decoded
        return text

    def _inside_text(self, piece: str) -> str:
        return piece

    def _on_piece(self, text: str) -> str:
        return text

    def _on_bytes(self, text: str) -> str:
        return text


class StrippedStream(PieceStream):
    """Drops up to `count` times `content` from the start of the text (a `Strip` decoder after `Fuse`)."""

    def __init__(self, lookup: PieceLookup, content: str, count: int) -> None:
        super().__init__(lookup)
        self._content = content
        self._count = count

    def _on_piece(self, text: str) -> str:
        while self._count and text:
            if not text.startswith(self._content):
                self._count = 0
                break
            text = text[1:]
            self._count -= 1
        return text

    _on_bytes = _on_piece


class MetaspaceStream(PieceStream):
    """Writes the space mark as a space, and drops it from the first token if the encoder put one there."""

    def __init__(self, lookup: PieceLookup, replacement: str, drop_first: bool) -> None:
        super().__init__(lookup)
        self._replacement = replacement
        self._drops = drop_first

    def _on_piece(self, text: str) -> str:
        space = "" if self._drops else " "
        self._drops = False
        return text.replace(self._replacement, space)

    def _inside_text(self, piece: str) -> str:
        return piece.replace(self._replacement, " ")


class SpacedStream(PieceStream):
    """Joins tokens with spaces: what `tokenizers` does for a file that has no decoder."""

    _is_first = True

    def _on_piece(self, text: str) -> str:
        separator = "" if self._is_first else " "
        self._is_first = False
        return separator + text

    def _inside_text(self, piece: str) -> str:
        return " " + piece


class SentencePieceStream(PieceStream):
    """sentencepiece's decoding: the space that the dummy prefix put before the text is taken off again."""

    def __init__(self, lookup: PieceLookup, space: str, strips: bool, strips_until_text: bool) -> None:
        super().__init__(lookup)
        self._space = space
        self._strips = strips
        # With remove_extra_whitespaces every piece before the first text loses a space, otherwise only one piece does.
        self._strips_until_text = strips_until_text

    def _on_piece(self, text: str) -> str:
        if self._strips:
            if text.startswith(self._space):
                text = text[len(self._space) :]
                self._strips = self._strips_until_text and not text
            elif text:
                self._strips = False
        return text.replace(self._space, " ")

    def _inside_text(self, piece: str) -> str:
        return piece.replace(self._space, " ")

    def _on_bytes(self, text: str) -> str:
        if text:
            self._strips = False
        return text


def byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2): itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def make_stream_factory(
    decoder: Mapping[str, Any] | None, id_to_token: Callable[[int], str | None]
) -> Callable[[Callable[[int], bool]], DecodeStream]:
    """A constructor of streams for the `decoder` of a tokenizer.json; its argument says which ids to skip.

    Raises ValueError, naming it, for a decoder that this cannot stream exactly.
    """
    steps = _flatten(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_factory(id_to_token)

    token_of: dict[int, Piece] = {}
    replacements: list[tuple[str, str]] = []
    while kinds and kinds[0] == "Replace":
        pattern = steps[0]["pattern"].get("String")
        if pattern is None:
            raise ValueError("its Replace decoder has a regular expression, which is not supported")
        replacements.append((pattern, steps[0]["content"]))
        steps, kinds = steps[1:], kinds[1:]
    has_byte_fallback = kinds[:1] == ["ByteFallback"]
    if has_byte_fallback:
        steps, kinds = steps[1:], kinds[1:]

    def read_piece(token_id: int) -> Piece:
        token = id_to_token(token_id)
        if token is None:
            return None
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        byte = _BYTE_PIECE.fullmatch(token) if has_byte_fallback else None
        return int(byte.group(1), 16) if byte else token

    def lookup_unless(is_skipped: Callable[[int], bool]) -> PieceLookup:
        def lookup(token_id: int) -> Piece:
            if is_skipped(token_id):
                return None
            if token_id not in token_of:
                token_of[token_id] = read_piece(token_id)
            return token_of[token_id]

        return lookup

    if not replacements and not has_byte_fallback:
        if not kinds:
            return lambda is_skipped: SpacedStream(lookup_unless(is_skipped))
        if kinds == ["Metaspace"]:
            mark = steps[0]["replacement"]
            drop_first = steps[0].get("prepend_scheme", "always") != "never"
            return lambda is_skipped: MetaspaceStream(lookup_unless(is_skipped), mark, drop_first)
    if kinds == ["Fuse", "Strip"] and steps[1]["stop"] == 0:
        content, count = steps[1]["content"], steps[1]["start"]
        return lambda is_skipped: StrippedStream(lookup_unless(is_skipped), content, count)
    if kinds in ([], ["Fuse"]):
        return lambda is_skipped: PieceStream(lookup_unless(is_skipped))
    raise ValueError(f"its decoder {' + '.join(step['type'] for step in _flatten(decoder))} is not supported")


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


def _byte_level_factory(
    id_to_token: Callable[[int], str | None],
) -> Callable[[Callable[[int], bool]], DecodeStream]:
    alphabet = byte_level_alphabet()
    bytes_of: dict[int, bytes] = {}

    def read_bytes(token_id: int) -> bytes:
        token = id_to_token(token_id) or ""
        # Added tokens are plain text: one with a character outside of the alphabet is not byte-level.
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return token.encode("utf-8")

    def make(is_skipped: Callable[[int], bool]) -> DecodeStream:
        def lookup(token_id: int) -> bytes:
            if is_skipped(token_id):
                return b""
            if token_id not in bytes_of:
                bytes_of[token_id] = read_bytes(token_id)
            return bytes_of[token_id]

        return ByteLevelStream(lookup)

    return make
