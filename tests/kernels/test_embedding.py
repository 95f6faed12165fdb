"""Rows of a table: row-major in every pair of dtypes, and every format of panels, packed here from its description."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VOCABULARY: Final = 70  # two panels and a part of the third
PANELS: Final = 3
IDS: Final = (0, 69, 31, 32, 15, 16, 47, 48, 69, 5)
SIZES: Final = (1, 15, 32, 47, 64, 1023, 1060)  # inputs

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass
class Table:
    """A table as the binding takes it, and the float32 rows that it stands for."""

    data: Tensor  # uint8, on a 64-byte boundary
    rows: Tensor
    dtype: int = 0
    stride: int = 0
    is_panels: bool = True
    bits: int = 0
    groups: int = 1
    minimums: bool = False


def aligned(data: NDArray[np.generic]) -> Tensor:
    """The bytes, on a 64-byte boundary and with nothing behind them."""
    raw = torch.from_numpy(data.reshape(-1).view(np.uint8))
    room = torch.empty(raw.numel() + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return room[start : start + raw.numel()].copy_(raw)


def look_up(kernels: ModuleType, table: Table, tokens: Tensor, y: Tensor) -> None:
    kernels.embedding(
        ids=tokens.data_ptr(),
        table=table.data.data_ptr(),
        y=y.data_ptr(),
        rows=tokens.numel(),
        vocabulary=VOCABULARY,
        inputs=table.rows.shape[1],
        table_stride=table.stride,
        is_panels=table.is_panels,
        dense=table.dtype,
        bits=table.bits,
        groups=table.groups,
        minimums=table.minimums,
        y_dtype=DTYPES[y.dtype],
    )


def assert_rows(kernels: ModuleType, table: Table, dtype: torch.dtype) -> None:
    """Every row is the exact one, rounded once to `dtype`; nothing is written behind the last."""
    inputs = table.rows.shape[1]
    ids = IDS * (4 if inputs > 1000 else 1)  # from 2^15 numbers on threads share a call
    expected = table.rows[list(ids)].to(dtype)
    for threads, count in ((1, len(ids)), (2, 1), (3, len(ids))):
        kernels.set_threads(threads)
        y = torch.full((count * inputs + 64,), float("nan"), dtype=dtype)
        look_up(kernels, table, torch.tensor(ids[:count]), y)
        assert torch.equal(y[: count * inputs].view(count, inputs), expected[:count])
        assert y[count * inputs :].isnan().all()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(x: Tensor) -> NDArray[np.uint16]:
    found: NDArray[np.uint16] = x.contiguous().view(torch.int16).numpy().view(np.uint16)
    return found


@each_dtype
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_row_major(kernels: ModuleType, level: str, table_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for inputs in SIZES:
        wide = random(VOCABULARY, inputs + 3, seed=inputs).to(table_dtype)
        raw = wide.numpy() if table_dtype == torch.float32 else bits_of(wide)
        table = Table(aligned(raw), wide[:, :inputs].float(), DTYPES[table_dtype], stride=inputs + 3, is_panels=False)
        assert_rows(kernels, table, dtype)


@each_dtype
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_dense_panels(kernels: ModuleType, level: str, table_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for inputs in SIZES:
        rows = random(VOCABULARY, inputs, seed=inputs).to(table_dtype)
        number, element = np.meshgrid(np.arange(VOCABULARY), np.arange(inputs), indexing="ij")
        panel, lane = number // 32, number % 32
        if table_dtype == torch.bfloat16:
            packed: NDArray[np.generic] = np.zeros((PANELS, (inputs + 1) // 2, 2, 16, 2), np.uint16)
            packed[panel, element // 2, lane // 16, lane % 16, element % 2] = bits_of(rows)
        else:
            raw = rows.numpy() if table_dtype == torch.float32 else bits_of(rows)
            packed = np.zeros((PANELS, inputs, 32), raw.dtype)
            packed[panel, element, lane] = raw
        assert_rows(kernels, Table(aligned(packed), rows.float(), DTYPES[table_dtype]), dtype)


def group_table(inputs: int, bits: int, groups: int, minimums: bool) -> Table:
    """Random codes, scales and minimums, the codes' extremes among them."""
    generator = np.random.default_rng(inputs)
    blocks = -(-inputs // 32)
    size = 32 // groups
    codes = generator.integers(0, 1 << bits, (VOCABULARY, 32 * blocks), dtype=np.uint8)
    codes[0], codes[69] = 0, (1 << bits) - 1
    scales = (generator.normal(size=(VOCABULARY, blocks, groups)) * 0.01).astype(np.float16)
    scales[5, 0, 0] = 3e-7  # not a normal number
    lowest = generator.normal(size=(VOCABULARY, blocks, groups)).astype(np.float16)

    header = 64 * groups * (1 + minimums)
    packed = np.zeros((PANELS, blocks, header + 128 * bits), np.uint8)
    number, element = np.meshgrid(np.arange(VOCABULARY), np.arange(32 * blocks), indexing="ij")
    panel, lane, block, k = number // 32, number % 32, element // 32, element % 32
    place = header + lane // 16 * 64 + lane % 16 * 4 + k % 4
    if bits == 8:
        packed[panel, block, place + k // 4 * 128] = codes
    else:
        place = place + k // 8 * 128
        low, high = k % 8 < 4, k % 8 >= 4
        packed[panel[low], block[low], place[low]] = codes[low]
        packed[panel[high], block[high], place[high]] |= codes[high] << 4
    halves = packed[:, :, :header].reshape(PANELS, blocks, header).view(np.float16)
    number, block, group = np.meshgrid(*map(np.arange, (VOCABULARY, blocks, groups)), indexing="ij")
    halves[number // 32, block, group * 32 + number % 32] = scales
    if minimums:
        halves[number // 32, block, 32 * groups + group * 32 + number % 32] = lowest
    packed[:, :, :header] = halves.view(np.uint8)

    zero = 0 if minimums else 1 << (bits - 1)
    weight = (codes.astype(np.float32) - zero).reshape(VOCABULARY, blocks, groups, size) * scales[..., None].astype(
        np.float32
    )
    if minimums:
        weight = weight + lowest[..., None].astype(np.float32)
    rows = torch.from_numpy(weight.reshape(VOCABULARY, -1)[:, :inputs].astype(np.float32))
    return Table(aligned(packed), rows, bits=bits, groups=groups, minimums=minimums)


@each_dtype
@pytest.mark.parametrize("minimums", [False, True], ids=["symmetric", "minimums"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_group_panels(
    kernels: ModuleType, level: str, bits: int, groups: int, minimums: bool, dtype: torch.dtype
) -> None:
    for inputs in SIZES:
        assert_rows(kernels, group_table(inputs, bits, groups, minimums), dtype)


@pytest.mark.parametrize("kind", ["row-major", "dense", "groups"])
def test_ids_outside_of_the_table(kernels: ModuleType, level: str, kind: str) -> None:
    if kind == "groups":
        table = group_table(100, 4, 1, False)
    else:
        rows = random(PANELS * 32, 100)
        is_panels = kind == "dense"
        packed = rows.view(PANELS, 32, 100).transpose(1, 2) if is_panels else rows
        table = Table(aligned(packed.contiguous().numpy()), rows[:VOCABULARY], stride=100, is_panels=is_panels)
    kernels.set_threads(2)
    # The last panel has room for 96. 400 rows of 100 numbers are shared by the threads.
    for wrong in (-1, VOCABULARY, 95, 2**62, -(2**63)):
        tokens = torch.tensor([3, wrong, 4, 5] * 100)
        y = torch.full((400, 100), float("nan"))
        with pytest.raises(IndexError, match="token id"):
            look_up(kernels, table, tokens, y)
        right = torch.where((tokens == wrong)[:, None], torch.zeros(100), table.rows[tokens.clamp(0, VOCABULARY - 1)])
        assert torch.equal(y, right)


def test_a_failure_does_not_stay(kernels: ModuleType) -> None:
    table = group_table(32, 8, 1, False)
    y = torch.empty(1, 32)
    for token in (0, VOCABULARY, 0, VOCABULARY, VOCABULARY, 0):
        if token == VOCABULARY:
            with pytest.raises(IndexError):
                look_up(kernels, table, torch.tensor([token]), y)
        else:
            look_up(kernels, table, torch.tensor([token]), y)
            assert torch.equal(y[0], table.rows[0])


def test_not_a_number_keeps_its_bits_where_nothing_is_converted(kernels: ModuleType) -> None:
    raw = np.arange(VOCABULARY * 64, dtype=np.uint16).reshape(VOCABULARY, 64) + np.uint16(0x7C00)
    table = Table(aligned(raw), torch.zeros(VOCABULARY, 64), DTYPES[torch.float16], stride=64, is_panels=False)
    y = torch.empty(2, 64, dtype=torch.float16)
    look_up(kernels, table, torch.tensor([0, 9]), y)
    assert np.array_equal(bits_of(y), raw[[0, 9]])
