"""Packing into panels and back, against the layout of csrc/kernels/args.h written out in numpy."""

from __future__ import annotations

from types import ModuleType
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

INPUTS: Final = (32, 96, 50, 17)
DENSE: Final = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}  # uint16: bfloat16's bits
OUTPUTS: Final = 75  # two panels and a part of the third

each_bits = pytest.mark.parametrize("bits", [8, 4])
each_groups = pytest.mark.parametrize("groups", [1, 2])
each_kind = pytest.mark.parametrize("minimums", [False, True], ids=["symmetric", "minimums"])
each_inputs = pytest.mark.parametrize("inputs", INPUTS)


def cleared(size: int) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """Zeros on a 64-byte boundary: what keeps them alive, and a view."""
    room = torch.zeros(size + 64, dtype=torch.uint8)
    view = room[-room.data_ptr() % 64 :][:size]
    return room, view.numpy()


def address(array: NDArray[np.generic] | None) -> int:
    return 0 if array is None else array.ctypes.data


def expected_groups(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], minimums: NDArray[np.float32] | None, bits: int, groups: int
) -> NDArray[np.uint8]:
    """The panels of codes [N, E] and of one scale and minimum for each of ceil(E * groups / 32) groups."""
    outputs, inputs = codes.shape
    blocks, padded = -(-inputs // 32), -(-outputs // 32) * 32
    wide = np.zeros((padded, blocks * 32), np.uint8)
    wide[:outputs, :inputs] = codes
    parts = []
    for values in (scales, minimums):
        if values is not None:
            halves = np.zeros((padded, blocks * groups), np.float16)
            halves[:outputs, : values.shape[1]] = values
            # panel, output, block, group -> panel, block, group, output
            parts.append(halves.reshape(-1, 32, blocks, groups).transpose(0, 2, 3, 1).copy().view(np.uint8))
    # panel, half, lane, block, quad, input -> panel, block, quad, half, lane, input
    quads = wide.reshape(-1, 2, 16, blocks, 8, 4).transpose(0, 3, 4, 1, 2, 5)
    parts.append(quads if bits == 8 else quads[:, :, 0::2] | quads[:, :, 1::2] << 4)
    panels = padded // 32
    return np.concatenate([part.reshape(panels, blocks, -1) for part in parts], axis=2).reshape(-1)


@each_bits
@each_groups
@each_kind
@each_inputs
@pytest.mark.parametrize("repeat", [1, 4])
def test_groups(kernels: ModuleType, bits: int, groups: int, minimums: bool, inputs: int, repeat: int) -> None:
    generator = np.random.default_rng(inputs + bits)
    own, size = 32 // groups, 32 // groups * repeat
    codes = generator.integers(0, 1 << bits, (OUTPUTS, inputs), np.uint8)
    shape = (OUTPUTS, -(-inputs // size))
    # Ordinary numbers, some that are denormal in fp16, and some beyond it; none exactly fp16.
    magnitudes = generator.choice(np.array([1e-8, 1e-6, 3e-5, 1.0, 700.0, 1e5]), shape)
    scales = (generator.standard_normal(shape) * magnitudes).astype(np.float32)
    lows = generator.standard_normal(shape).astype(np.float32) if minimums else None

    def per_own_group(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(values, repeat, axis=1)[:, : -(-inputs // own)]

    with np.errstate(over="ignore"):
        expected = expected_groups(
            codes, per_own_group(scales), None if lows is None else per_own_group(lows), bits, groups
        )
    _room, panels = cleared(kernels.panel_bytes(OUTPUTS, inputs, 0, bits, groups, minimums))
    assert panels.size == expected.size
    # In three ranges of rows, as a layer comes from several tensors; the last first, to show that none touches another.
    for first, last in ((40, OUTPUTS), (0, 7), (7, 40)):
        part = codes[first:last].copy()
        part_scales, part_lows = scales[first:last].copy(), None if lows is None else lows[first:last].copy()
        kernels.pack_groups(
            address(part),
            address(part_scales),
            address(part_lows),
            size,
            address(panels),
            inputs,
            first,
            last - first,
            bits,
            groups,
        )
    np.testing.assert_array_equal(panels, expected)

    codes_back = np.full((33, inputs), 255, np.uint8)
    scales_back = np.full((33, -(-inputs // own)), np.nan, np.float32)
    lows_back = np.full_like(scales_back, np.nan) if minimums else None
    kernels.unpack_groups(
        address(codes_back), address(scales_back), address(lows_back), address(panels), inputs, 20, 33, bits, groups
    )
    np.testing.assert_array_equal(codes_back, codes[20:53])
    with np.errstate(over="ignore"):
        halves = per_own_group(scales)[20:53].astype(np.float16)
        np.testing.assert_array_equal(scales_back, halves.astype(np.float32))
        if lows is not None:
            np.testing.assert_array_equal(lows_back, per_own_group(lows)[20:53].astype(np.float16).astype(np.float32))


def test_every_fp16_comes_back(kernels: ModuleType) -> None:
    """All 65536 of them as scales: to float32 and back to the same bits, but for the payloads of NaN."""
    bits = np.arange(65536, dtype=np.uint16)
    scales = bits.view(np.float16).astype(np.float32).reshape(-1, 1)
    codes = np.zeros((65536, 32), np.uint8)
    _room, panels = cleared(kernels.panel_bytes(65536, 32, 0, 4, 1, False))
    kernels.pack_groups(address(codes), address(scales), 0, 32, address(panels), 32, 0, 65536, 4, 1)
    stored = panels.reshape(-1, 576)[:, :64].copy().view(np.uint16).reshape(-1)
    numbers = ~np.isnan(scales.reshape(-1))
    np.testing.assert_array_equal(stored[numbers], bits[numbers])
    assert np.isnan(stored[~numbers].view(np.float16)).all()
    back = np.zeros_like(scales)
    kernels.unpack_groups(address(codes), address(back), 0, address(panels), 32, 0, 65536, 4, 1)
    np.testing.assert_array_equal(back, scales)


@pytest.mark.parametrize("dtype", DENSE, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("inputs", [1, 7, 130])
def test_dense(kernels: ModuleType, dtype: np.dtype[np.generic], inputs: int) -> None:
    generator = np.random.default_rng(inputs)
    stride = inputs + 3
    weight = generator.integers(0, 256, (OUTPUTS, stride * dtype.itemsize), np.uint8).view(dtype)
    pair = 2 if dtype == np.uint16 else 1
    wide = np.zeros((-(-OUTPUTS // 32) * 32, -(-inputs // pair) * pair), dtype)
    wide[:OUTPUTS, :inputs] = weight[:, :inputs]
    expected = wide.reshape(-1, 32, wide.shape[1] // pair, pair).transpose(0, 2, 1, 3).copy().view(np.uint8).reshape(-1)

    number = DENSE[dtype]
    _room, panels = cleared(kernels.panel_bytes(OUTPUTS, inputs, number, 0, 1, False))
    assert panels.size == expected.size
    for first, last in ((33, OUTPUTS), (0, 33)):
        kernels.pack_dense(address(weight[first:last]), stride, address(panels), inputs, first, last - first, number)
    np.testing.assert_array_equal(panels, expected)
    back = np.zeros((40, stride), dtype)
    kernels.unpack_dense(address(back), stride, address(panels), inputs, 30, 40, number)
    np.testing.assert_array_equal(back[:, :inputs].view(np.uint8), weight[30:70, :inputs].copy().view(np.uint8))
    assert not back[:, inputs:].view(np.uint8).any()


def test_refusals(kernels: ModuleType) -> None:
    codes, scales = np.zeros((1, 32), np.uint8), np.zeros((1, 2), np.float32)
    room, panels = cleared(kernels.panel_bytes(32, 32, 0, 8, 1, False))
    good = (address(codes), address(scales), 0, 32, address(panels), 32, 0, 1, 8, 1)
    kernels.pack_groups(*good)
    for index, value, match in (
        (0, 0, "codes is null"),
        (1, address(scales) + 1, "scales is not aligned"),
        (3, 16, "group_size"),
        (4, address(panels) + 32, "panels is not aligned"),
        (5, 0, "inputs"),
        (6, -1, "first_row"),
        (8, 5, "bits"),
        (8, 0, "bits"),
        (9, 3, "groups"),
    ):
        bad = [*good]
        bad[index] = value
        with pytest.raises(ValueError, match=match):
            kernels.pack_groups(*bad)
    del room
