"""Sentencepiece `tokenizer.model` files: reads the protobuf, and encodes exactly as the sentencepiece library does.

The algorithms are those of the sentencepiece library (Kudo and Richardson, 2018): its normaliser, and its BPE and
Unigram segmenters. They are not mapped onto a `tokenizers` model, because that cannot be exact: its merges have a total
order where sentencepiece breaks equal scores by position (and merged vocabularies give thousands of pieces one score),
its charsmap works on graphemes rather than on the longest match, and its Unigram matches control pieces in plain text.
"""

from __future__ import annotations

import heapq
import math
import re
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

SPACE = "▁"
# Unigram gives a character outside the vocabulary the lowest score of all pieces less this (kUnkPenalty there).
_UNKNOWN_PENALTY = 10.0
# Words longer than this are segmented each time: they rarely repeat, and would let one text fill the cache's memory.
_MAX_CACHED_CHARS = 48
_WORD_CACHE_SIZE = 1 << 16
_FLOAT32 = struct.Struct("<f")


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class NormalizerSpec:
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


# One field of a protobuf message: varints and fixed-width values as int, length-delimited ones as bytes.
_Field = int | bytes


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("it ends inside a number")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _read_fields(data: bytes) -> Iterator[tuple[int, _Field]]:
    """Yields (field number, value) of one message in the protobuf wire format (protobuf.dev, "Encoding")."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _read_varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"it has a field of wire type {wire_type}")
        if number == 0 or position + size > len(data):
            raise ValueError("it ends inside a field")
        yield number, data[position : position + size]
        position += size


def _read_message(data: _Field | None) -> dict[int, _Field]:
    """The last value of each field, which is what protobuf keeps of a field that is not repeated."""
    if data is None:
        return {}
    return dict(_read_fields(_as_bytes(data)))


def _as_bytes(value: _Field) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has another type than in sentencepiece_model.proto")
    return value


def _as_text(value: _Field) -> str:
    try:
        return _as_bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("a piece is not UTF-8") from error


def _read_piece(data: bytes) -> Piece:
    fields = _read_message(data)
    score = _as_bytes(fields.get(2, b"\0\0\0\0"))
    if len(score) != 4:
        raise ValueError("a piece's score is not a float")
    return Piece(
        text=_as_text(fields.get(1, b"")), score=_FLOAT32.unpack(score)[0], type=PieceType(int(fields.get(3, 1)))
    )


class _Charsmap:
    """The `precompiled_charsmap`: a darts-clone double array from UTF-8 keys to offsets of NUL-ended replacements."""

    def __init__(self, blob: bytes) -> None:
        size = int.from_bytes(blob[:4], "little")
        if len(blob) < 4 or size == 0 or size % 4 or 4 + size > len(blob):
            raise ValueError("its precompiled_charsmap is truncated")
        self._units = array("I", blob[4 : 4 + size])
        if sys.byteorder == "big":
            self._units.byteswap()
        self._replacements = blob[4 + size :]

    def longest_match(self, text: bytes, start: int) -> tuple[bytes, int] | None:
        """The replacement for the longest key at `start` and that key's size in bytes."""
        units, match = self._units, None
        node = units[0]
        position = node >> 10 << ((node & 0x200) >> 6)
        for end in range(start, len(text)):
            position ^= text[end]
            if position >= len(units):
                break
            node = units[position]
            if node & 0x800000FF != text[end]:
                break
            position ^= node >> 10 << ((node & 0x200) >> 6)
            if node & 0x100:
                offset = units[position] & 0x7FFFFFFF
                replacement = self._replacements[offset : self._replacements.index(b"\0", offset)]
                match = (replacement, end + 1 - start)
        return match


class _Normalizer:
    def __init__(self, spec: NormalizerSpec, user_defined: re.Pattern[str] | None) -> None:
        self._spec = spec
        self._user_defined = user_defined
        self._charsmap = _Charsmap(spec.precompiled_charsmap) if spec.precompiled_charsmap else None

    def normalize(self, text: str, dummy_prefix: bool) -> str:
        """Applies the charsmap, the whitespace rules and the dummy prefix, and writes spaces as U+2581."""
        spec = self._spec
        if self._charsmap is None and not spec.remove_extra_whitespaces:
            return (SPACE if dummy_prefix and text else "") + text.replace(" ", SPACE)
        parts: list[str] = []
        is_after_space = spec.remove_extra_whitespaces
        is_heading = spec.remove_extra_whitespaces
        for chunk in self._chunks(text):
            if is_heading and chunk == " ":
                continue
            is_heading = False
            if is_after_space:
                chunk = chunk.lstrip(" ")
            if chunk:
                parts.append(chunk)
                is_after_space = spec.remove_extra_whitespaces and chunk.endswith(" ")
        if is_heading or not text:
            return ""
        normalized = (SPACE if dummy_prefix else "") + "".join(parts).replace(" ", SPACE)
        return normalized.rstrip(SPACE) if spec.remove_extra_whitespaces else normalized

    def _chunks(self, text: str) -> Iterator[str]:
        """The text cut where sentencepiece cuts it: user-defined symbols, replacements, single characters."""
        if self._user_defined is None:
            yield from self._replace(text)
            return
        start = 0
        for match in self._user_defined.finditer(text):
            yield from self._replace(text[start : match.start()])
            yield match.group()
            start = match.end()
        yield from self._replace(text[start:])

    def _replace(self, text: str) -> Iterator[str]:
        if self._charsmap is None:
            yield from text
            return
        data, byte_position, position = text.encode("utf-8"), 0, 0
        while position < len(text):
            match = self._charsmap.longest_match(data, byte_position)
            if match is None:
                yield text[position]
                byte_position += len(text[position].encode("utf-8"))
                position += 1
            else:
                yield match[0].decode("utf-8")
                position += len(data[byte_position : byte_position + match[1]].decode("utf-8"))
                byte_position += match[1]


class BpeSegmenter:
    """Merges the neighbours whose joined piece scores highest, the leftmost first among equals."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._ids = {piece.text: i for i, piece in enumerate(pieces) if piece.type is PieceType.NORMAL}
        # sentencepiece's agenda compares the bits of scores, so the -0.0 of a trainer's first piece is below a 0.0.
        self._scores = {
            piece.text: -5e-324 if piece.score == 0 and math.copysign(1, piece.score) < 0 else piece.score
            for piece in pieces
            if piece.type is PieceType.NORMAL
        }
        # No merge crosses from a letter to a following space mark if no piece has both, so words are independent.
        crosses_words = any(re.search(f"[^{SPACE}]{SPACE}", text) for text in self._ids)
        self._words = re.compile("(?s:.+)" if crosses_words else f"{SPACE}*[^{SPACE}]+|{SPACE}+")
        self._segment_word_cached = lru_cache(_WORD_CACHE_SIZE)(self._segment_word)

    def segment(self, text: str) -> Iterator[tuple[str, int | None]]:
        for match in self._words.finditer(text):
            word = match.group()
            yield from (self._segment_word_cached if len(word) <= _MAX_CACHED_CHARS else self._segment_word)(word)

    def _segment_word(self, word: str) -> tuple[tuple[str, int | None], ...]:
        symbols: list[str] = list(word)
        previous = list(range(-1, len(symbols) - 1))
        following = [*range(1, len(symbols)), -1]
        agenda: list[tuple[float, int, int, int]] = []

        def propose(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                merged = symbols[left] + symbols[right]
                score = self._scores.get(merged)
                if score is not None:
                    heapq.heappush(agenda, (-score, left, right, len(merged)))

        for right in range(1, len(symbols)):
            propose(right - 1, right)
        while agenda:
            _, left, right, size = heapq.heappop(agenda)
            # A symbol that was merged since this was proposed is either empty or longer.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            propose(previous[left], left)
            propose(left, following[left])
        return tuple((symbol, self._ids.get(symbol)) for symbol in symbols if symbol)


class _UnigramSegmenter:
    """Takes the segmentation of the highest total score (Viterbi), with sums in float32 as in sentencepiece.

    Known limit: in texts of many thousand characters, unknown ones among them, two segmentations whose scores differ by
    less than the rounding of the sum may be told apart otherwise than sentencepiece does.
    """

    def __init__(self, pieces: list[Piece]) -> None:
        normal_scores = [piece.score for piece in pieces if piece.type is PieceType.NORMAL]
        if not normal_scores:
            raise ValueError("it has no normal pieces")
        self._unknown_score = _to_float32(min(normal_scores) - _UNKNOWN_PENALTY)
        self._entries: dict[str, tuple[int, float]] = {}
        for i, piece in enumerate(pieces):
            if piece.type is PieceType.NORMAL:
                self._entries[piece.text] = (i, piece.score)
            elif piece.type is PieceType.USER_DEFINED:
                # Its score in the file does not count (measured on sentencepiece 0.2.3; 0.1.x had another formula).
                self._entries[piece.text] = (i, _to_float32((len(piece.text.encode("utf-8")) - 1) * 0.1))
        self._prefixes = {text[:end] for text in self._entries for end in range(1, len(text) + 1)}

    def segment(self, text: str) -> Iterator[tuple[str, int | None]]:
        # best[i] is (score, start of the last piece, its id) of the best segmentation of text[:i].
        best: list[tuple[float, int, int | None] | None] = [(0.0, 0, None)] + [None] * len(text)
        for start in range(len(text)):
            node = best[start]
            if node is None:
                continue
            score_here = node[0]
            end = start + 1
            while end <= len(text) and (candidate := text[start:end]) in self._prefixes:
                entry = self._entries.get(candidate)
                if entry is not None:
                    score = _to_float32(score_here + entry[1])
                    target = best[end]
                    if target is None or score > target[0]:
                        best[end] = (score, start, entry[0])
                end += 1
            if text[start] not in self._entries:
                score = _to_float32(score_here + self._unknown_score)
                target = best[start + 1]
                if target is None or score > target[0]:
                    best[start + 1] = (score, start, None)
        found: list[tuple[str, int | None]] = []
        end = len(text)
        while end > 0:
            node = best[end]
            if node is None:
                raise RuntimeError("every position is reachable, since each character is a piece or unknown")
            found.append((text[node[1] : end], node[2]))
            end = node[1]
        return reversed(found)


def _to_float32(value: float) -> float:
    result: float = _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    return result


class SentencePieceModel:
    """A sentencepiece model: its pieces, and text to ids.

    Supports what the llama family uses and what can be exact: BPE and Unigram models, byte fallback, user-defined
    symbols, charsmaps. Everything else raises ValueError. Source: sentencepiece_model.proto.
    """

    def __init__(self, data: bytes) -> None:
        piece_messages: list[bytes] = []
        messages: dict[int, _Field] = {}
        for number, value in _read_fields(data):
            if number == 1:
                piece_messages.append(_as_bytes(value))
            else:
                messages[number] = value
        trainer, normalizer, denormalizer = (_read_message(messages.get(number)) for number in (2, 3, 5))
        self.pieces: list[Piece] = [_read_piece(message) for message in piece_messages]
        if 2 not in messages or 3 not in messages or not self.pieces:
            raise ValueError("it lacks the pieces, trainer_spec or normalizer_spec that every sentencepiece model has")
        _refuse_unsupported(self.pieces, trainer, normalizer, denormalizer)

        self.normalizer_spec = NormalizerSpec(
            precompiled_charsmap=_as_bytes(normalizer.get(2, b"")),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        )
        self.unk_surface = _as_text(trainer.get(44, " ⁇ ".encode()))
        self.unk_id = next(i for i, piece in enumerate(self.pieces) if piece.type is PieceType.UNKNOWN)
        control_ids = {piece.text: i for i, piece in enumerate(self.pieces) if piece.type is PieceType.CONTROL}
        self.bos_id = control_ids.get(_as_text(trainer.get(46, b"<s>")))
        self.eos_id = control_ids.get(_as_text(trainer.get(47, b"</s>")))
        self.pad_id = control_ids.get(_as_text(trainer.get(48, b"<pad>")))
        self.byte_ids = _byte_ids(self.pieces) if trainer.get(35, 0) else None

        user_defined = {p.text: i for i, p in enumerate(self.pieces) if p.type is PieceType.USER_DEFINED}
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if user_defined else None
        self._normalizer = _Normalizer(self.normalizer_spec, pattern)
        is_bpe = trainer.get(3, 1) == 2
        self._segmenter = BpeSegmenter(self.pieces) if is_bpe else _UnigramSegmenter(self.pieces)
        # BPE never merges into or out of a user-defined symbol; Unigram only gives it a score.
        self._frozen = pattern if is_bpe else None
        self._frozen_ids = user_defined

    @classmethod
    def from_file(cls, path: Path) -> SentencePieceModel:
        """Reads a `tokenizer.model`. Raises ValueError, naming the file, if it is no such model or unsupported."""
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"cannot read the sentencepiece model {path}: {error}") from error

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        """Ids of plain text, without BOS or EOS. Text that spells a control piece gets ordinary pieces.

        `dummy_prefix=False` leaves out the space that the model's normaliser would put before the text.
        """
        normalized = self._normalizer.normalize(text, dummy_prefix and self.normalizer_spec.add_dummy_prefix)
        ids: list[int] = []
        for symbol, piece_id in self._segment(normalized):
            if piece_id is not None:
                ids.append(piece_id)
            elif self.byte_ids is not None:
                ids.extend(self.byte_ids[byte] for byte in symbol.encode("utf-8"))
            elif not ids or ids[-1] != self.unk_id:
                ids.append(self.unk_id)
        return ids

    def _segment(self, normalized: str) -> Iterator[tuple[str, int | None]]:
        start = 0
        for match in self._frozen.finditer(normalized) if self._frozen is not None else ():
            yield from self._segmenter.segment(normalized[start : match.start()])
            yield match.group(), self._frozen_ids[match.group()]
            start = match.end()
        yield from self._segmenter.segment(normalized[start:])


def _byte_ids(pieces: list[Piece]) -> list[int]:
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.type is PieceType.BYTE}
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    missing = [name for name in names if name not in ids]
    if missing:
        raise ValueError(f"it uses byte fallback but lacks {len(missing)} byte pieces, such as {missing[0]}")
    return [ids[name] for name in names]


def _refuse_unsupported(
    pieces: list[Piece], trainer: dict[int, _Field], normalizer: dict[int, _Field], denormalizer: dict[int, _Field]
) -> None:
    model_type = trainer.get(3, 1)
    if model_type not in (1, 2):
        name = {3: "WORD", 4: "CHAR"}.get(int(model_type), str(model_type))
        raise ValueError(f"its model_type {name} is not supported; BPE and UNIGRAM are")
    if trainer.get(24, 0):
        raise ValueError("its treat_whitespace_as_suffix=true is not supported")
    if not normalizer.get(5, 1):
        raise ValueError("its escape_whitespaces=false is not supported")
    if denormalizer.get(2):
        raise ValueError("its denormalizer_spec has a charsmap, which is not supported")
    num_unknown = sum(piece.type is PieceType.UNKNOWN for piece in pieces)
    if num_unknown != 1:
        raise ValueError(f"it has {num_unknown} unknown pieces instead of one")
    unused = [piece.text for piece in pieces if piece.type is PieceType.UNUSED]
    if unused:
        raise ValueError(f"it has unused pieces, such as {unused[0]!r}, which are not supported")
