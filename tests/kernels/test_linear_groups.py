"""Linear layers over int8 and int4 groups: against float64 of the same quantised numbers, and the bits over batches.

The integer part is exact, so what a result may differ by is the rounding of its chain: one product (weight scale by x
scale) and one fused multiply-add a term, of which there is one a group of the weight, or two with minimums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.ops.panels import PanelFormat, Panels

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROWS: Final = (1, 2, 3, 5, 6, 7, 8, 9, 13, 64, 193)
# Inputs and outputs: less than a block and a panel, parts of them, and more than a chunk of 16 blocks.
SHAPES: Final = ((17, 5), (32, 32), (81, 100), (548, 64), (1200, 97))
BLOCK: Final = 32

each_bits = pytest.mark.parametrize("bits", [8, 4])
each_groups = pytest.mark.parametrize("groups", [1, 2])
each_kind = pytest.mark.parametrize("minimums", [False, True], ids=["symmetric", "minimums"])


@dataclass(frozen=True)
class Layer:
    """A weight as the kernel takes it, and the numbers that it holds: codes [N, E], scales and minimums [N, groups]."""

    bits: int
    groups: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    minimums: NDArray[np.float32] | None
    room: Tensor
    panels: Tensor

    @property
    def outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes.shape[1]


def form_of(bits: int, groups: int, minimums: bool) -> PanelFormat:
    return PanelFormat(bits=bits, group_size=BLOCK // groups, minimums=minimums)


def pack(
    panels: Tensor,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    lows: NDArray[np.float32] | None,
    bits: int,
    groups: int,
) -> None:
    """The rows into panels, with inputs padded by zeros to whole blocks."""
    outputs, inputs = codes.shape
    form = form_of(bits, groups, lows is not None)
    padding = -inputs % BLOCK

    def whole(numbers: NDArray[Any] | None) -> Tensor | None:
        if numbers is None:
            return None
        wide = codes.shape[1] + padding if numbers is codes else (inputs + padding) * groups // BLOCK
        return torch.from_numpy(np.pad(numbers, ((0, 0), (0, wide - numbers.shape[1]))))

    target = Panels(panels.view(form.buffer_shape(outputs, inputs)), form, outputs, inputs)
    target.write_groups(0, whole(codes), whole(scales), whole(lows))  # type: ignore[arg-type]  # only lows may be None


def make_layer(
    kernels: ModuleType, bits: int, groups: int, minimums: bool, inputs: int, outputs: int, seed: int = 0
) -> Layer:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 1 << bits, (outputs, inputs), np.uint8)
    count = -(-inputs * groups // BLOCK)

    def halves(low: float, high: float) -> NDArray[np.float32]:
        return generator.uniform(low, high, (outputs, count)).astype(np.float16).astype(np.float32)

    scales, lows = halves(-0.02, 0.02), halves(-0.3, 0.3) if minimums else None
    size = form_of(bits, groups, minimums).panel_bytes(inputs) * -(-outputs // 32)
    room = torch.zeros(size + 64, dtype=torch.uint8)
    panels = room[-room.data_ptr() % 64 :][:size]
    pack(panels, codes, scales, lows, bits, groups)
    return Layer(bits, groups, codes, scales, lows, room, panels)


def linear(
    kernels: ModuleType,
    layer: Layer,
    x: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    gated: bool = False,
    activation: int = 0,
) -> Tensor:
    """y [T, N] of x [T, E], whose rows may be apart; checks that nothing is written between the rows of y."""
    rows, outputs = x.shape[0], layer.outputs // 2 if gated else layer.outputs
    y = torch.full((rows, outputs + 5), -77.0, dtype=dtype)
    kernels.linear(
        x=x.data_ptr(),
        weight=layer.panels.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        rows=rows,
        inputs=layer.inputs,
        outputs=outputs,
        dense=0,
        bits=layer.bits,
        groups=layer.groups,
        minimums=layer.minimums is not None,
        x_dtype=DTYPES[x.dtype],
        y_dtype=DTYPES[dtype],
        activation=activation,
        gated=gated,
    )
    assert (y[:, outputs:] == -77.0).all()
    return y[:, :outputs]


def make_rows(count: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that are a few elements apart, with magnitudes that differ by group, and a group of zeros."""
    generator = torch.Generator().manual_seed(count)
    wide = torch.randn(count, inputs + 3, generator=generator)
    wide *= torch.exp(torch.arange(inputs + 3) // BLOCK % 5 - 2.0)
    wide[:, BLOCK : 2 * BLOCK] = 0
    return wide.to(dtype)[:, :inputs]


def quantized(x: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """int8 [T, blocks, 32] and scales [T, blocks] of x, in float32 arithmetic as quantize.h describes it."""
    rows, inputs = x.shape
    padded = np.zeros((rows, -(-inputs // BLOCK), BLOCK), np.float32)
    padded.reshape(rows, -1)[:, :inputs] = x.to(torch.float32).numpy()
    largest = np.abs(padded).max(axis=2)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    return np.rint(padded * inverse[:, :, None]).astype(np.int64), largest / np.float32(127)


def expected(layer: Layer, x: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y in float64 from the quantised numbers, and how far rounding can take the kernel's from it."""
    numbers, x_scales = quantized(x)
    rows, blocks = x_scales.shape
    groups, outputs = layer.groups, layer.outputs
    codes = np.zeros((outputs, blocks * BLOCK), np.int64)
    codes[:, : layer.inputs] = layer.codes
    if layer.minimums is None:
        codes[:, : layer.inputs] -= 1 << (layer.bits - 1)

    def per_group(values: NDArray[np.float32]) -> NDArray[np.float64]:
        padded = np.zeros((outputs, blocks * groups))
        padded[:, : values.shape[1]] = values
        return padded

    numbers = numbers.reshape(rows, blocks * groups, BLOCK // groups)
    dots = np.einsum("tgi,ngi->tng", numbers, codes.reshape(outputs, blocks * groups, -1))
    scales = np.repeat(x_scales.astype(np.float64), groups, axis=1)[:, None]
    terms = dots * (per_group(layer.scales) * scales)
    magnitude, count = np.abs(terms).sum(axis=2), terms.shape[2]
    total = terms.sum(axis=2)
    if layer.minimums is not None:
        lows = per_group(layer.minimums) * (scales * numbers.sum(axis=2)[:, None])
        magnitude, count = magnitude + np.abs(lows).sum(axis=2), 2 * count
        total = total + lows.sum(axis=2)
    # Each rounding is within 2^-24 of a partial sum or product; another 2^-24 of each is for products of roundings.
    return total, magnitude * (count + 2) * 2.0**-24 + 1e-30


@each_bits
@each_groups
@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_and_the_same_bits(
    kernels: ModuleType, level: str, bits: int, groups: int, minimums: bool, shape: tuple[int, int]
) -> None:
    """Near float64, and each row's bits are those it has alone on one thread at the portable level."""
    inputs, outputs = shape
    layer = make_layer(kernels, bits, groups, minimums, inputs, outputs)
    x = make_rows(max(ROWS), inputs)
    kernels.set_threads(1)
    alone = torch.cat([linear(kernels, layer, x[row : row + 1]) for row in range(len(x))])
    total, bound = expected(layer, x)
    assert (np.abs(alone.numpy() - total) <= bound).all()
    kernels.set_level("portable")
    assert torch.equal(linear(kernels, layer, x[:20]), alone[:20])
    kernels.set_level(level)
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for rows in ROWS:
            start = len(x) - rows  # other rows than the first, so that a row's place in the batch changes
            assert torch.equal(linear(kernels, layer, x[start:]), alone[start:]), (threads, rows)


@each_bits
@each_kind
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_dtypes_bias_and_gates(
    kernels: ModuleType, level: str, bits: int, minimums: bool, x_dtype: torch.dtype, gated: bool
) -> None:
    """Rows of each dtype, outputs in float32 and in theirs, with bias; relu(gates) * ups from the same sums."""
    inputs, outputs = 90, 64
    layer = make_layer(kernels, bits, 1, minimums, inputs, 2 * outputs if gated else 77)
    bias = torch.randn(layer.outputs, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    for threads, rows in ((1, 1), (2, 4), (3, 30)):
        kernels.set_threads(threads)
        x = make_rows(rows, inputs, x_dtype)
        sums = linear(kernels, layer, x) + bias.to(torch.float32)
        if gated:
            sums = torch.relu(sums[:, :outputs]) * sums[:, outputs:]
        activation = 4 if gated else 0
        assert torch.equal(linear(kernels, layer, x, bias, torch.float32, gated, activation), sums)
        assert torch.equal(linear(kernels, layer, x, bias, x_dtype, gated, activation), sums.to(x_dtype))
        total, bound = expected(layer, x)
        assert (np.abs(linear(kernels, layer, x).numpy() - total) <= bound).all()


@each_bits
def test_more_rows_than_are_quantised_at_a_time(kernels: ModuleType, level: str, bits: int) -> None:
    layer = make_layer(kernels, bits, 1, False, 64, 64)
    x = make_rows(2100, 64)
    for threads in (1, 3):
        kernels.set_threads(threads)
        together = linear(kernels, layer, x, dtype=torch.float32, gated=True, activation=4)
        for start in (0, 1020, 1024, 2048, 2099):
            part = linear(kernels, layer, x[start : start + 5], gated=True, activation=4)
            assert torch.equal(together[start : start + 5], part)
        assert together.abs().sum(dim=1).gt(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 15, 16, 40])
def test_what_is_not_finite_shows(kernels: ModuleType, level: str, value: float, place: int) -> None:
    """It makes its whole row NaN at every level, and no other row."""
    layer = make_layer(kernels, 8, 1, False, 50, 40)
    for rows in (2, 30):
        x = make_rows(rows, 50)
        clean = linear(kernels, layer, x)
        x[1, place] = value
        y = linear(kernels, layer, x)
        assert y[1].isnan().all()
        others = [row for row in range(rows) if row != 1]
        assert torch.equal(y[others], clean[others])


def test_tiny_and_huge_rows(kernels: ModuleType, level: str) -> None:
    """Denormal numbers are no worse than zeros, and the largest ones do not overflow where their sum does not."""
    layer = make_layer(kernels, 8, 1, False, 64, 32)
    shares = make_rows(1, 64)
    for scale in (1e-44, 1e-39, 1e-37, 1e30):
        y = linear(kernels, layer, shares * scale)
        assert y.isfinite().all()
        if scale > 1e-36:
            total, bound = expected(layer, shares * scale)
            assert (np.abs(y.numpy() - total) <= bound).all()
        else:
            assert (y.abs() < 1e-34).all()


def test_scales_that_differ_by_output(kernels: ModuleType, level: str) -> None:
    """A scale of 0 gives 0 whatever its codes are, and the outputs beside it are as before."""
    layer = make_layer(kernels, 4, 2, False, 96, 40)
    x = make_rows(9, 96)
    before = linear(kernels, layer, x)
    scales = layer.scales.copy()
    scales[7] = 0
    pack(layer.panels, layer.codes, scales, None, 4, 2)
    after = linear(kernels, replace(layer, scales=scales), x)
    assert (after[:, 7] == 0).all()
    others = [n for n in range(40) if n != 7]
    assert torch.equal(after[:, others], before[:, others])
