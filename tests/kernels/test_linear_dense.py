"""Linear layers over float32, float16 and bfloat16 panels: against float64, and the bits over batches and threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS: Final = {"none": 0, "silu": 1, "gelu": 2, "gelu_pytorch_tanh": 3, "relu": 4}
THREADS: Final = (1, 2, 3)
ROWS: Final = (1, 2, 3, 5, 8, 9, 13, 64, 193)
# Inputs and outputs: odd ones, less than a panel, more than a chunk of 256 inputs, groups of panels with a rest.
SHAPES: Final = ((1, 1), (65, 97), (523, 170), (256, 288))

each_weight = pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
each_x = pytest.mark.parametrize("x_dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def put_back(kernels: ModuleType) -> Iterator[None]:
    before = kernels.bf16_dots()
    yield
    kernels.set_bf16_dots(before)


def both_ways(kernels: ModuleType, level: str, *dtypes: torch.dtype) -> Iterator[None]:
    """Once with float32 multiplications, and where bfloat16 meets bfloat16 at level avx512 once with vdpbf16ps."""
    kernels.set_bf16_dots(False)
    yield
    if level == "avx512" and set(dtypes) == {torch.bfloat16}:
        kernels.set_bf16_dots(True)
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def panels(weight: Tensor) -> Tensor:
    """weight [N, E] as the panels that csrc/kernels/args.h describes, on a 64-byte boundary."""
    outputs, inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    padded = F.pad(weight, (0, -inputs % pair, 0, -outputs % 32))
    lanes = padded.view(-1, 2, 16, padded.shape[1] // pair, pair).permute(0, 3, 1, 2, 4)
    store = torch.empty(lanes.numel() + 64, dtype=weight.dtype)
    start = -store.data_ptr() % 64 // weight.element_size()
    packed = store[start : start + lanes.numel()]
    packed.copy_(lanes.reshape(-1))
    return packed


def linear(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    y_dtype: torch.dtype = torch.float32,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """The kernel on rows that have NaN between them, into rows that have a margin between them."""
    rows, inputs = x.shape
    apart = torch.full((rows, inputs + 7), float("nan"), dtype=x.dtype)
    apart[:, :inputs] = x
    y = torch.full((rows + 1, outputs + 5), float("nan"), dtype=y_dtype)
    kernels.linear(
        x=apart.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        x_stride=apart.stride(0),
        y_stride=y.stride(0),
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        dense=DTYPES[weight.dtype],
        bits=0,
        groups=1,
        minimums=0,
        x_dtype=DTYPES[x.dtype],
        y_dtype=DTYPES[y_dtype],
        activation=ACTIVATIONS[activation],
        gated=gated,
    )
    assert y[:, outputs:].isnan().all(), "the kernel wrote between the rows"
    assert y[rows].isnan().all(), "the kernel wrote behind the rows"
    return y[:rows, :outputs]


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place, and half the least denormal number."""
    info = torch.finfo(dtype)
    return exact.abs() * (info.eps / 2) + info.smallest_normal * info.eps


def exact_sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums in float64, and how far a float32 chain of E fused multiply-adds and the bias may be from them.

    Each of its E + 1 roundings is off by at most 2^-24 of the sum of the magnitudes; vdpbf16ps rounds twice as often.
    """
    sums = x.double() @ weight.double().T
    magnitudes = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        sums += bias.double()
        magnitudes += bias.double().abs()
    return sums, 2 * (x.shape[1] + 1) * 2.0**-24 * magnitudes


@each_weight
@each_x
def test_sums_against_float64(kernels: ModuleType, level: str, weight_dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    kernels.set_threads(2)
    for inputs, outputs in SHAPES:
        weight = random(outputs, inputs, dtype=weight_dtype)
        packed = panels(weight)
        for rows in ROWS if inputs < 256 else (1, 13, 193):
            x = random(rows, inputs, dtype=x_dtype, seed=rows)
            bias = random(outputs, dtype=x_dtype, seed=1) if rows % 2 else None
            y_dtype = x_dtype if rows % 3 else torch.float32
            exact, bound = exact_sums(x, weight, bias)
            for _ in both_ways(kernels, level, weight_dtype, x_dtype):
                y = linear(kernels, x, packed, outputs, bias, y_dtype)
                worst = ((y.double() - exact).abs() / (bound * 1.01 + rounding(exact, y_dtype))).amax()
                assert worst <= 1, (inputs, outputs, rows)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@each_weight
def test_gated_against_float64(kernels: ModuleType, level: str, weight_dtype: torch.dtype, activation: str) -> None:
    function = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "relu": F.relu,
    }[activation]
    kernels.set_threads(2)
    inputs = 67
    for outputs in (32, 96):
        weight = random(2 * outputs, inputs, dtype=weight_dtype) / 4
        packed = panels(weight)
        for rows in (1, 4, 13, 100):
            x = random(rows, inputs, dtype=weight_dtype, seed=rows)
            bias = random(2 * outputs, dtype=weight_dtype, seed=1) if rows % 2 else None
            y = linear(kernels, x, packed, outputs, bias, weight_dtype, activation, gated=True)
            sums, bounds = exact_sums(x, weight, bias)
            (gate, up), (gate_bound, up_bound) = sums.chunk(2, dim=1), bounds.chunk(2, dim=1)
            active = function(gate)
            # The slope of each of these functions is below 1.2; they are computed to within 1e-6 + 2e-6 of their value.
            active_bound = 1.2 * gate_bound + 1e-6 + 2e-6 * active.abs()
            exact = active * up
            bound = active_bound * up.abs() + active.abs() * up_bound + active_bound * up_bound
            worst = ((y.double() - exact).abs() / (bound * 1.01 + rounding(exact, weight_dtype))).amax()
            assert worst <= 1, (outputs, rows)


@each_weight
def test_gated_is_the_sums_and_the_activation_op(kernels: ModuleType, level: str, weight_dtype: torch.dtype) -> None:
    outputs, inputs, rows = 64, 67, 9
    packed = panels(random(2 * outputs, inputs, dtype=weight_dtype))
    x = random(rows, inputs, dtype=weight_dtype, seed=1)
    sums = linear(kernels, x, packed, 2 * outputs).contiguous()
    expected = torch.empty(rows, outputs)
    kernels.gated_activation(sums.data_ptr(), expected.data_ptr(), rows, outputs, ACTIVATIONS["silu"], 0)
    assert torch.equal(linear(kernels, x, packed, outputs, activation="silu", gated=True), expected)


@each_weight
@each_x
@pytest.mark.parametrize("gated", [False, True])
def test_bits_of_a_row_do_not_depend_on_the_others_or_threads(
    kernels: ModuleType, level: str, weight_dtype: torch.dtype, x_dtype: torch.dtype, gated: bool
) -> None:
    inputs, outputs, activation = 521, 160, "silu" if gated else "none"
    slow = level == "portable"
    packed = panels(random(2 * outputs if gated else outputs, inputs, dtype=weight_dtype))
    x = random(110 if slow else 520, inputs, dtype=x_dtype, seed=1)
    for _ in both_ways(kernels, level, weight_dtype, x_dtype):
        kernels.set_threads(1)
        together = linear(kernels, x, packed, outputs, activation=activation, gated=gated)
        assert together.isfinite().all()
        for threads in THREADS:
            kernels.set_threads(threads)
            if threads > 1 and not slow:
                assert torch.equal(linear(kernels, x, packed, outputs, activation=activation, gated=gated), together)
            first = 0
            for rows in (1, 3, 13) if slow else (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 19):
                part = linear(kernels, x[first : first + rows], packed, outputs, activation=activation, gated=gated)
                assert torch.equal(part, together[first : first + rows]), (threads, rows)
                first += rows


@each_weight
def test_a_row_of_nan_spoils_no_other(kernels: ModuleType, level: str, weight_dtype: torch.dtype) -> None:
    outputs, inputs, rows = 40, 33, 20
    packed = panels(random(outputs, inputs, dtype=weight_dtype))
    x = random(rows, inputs, dtype=weight_dtype, seed=1)
    clean = linear(kernels, x, packed, outputs)
    x[7] = float("nan")
    y = linear(kernels, x, packed, outputs)
    others = [row for row in range(rows) if row != 7]
    assert y[7].isnan().all()
    assert torch.equal(y[others], clean[others])
