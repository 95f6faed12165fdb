"""GGUFFile: the container of llama.cpp's models: typed metadata, and where each tensor lies.

Source: the GGUF specification (docs/gguf.md of ggml), versions 2 and 3. The reader of the `gguf` package is not used:
it makes several numpy objects for each token and merge of a vocabulary, which for Llama 3's takes 12 seconds and 700 MB
where this takes a tenth of a second. It is the oracle of the tests instead.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from puna.checkpoints.gguf_types import TensorType, tensor_type

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_DIMENSIONS: Final = 4
_DEFAULT_ALIGNMENT: Final = 32

# Value types by their number in the file: struct's letter for the fixed-size ones.
_SCALARS: Final = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_FLOAT32: Final = 6
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. `shape` is in the order of torch: the axis whose values lie side by side comes last."""

    file: Path
    type: TensorType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one row, the last axis."""
        return self.shape[-1] // self.type.block_size * self.type.block_bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def rows(self) -> npt.NDArray[np.uint8]:
        """The stored bytes [rows, row_bytes], of all leading axes as one, mapped and not read.

        A new mapping each time: pages of one that stayed would count as this process's memory.
        """
        shape = (math.prod(self.shape[:-1]), self.row_bytes)
        return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=shape)


@dataclass(frozen=True)
class _Value:
    """Where a value lies: `kind` of the value itself, or of the `count` elements of an array; `stop` is its end."""

    kind: int
    offset: int
    count: int | None
    stop: int


class GGUFFile:
    """Opens the file and checks that it is whole. Reads the metadata's values only when they are asked for.

    Raises FileNotFoundError, and ValueError for a file that is no GGUF file, of another version or byte order,
    truncated, or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        self._size = path.stat().st_size
        if self._size < 24:
            self._refuse_other_formats(path.read_bytes()[:4])
            raise self._truncated()
        self._values: dict[str, _Value] = {}
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                self.tensors: Mapping[str, TensorEntry] = self._read_header(_Cursor(data))
            except struct.error as error:
                raise self._truncated() from error

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the metadata's values, in the file's order."""
        return tuple(self._values)

    def value(self, key: str, default: Any = None) -> Any:
        """A value: bool, int, float or str; list of str, or numpy array, for an array. Raises ValueError if damaged.

        A float32 becomes the shortest decimal that rounds to it: 1e-05 and not 9.999999747378752e-06.
        """
        place = self._values.get(key)
        if place is None:
            return default
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, place.offset)
            try:
                if place.kind == _STRING:
                    return cursor.text() if place.count is None else cursor.texts(place.count)
                if place.count is not None:
                    return cursor.numbers(place.kind, place.count)
                return cursor.scalar(place.kind)
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}: {key} is not UTF-8 text: the file is damaged") from error

    def without_tensors(self, prefix: str) -> bytes:
        """A GGUF file of the values whose names begin so, and of nothing else."""
        kept = {key: place for key, place in self._values.items() if key.startswith(prefix)}
        parts = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], 0, len(kept))]
        with self.path.open("rb") as file:
            for key, place in kept.items():
                name = key.encode()
                kind = (place.kind,) if place.count is None else (_ARRAY, place.kind)
                count = b"" if place.count is None else struct.pack("<Q", place.count)
                file.seek(place.offset)
                value = file.read(place.stop - place.offset)
                parts += [struct.pack("<Q", len(name)), name, struct.pack(f"<{len(kind)}I", *kind), count, value]
        return b"".join(parts)

    def _read_header(self, cursor: _Cursor) -> dict[str, TensorEntry]:
        self._refuse_other_formats(cursor.data[:4])
        cursor.position = 4
        version = cursor.integer("I")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise ValueError(
                    f"{self.path} is a big-endian GGUF file, which puna does not read: use the little-endian one"
                )
            raise ValueError(
                f"{self.path} is of GGUF version {version}, and puna reads {_VERSIONS[0]} and {_VERSIONS[1]}: convert "
                "the model again with a current llama.cpp"
            )
        num_tensors, num_values = cursor.integer("Q"), cursor.integer("Q")
        # A value takes 13 bytes at least, and a tensor's entry 32.
        if num_values * 13 + num_tensors * 32 > self._size:
            raise self._truncated()
        for _ in range(num_values):
            key = self._name(cursor)
            if key in self._values:
                raise ValueError(f"{self.path} has the metadata {key} twice: the file is damaged")
            self._values[key] = self._skip_value(cursor, key)
        entries = [self._read_entry(cursor) for _ in range(num_tensors)]
        alignment = self.value("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}: it must be a power of two")
        start = -(-cursor.position // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, kind, shape, offset in entries:
            if name in tensors:
                raise ValueError(f"{self.path} has the tensor {name} twice: the file is damaged")
            tensors[name] = TensorEntry(self.path, kind, shape, start + offset)
            self._check_place(name, tensors[name], alignment)
        return tensors

    def _name(self, cursor: _Cursor) -> str:
        try:
            return cursor.text()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} has a name that is not UTF-8: the file is damaged") from error

    def _skip_value(self, cursor: _Cursor, key: str) -> _Value:
        kind, count = cursor.integer("I"), None
        if kind == _ARRAY:
            kind, count = cursor.integer("I"), cursor.integer("Q")
        start = cursor.position
        if kind == _STRING:
            cursor.skip_texts(1 if count is None else count)
        elif kind in _SCALARS:
            cursor.skip(struct.calcsize(_SCALARS[kind]) * (1 if count is None else count))
        else:
            what = "an array of arrays" if kind == _ARRAY else f"of the unknown type {kind}"
            raise ValueError(f"{self.path}: the metadata {key} is {what}, which puna does not read")
        return _Value(kind, start, count, cursor.position)

    def _read_entry(self, cursor: _Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
        name = self._name(cursor)
        num_dimensions = cursor.integer("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{self.path}: {name} has {num_dimensions} dimensions: the file is damaged")
        shape = tuple(cursor.integer("Q") for _ in range(num_dimensions))[::-1]
        if 0 in shape:
            raise ValueError(f"{self.path}: {name} has the shape {list(shape)}: the file is damaged")
        return name, tensor_type(cursor.integer("I")), shape, cursor.integer("Q")

    def _check_place(self, name: str, entry: TensorEntry, alignment: int) -> None:
        if not entry.type.is_supported:
            return  # its size is not known; who asks for it is refused
        if entry.shape[-1] % entry.type.block_size:
            raise ValueError(
                f"{self.path}: {name} has rows of {entry.shape[-1]} values, which {entry.type.name} cannot hold: it "
                f"has blocks of {entry.type.block_size}"
            )
        if entry.offset % alignment:
            raise ValueError(f"{self.path}: {name} is not aligned to {alignment} bytes: the file is damaged")
        if entry.offset + entry.num_bytes > self._size:
            raise self._truncated()

    def _refuse_other_formats(self, magic: bytes) -> None:
        if magic == _MAGIC:
            return
        old = " (an older format of llama.cpp)" if magic in (b"lmgg", b"fmgg", b"tjgg", b"algg") else ""
        raise ValueError(
            f"{self.path} is not a GGUF file: it starts with {magic!r}{old}, not {_MAGIC!r}: fetch it again, or give "
            "another file"
        )

    def _truncated(self) -> ValueError:
        return ValueError(f"{self.path} is truncated at {self._size} bytes: fetch it again")


class _Cursor:
    """Reads little-endian values one after another; struct.error past the end."""

    def __init__(self, data: mmap.mmap, position: int = 0) -> None:
        self.data = data
        self.position = position

    def integer(self, letter: str) -> int:
        layout = "<" + letter
        value: int = struct.unpack_from(layout, self.data, self.position)[0]
        self.position += struct.calcsize(layout)
        return value

    def scalar(self, kind: int) -> bool | int | float:
        value: bool | int | float = struct.unpack_from("<" + _SCALARS[kind], self.data, self.position)[0]
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def numbers(self, kind: int, count: int) -> npt.NDArray[Any]:
        dtype = np.dtype("<" + _SCALARS[kind] if _SCALARS[kind] != "?" else "?")
        return np.frombuffer(self.data[self.position : self.position + count * dtype.itemsize], dtype)

    def skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.data):
            raise struct.error

    def skip_texts(self, count: int) -> None:
        # A loop of its own, without calls: vocabularies have hundreds of thousands.
        data, position, unpack = self.data, self.position, _LENGTH.unpack_from
        for _ in range(count):
            position += 8 + unpack(data, position)[0]
        self.position = position
        if position > len(data):
            raise struct.error

    def text(self) -> str:
        start = self.position + 8
        self.skip_texts(1)
        return self.data[start : self.position].decode("utf-8")

    def texts(self, count: int) -> list[str]:
        start = self.position
        self.skip_texts(count)
        data, position, unpack = self.data[start : self.position], 0, _LENGTH.unpack_from
        result = []
        for _ in range(count):
            end = position + 8 + unpack(data, position)[0]
            result.append(data[position + 8 : end].decode())
            position = end
        return result


_LENGTH: Final = struct.Struct("<Q")
