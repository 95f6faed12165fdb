"""GroupQuantized beside numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from puna.quantization.groups import GroupQuantized


def _random(rows: int, groups: int, size: int, zero: int, with_minimums: bool) -> GroupQuantized:
    generator = torch.Generator().manual_seed(rows * groups + size)
    codes = torch.randint(0, 256, (rows, groups * size), generator=generator, dtype=torch.uint8)
    scales = torch.randn(rows, groups, generator=generator)
    minimums = torch.randn(rows, groups, generator=generator) if with_minimums else None
    return GroupQuantized(codes, scales, minimums, zero, size)


@pytest.mark.parametrize("with_minimums", [False, True])
@pytest.mark.parametrize(("rows", "groups", "size"), [(3, 2, 32), (1, 1, 16), (5, 7, 128), (0, 2, 32), (4, 0, 32)])
def test_dequantize_is_the_formula(rows: int, groups: int, size: int, with_minimums: bool) -> None:
    quantized = _random(rows, groups, size, zero=128, with_minimums=with_minimums)
    codes = quantized.codes.numpy().astype(np.float64).reshape(rows, groups, size)
    expected = quantized.scales.numpy().astype(np.float64)[..., None] * (codes - 128)
    if quantized.minimums is not None:
        expected += quantized.minimums.numpy().astype(np.float64)[..., None]
    weight = quantized.dequantize()
    assert weight.dtype == torch.float32
    assert weight.shape == quantized.shape == (rows, groups * size)
    # Two roundings of values below 255 * 4.
    np.testing.assert_allclose(weight.numpy(), expected.reshape(rows, groups * size), rtol=0, atol=255 * 4 * 2.0**-23)


@pytest.mark.parametrize("with_minimums", [False, True])
@pytest.mark.parametrize("rows", [3, 0])
def test_padding_is_rows_of_zeros(rows: int, with_minimums: bool) -> None:
    quantized = _random(rows, 2, 32, zero=8, with_minimums=with_minimums)
    padded = quantized.padded(2)
    assert padded.shape == (rows + 2, 64)
    assert torch.equal(padded.dequantize()[:rows], quantized.dequantize())
    assert not padded.dequantize()[rows:].any()


def test_dequantize_leaves_the_codes_alone() -> None:
    quantized = _random(2, 2, 32, zero=8, with_minimums=True)
    codes = quantized.codes.clone()
    assert torch.equal(quantized.dequantize(), quantized.dequantize())
    assert torch.equal(quantized.codes, codes)


@pytest.mark.parametrize("index", [slice(1, 4), slice(0, 6, 2), torch.tensor([5, 0, 3]), slice(2, 2)])
def test_rows(index: slice | torch.Tensor) -> None:
    quantized = _random(6, 3, 16, zero=8, with_minimums=True)
    assert torch.equal(quantized.rows(index).dequantize(), quantized.dequantize()[index])


def test_a_slice_of_rows_copies_nothing() -> None:
    quantized = _random(6, 3, 16, zero=8, with_minimums=False)
    part = quantized.rows(slice(2, 4))
    assert part.codes.data_ptr() == quantized.codes[2:].data_ptr()
    assert part.minimums is None


def test_refusals() -> None:
    codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"codes must be uint8 \[n, K\], not torch.int8 \[2, 64\]"):
        GroupQuantized(codes.to(torch.int8), scales, None, 0, 32)
    with pytest.raises(ValueError, match="codes must be uint8"):
        GroupQuantized(codes.view(-1), scales, None, 0, 32)
    with pytest.raises(ValueError, match=r"scales must be float32 \[2, 4\], not torch.float32 \[2, 2\]"):
        GroupQuantized(codes, scales, None, 0, 16)
    with pytest.raises(ValueError, match="scales must be float32"):
        GroupQuantized(codes, scales.half(), None, 0, 32)
    with pytest.raises(ValueError, match="minimums must be float32"):
        GroupQuantized(codes, scales, scales[:1], 0, 32)
    with pytest.raises(ValueError, match="zero is 256"):
        GroupQuantized(codes, scales, None, 256, 32)
    for size in (0, 48):
        with pytest.raises(ValueError, match=f"groups of {size} do not divide the 64 columns"):
            GroupQuantized(codes, scales, None, 0, size)
    with pytest.raises(ValueError, match="minimums are on meta and codes on cpu"):
        GroupQuantized(codes, scales, scales.to("meta"), 0, 32)
