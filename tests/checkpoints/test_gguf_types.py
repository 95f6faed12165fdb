"""Each tensor type of GGUF files, on random blocks, beside the `gguf` package's dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from gguf_writer import random_blocks, write_gguf
from puna.checkpoints import Checkpoint, open_checkpoint
from puna.checkpoints.gguf_types import SUPPORTED_NAMES, tensor_type

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
GROUPS_OF_16 = ("Q2_K", "Q3_K", "Q6_K")
SYMMETRIC = ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K")
ROWS, COLUMNS = 6, 768
Make = Callable[..., Any]
NAME = "model.layers.0.mlp.gate_proj.weight"


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


def number_of(name: str) -> int:
    return int(gguf.GGMLQuantizationType[name])


def test_the_table_of_types_is_the_specification() -> None:
    for kind in gguf.GGMLQuantizationType:
        mine = tensor_type(int(kind))
        assert mine.name in (kind.name, f"type {int(kind)}")  # newer than this version of puna
        assert mine.is_supported == (kind.name in SUPPORTED_NAMES)
        if mine.is_supported:
            assert (mine.block_size, mine.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert tensor_type(77).name == "type 77"
    assert not tensor_type(77).is_supported


@pytest.mark.parametrize("name", QUANTIZED)
def test_decoding_equals_the_gguf_packages_to_the_bit(name: str) -> None:
    """The product of a K-quant's block scale and group scale is exact in float32, so the rounding is the same too."""
    rows = random_blocks(name, ROWS, COLUMNS, seed=number_of(name))
    groups = tensor_type(number_of(name)).decode(rows)
    expected = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[name]))
    assert expected.abs().max() > 0.1
    assert same_bits(groups.dequantize(), expected)
    assert len(groups.codes.unique()) == 2 ** int(name[1])
    assert groups.shape == (ROWS, COLUMNS)
    assert groups.group_size == (16 if name in GROUPS_OF_16 else 32)
    assert (groups.minimums is None) == (name in SYMMETRIC)


@pytest.fixture
def with_random_gate(tmp_path: Path, make: Make) -> Callable[[str], tuple[Checkpoint, Tensor]]:
    """A checkpoint whose gate projection [40, 512] is random blocks of a type, and its dequantised values."""

    def build(name: str) -> tuple[Checkpoint, Tensor]:
        make(hidden_size=512, intermediate_size=40, num_hidden_layers=1)
        rows = random_blocks(name, 40, 512, seed=1)
        path = tmp_path / f"{name}.gguf"
        write_gguf(tmp_path / "model", path, replaced={"blk.0.ffn_gate.weight": (rows, name)})
        return open_checkpoint(path), torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[name]))

    return build


SLICES = (
    (slice(0, 40), slice(0, 512)),
    (slice(3, 17), slice(0, 512)),
    (slice(0, 40), slice(256, 512)),
    (slice(39, 40), slice(32, 320)),
    (slice(5, 5), slice(0, 512)),
)


@pytest.mark.parametrize("name", QUANTIZED)
def test_reading_slices(name: str, with_random_gate: Callable[[str], tuple[Checkpoint, Tensor]]) -> None:
    checkpoint, expected = with_random_gate(name)
    assert checkpoint.dtype(NAME) == name
    assert checkpoint.is_quantized(NAME)
    assert checkpoint.shape(NAME) == (40, 512)
    for source in SLICES:
        dense, groups = checkpoint.read(NAME, source), checkpoint.read_quantized(NAME, source)
        assert dense.dtype == torch.float32
        assert same_bits(dense, expected[source])
        assert groups is not None
        assert same_bits(groups.dequantize(), expected[source])
    cut = (slice(0, 40), slice(7, 333))  # through the middle of groups
    assert same_bits(checkpoint.read(NAME, cut), expected[cut])
    assert checkpoint.read_quantized(NAME, cut) is None


@pytest.mark.parametrize(("name", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_float_types_keep_their_dtype(name: str, dtype: str, make: Make, tmp_path: Path) -> None:
    folder = make(dtype=getattr(torch, dtype))
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model", tmp_path / "x.gguf", name))
    source = (slice(3, 20), slice(5, 30))
    stored = folder.tensors[NAME][source]
    part = checkpoint.read(NAME, source)
    assert checkpoint.dtype(NAME) == dtype
    assert not checkpoint.is_quantized(NAME)
    assert checkpoint.read_quantized(NAME, source) is None
    assert part.dtype == getattr(torch, dtype)
    assert torch.equal(part, stored)


def test_chunks_of_rows_fit_together(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model", tmp_path / "x.gguf", "Q4_1"))
    names = [name for name in checkpoint.names if checkpoint.is_quantized(name)]
    assert any("q_proj" in name for name in names)
    for name in names:
        source = tuple(slice(0, size) for size in checkpoint.shape(name))
        whole, groups = checkpoint.read(name, source), checkpoint.read_quantized(name, source)
        monkeypatch.setattr("puna.checkpoints.gguf._CHUNK_VALUES", 64 * 7)
        assert torch.equal(checkpoint.read(name, source), whole)
        parts = checkpoint.read_quantized(name, source)
        monkeypatch.undo()
        assert groups is not None
        assert parts is not None
        assert torch.equal(parts.codes, groups.codes)
        assert torch.equal(parts.dequantize(), whole)
