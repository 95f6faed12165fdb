"""The container of GGUF files beside the `gguf` package's reader and writer, and files that are damaged."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from puna.checkpoints.gguf_file import GGUFFile


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def container(
    pairs: list[bytes], entries: list[bytes], data: bytes = b"", version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(entries), len(pairs)) + b"".join(pairs) + b"".join(entries)
    return head + b"\0" * (-len(head) % 32) + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


VALUES: dict[str, tuple[gguf.GGUFValueType, Any]] = {
    "a.uint8": (gguf.GGUFValueType.UINT8, 255),
    "a.int8": (gguf.GGUFValueType.INT8, -128),
    "a.uint16": (gguf.GGUFValueType.UINT16, 65535),
    "a.int16": (gguf.GGUFValueType.INT16, -32768),
    "a.uint32": (gguf.GGUFValueType.UINT32, 2**32 - 1),
    "a.int32": (gguf.GGUFValueType.INT32, -(2**31)),
    "a.uint64": (gguf.GGUFValueType.UINT64, 2**64 - 1),
    "a.int64": (gguf.GGUFValueType.INT64, -(2**63)),
    "a.float64": (gguf.GGUFValueType.FLOAT64, 1e-300),
    "a.true": (gguf.GGUFValueType.BOOL, True),
    "a.false": (gguf.GGUFValueType.BOOL, False),
    "a.text": (gguf.GGUFValueType.STRING, "Über 你好 \n\0 🇩🇪"),
    "a.empty": (gguf.GGUFValueType.STRING, ""),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    for name, (kind, value) in VALUES.items():
        writer.add_key_value(name, value, kind)
    writer.add_array("a.strings", ["", "x", "日本語", "a b"])
    writer.add_array("a.integers", [1, -2, 3])
    writer.add_array("a.floats", [0.1, -0.0, 1e-9])
    writer.add_float32("a.eps", 1e-5)
    generator = np.random.default_rng(0)
    writer.add_tensor("matrix", generator.standard_normal((6, 40), dtype=np.float32))
    writer.add_tensor("vector", generator.standard_normal(7, dtype=np.float32))
    writer.add_tensor("half", generator.standard_normal((2, 3, 5)).astype(np.float16))
    codes = gguf.quantize(generator.standard_normal((4, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("codes", codes, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "all.gguf"


def test_metadata_is_what_was_written(written: Path) -> None:
    file = GGUFFile(written)
    for name, (_, value) in VALUES.items():
        assert file.value(name) == value
        assert type(file.value(name)) is type(value)
        assert name in file
    assert file.value("a.strings") == ["", "x", "日本語", "a b"]
    assert file.value("a.integers").tolist() == [1, -2, 3]
    np.testing.assert_array_equal(file.value("a.floats"), np.array([0.1, -0.0, 1e-9], dtype=np.float32))
    assert file.value("a.eps") == 1e-5  # and not the float32's 9.99999974e-06
    assert file.value("general.architecture") == "llama"
    assert file.value("a.nothing") is None
    assert file.value("a.nothing", 7) == 7
    assert "a.nothing" not in file
    assert set(file.keys) >= set(VALUES)


def test_tensors_are_where_the_gguf_package_finds_them(written: Path) -> None:
    file, reader = GGUFFile(written), gguf.GGUFReader(written)
    assert set(file.tensors) == {tensor.name for tensor in reader.tensors} == {"matrix", "vector", "half", "codes"}
    for tensor in reader.tensors:
        mine = file.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.offset == tensor.data_offset
        assert mine.num_bytes == tensor.n_bytes
        assert mine.type.name == tensor.tensor_type.name
        assert mine.rows().tobytes() == tensor.data.tobytes()


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    data = np.arange(8, dtype="<f4").tobytes()
    for alignment in (8, 64):
        pairs = [pair("general.alignment", 4, struct.pack("<I", alignment))]
        head = b"GGUF" + struct.pack("<IQQ", 2, 1, 1) + pairs[0] + entry("x", (8,), 0, 0)
        file = GGUFFile(write(tmp_path / "x.gguf", head + b"\0" * (-len(head) % alignment) + data))
        assert file.tensors["x"].rows().tobytes() == data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file: it starts with b''"),
        (b"PK\3\4" + b"\0" * 40, r"is not a GGUF file: it starts with b'PK\\x03\\x04'"),
        (container([], [], magic=b"tjgg"), "an older format of llama.cpp"),
        (b"GGUF\3\0\0\0", "is truncated at 8 bytes"),
        (container([], [], version=1), "is of GGUF version 1, and puna reads 2 and 3: convert the model again"),
        (container([], [], version=4), "is of GGUF version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "is truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "is truncated"),
        (container([pair("a", 8, struct.pack("<Q", 2**60))], []), "is truncated"),
        (container([pair("a", 9, struct.pack("<IQ", 4, 2**61))], []), "is truncated"),
        (container([pair("a", 9, struct.pack("<IQ", 8, 2**61))], []), "is truncated"),
        (container([pair("a", 4, b"\1\0\0\0")] * 2, []), "has the metadata a twice"),
        (container([pair("a", 9, struct.pack("<IQ", 9, 1))], []), "the metadata a is an array of arrays"),
        (container([pair("a", 77, b"")], []), "the metadata a is of the unknown type 77"),
        (container([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)], []), "a name that is not UTF-8"),
        (container([pair("general.alignment", 4, struct.pack("<I", 24))], []), "general.alignment is 24"),
        (container([pair("general.alignment", 8, text("x"))], []), "general.alignment is 'x'"),
        (container([], [entry("x", (8,), 0, 0)] * 2, bytes(32)), "has the tensor x twice"),
        (container([], [entry("x", (1, 1, 1, 1, 1), 0, 0)], bytes(32)), "x has 5 dimensions"),
        (container([], [entry("x", (), 0, 0)], bytes(32)), "x has 0 dimensions"),
        (container([], [entry("x", (4, 0), 0, 0)], bytes(32)), r"x has the shape \[0, 4\]"),
        (container([], [entry("x", (8,), 0, 4)], bytes(64)), "x is not aligned to 32 bytes"),
        (container([], [entry("x", (48, 2), 2, 0)], bytes(64)), "x has rows of 48 values, which Q4_0 cannot hold"),
        (container([], [entry("x", (8,), 0, 0)], bytes(31)), "is truncated"),
        (container([], [entry("x", (2**40, 2**40), 0, 0)], bytes(31)), "is truncated"),
        (container([], [entry("x", (8,), 0, 2**63)], bytes(32)), "is truncated"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = write(tmp_path / "x.gguf", content)
    with pytest.raises(ValueError, match=message) as refusal:
        GGUFFile(file)
    assert str(file) in str(refusal.value)


def test_a_value_that_is_not_text(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path / "x.gguf", container([pair("a", 8, struct.pack("<Q", 1) + b"\xff")], [])))
    with pytest.raises(ValueError, match="a is not UTF-8 text"):
        file.value("a")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf does not exist"):
        GGUFFile(tmp_path / "none.gguf")


def test_every_truncation_is_refused(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    end = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(written).tensors)
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 900, 7), *range(900, end, 41), end - 1]:
        with pytest.raises(ValueError, match=r"is truncated|is not a GGUF file"):
            GGUFFile(write(cut, content[:size]))


def test_random_damage_gives_nothing_but_refusals(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    generator = random.Random(0)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(1200)] = generator.randrange(256)
        try:
            file = GGUFFile(write(damaged, bytes(changed)))
            for key in file.keys:
                file.value(key)
            for tensor in file.tensors.values():
                if tensor.type.is_supported:
                    assert tensor.rows().nbytes == tensor.num_bytes
        except ValueError:
            refused += 1
    assert 100 < refused < 400
