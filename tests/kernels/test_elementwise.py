"""Norm, add, gated activation and rotary: against float64, and where it rounds alike, equal to the reference op."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Final

import pytest
import torch
from torch import Tensor

from puna.ops import reference

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS: Final = {"silu": 1, "gelu": 2, "gelu_pytorch_tanh": 3, "relu": 4}
THREADS: Final = (1, 2, 3)
# Tails of every kind: below one vector, one past it, past four vectors. From 2^15 numbers on threads share a call.
SIZES: Final = (1, 5, 16, 17, 63, 64, 100, 1000, 2048, 3001)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a kernel writes into: NaN, and a margin behind it that it must leave alone."""
    size = torch.Size(shape).numel()
    return torch.full((size + 64,), float("nan"), dtype=dtype)[:size].view(shape)


def assert_margin(y: Tensor) -> None:
    behind = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())[y.numel() :]
    assert behind.isnan().all(), "the kernel wrote behind its output"


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def ulps(y: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of y's dtype, of numbers in its normal range."""
    info = torch.finfo(y.dtype)
    step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=info.smallest_normal)))) * info.eps
    return float(((y.double() - exact).abs() / step).amax()) if y.numel() else 0.0


def rms_norm(
    kernels: ModuleType, x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor | None]:
    y = filled(tuple(x.shape), x.dtype)
    total = None if residual is None else filled(tuple(x.shape), x.dtype)
    kernels.rms_norm(
        x=x.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        weight=weight.data_ptr(),
        sum=0 if total is None else total.data_ptr(),
        y=y.data_ptr(),
        outer=x.shape[0],
        inner=x.shape[1] if x.dim() == 3 else 1,
        size=x.shape[-1],
        x_outer_stride=x.stride(0),
        x_inner_stride=x.stride(1) if x.dim() == 3 else 0,
        epsilon=epsilon,
        dtype=DTYPES[x.dtype],
    )
    assert_margin(y)
    if total is not None:
        assert_margin(total)
    return y, total


def exact_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    wide = x.double()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    # The product with the weight takes a normalised value that is rounded already.
    return (wide * scale).float().to(x.dtype).double() * weight.double()


@each_dtype
def test_rms_norm(kernels: ModuleType, level: str, dtype: torch.dtype) -> None:
    for size, rows in itertools.product(SIZES, (1, 3)):
        x = random(rows, size, dtype=dtype, seed=size, scale=3.0)
        weight = random(size, dtype=dtype, seed=1)
        y, _ = rms_norm(kernels, x, weight)
        if dtype == torch.float32:
            assert ulps(y, exact_norm(x, weight)) < 6
            continue
        # A value that falls near the middle of two numbers may go to the other one, where the last bit of the float32
        # scale differs: then the normalised value is one step off, and the product a step or two.
        expected = reference.rms_norm(x, weight, 1e-5)
        assert ulps(y, expected.double()) <= 2
        assert (y != expected).double().mean() < 0.01


@each_dtype
def test_rms_norm_is_the_reference_in_every_bit_where_the_sum_is_exact(kernels: ModuleType, dtype: torch.dtype) -> None:
    # Squares of small whole numbers sum up exactly in any order, so nothing is left but the roundings of each step.
    x = torch.randint(-8, 9, (5, 384), generator=torch.Generator().manual_seed(3)).to(dtype)
    weight, epsilon = random(384, dtype=dtype), 1e-6
    assert same(rms_norm(kernels, x, weight, epsilon=epsilon)[0], reference.rms_norm(x, weight, epsilon))


@each_dtype
def test_rms_norm_of_a_residual_sum(kernels: ModuleType, level: str, dtype: torch.dtype) -> None:
    for size in (7, 64, 2047):
        x, residual = random(3, size, dtype=dtype), random(3, size, dtype=dtype, seed=1)
        weight = random(size, dtype=dtype, seed=2)
        y, total = rms_norm(kernels, x, weight, residual)
        assert total is not None
        assert same(total, x + residual)
        assert same(y, rms_norm(kernels, total, weight)[0])


@each_dtype
def test_rms_norm_of_heads_inside_of_wider_rows(kernels: ModuleType, dtype: torch.dtype) -> None:
    for threads in THREADS:
        kernels.set_threads(threads)
        wide = random(200, 7 * 48 + 11, dtype=dtype)
        heads = wide[:, 11 : 11 + 4 * 48].view(200, 4, 48)
        weight = random(48, dtype=dtype, seed=1)
        alone = rms_norm(kernels, heads.contiguous().view(800, 48), weight)[0].view(200, 4, 48)
        assert same(rms_norm(kernels, heads, weight)[0], alone)


@each_dtype
def test_rms_norm_in_place(kernels: ModuleType, dtype: torch.dtype) -> None:
    for threads, rows in itertools.product(THREADS, (1, 9)):
        kernels.set_threads(threads)
        x, residual = random(rows, 5000, dtype=dtype), random(rows, 5000, dtype=dtype, seed=1)
        weight = random(5000, dtype=dtype, seed=2)
        y, total = rms_norm(kernels, x, weight, residual)
        sizes = {"outer": rows, "inner": 1, "size": 5000, "x_outer_stride": 5000, "x_inner_stride": 0}
        at, into = x.data_ptr(), residual.data_ptr()
        kernels.rms_norm(
            x=at, residual=into, weight=weight.data_ptr(), sum=into, y=at, epsilon=1e-5, dtype=DTYPES[dtype], **sizes
        )
        assert total is not None
        assert same(residual, total)
        assert same(x, y)


@each_dtype
def test_add(kernels: ModuleType, level: str, dtype: torch.dtype) -> None:
    for threads, count in itertools.product(THREADS, (*SIZES, 70001)):
        kernels.set_threads(threads)
        a, b = random(count, dtype=dtype, scale=100.0), random(count, dtype=dtype, seed=1)
        y = filled((count,), dtype)
        kernels.add(a=a.data_ptr(), b=b.data_ptr(), y=y.data_ptr(), count=count, dtype=DTYPES[dtype])
        assert_margin(y)
        assert same(y, a + b)


def gated(kernels: ModuleType, gate_up: Tensor, activation: int) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = filled((rows, size), gate_up.dtype)
    kernels.gated_activation(
        gate_up=gate_up.data_ptr(),
        y=y.data_ptr(),
        rows=rows,
        size=size,
        activation=activation,
        dtype=DTYPES[gate_up.dtype],
    )
    assert_margin(y)
    return y


def exact_activation(x: Tensor, activation: str) -> Tensor:
    """In float64, without the cancellation for negative numbers that 1 + erf and 1 + tanh have."""
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "gelu":
        return x * torch.special.erfc(-x / math.sqrt(2)) / 2
    if activation == "gelu_pytorch_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x.clamp(min=0)


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(kernels: ModuleType, level: str, dtype: torch.dtype, activation: str) -> None:
    for rows, size in ((1, 20001), (3, 1), (4, 17), (2, 1024), (3, 333)):
        gate_up = random(rows, 2 * size, dtype=dtype, seed=size, scale=4.0)
        y = gated(kernels, gate_up, ACTIVATIONS[activation])
        gate, up = gate_up.double().chunk(2, dim=-1)
        exact = exact_activation(gate, activation) * up
        exact = exact_activation(gate, activation) * up
        # The product is rounded once: half a step, and what the float32 activation is off by, which grows with gate^2
        # where gelu is nearly zero.
        for shown, steps in ((gate.abs() < 1, 8), (exact.abs() > 1e-8, 50)):
            assert ulps(y[shown], exact[shown]) <= (steps if dtype == torch.float32 else 0.51)
        # The reference rounds the activation, too, which in a half type is up to a step away from this; its own gelu
        # has few digits where it is nearly zero.
        expected = reference.gated_activation(gate_up, activation)
        bounds = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4e-6 if dtype != torch.float32 else 3e-5}
        torch.testing.assert_close(y, expected, **bounds)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_far_out(kernels: ModuleType, level: str, activation: str) -> None:
    gate = torch.tensor(
        [[-1e4, -200.0, -95.0, -88.5, -20.0, -0.0, 0.0, 1e-30, -1e-30, 88.5, 200.0, 1e18, float("nan")]]
    )
    y = gated(kernels, torch.cat((gate, torch.ones_like(gate)), dim=1), ACTIVATIONS[activation])
    exact = exact_activation(gate.double(), activation)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-12, equal_nan=True)


@each_dtype
def test_gated_activation_without_a_function_is_the_product(kernels: ModuleType, dtype: torch.dtype) -> None:
    gate_up = random(3, 500, dtype=dtype)
    assert same(gated(kernels, gate_up, 0), gate_up[:, :250] * gate_up[:, 250:])


def rotary(kernels: ModuleType, x: Tensor, cos: Tensor, sin: Tensor, y: Tensor) -> None:
    kernels.rotary(
        x=x.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        y=y.data_ptr(),
        tokens=x.shape[0],
        heads=x.shape[1],
        head_size=x.shape[2],
        x_stride=x.stride(0),
        angle_stride=cos.stride(0),
        dtype=DTYPES[x.dtype],
    )


@each_dtype
def test_rotary_is_the_reference_in_every_bit(kernels: ModuleType, level: str, dtype: torch.dtype) -> None:
    for head_size, threads, (tokens, heads) in itertools.product((2, 6, 32, 64, 80, 128), THREADS, ((7, 1), (99, 5))):
        kernels.set_threads(threads)
        wide = random(tokens, 3 + heads * head_size, dtype=dtype, seed=head_size)
        x = wide[:, 3:].view(tokens, heads, head_size)
        angles = random(tokens, head_size // 2 + 4, dtype=torch.float32, scale=100.0)[:, : head_size // 2]
        cos, sin = (1.2 * angles.cos(), 1.2 * angles.sin())  # as with an attention factor
        padded = torch.stack((cos, sin), dim=-1).permute(2, 0, 1).contiguous()
        y = filled((tokens, heads, head_size), dtype)
        rotary(kernels, x, padded[0], padded[1], y)
        assert_margin(y)
        assert same(y, reference.rotary(x, cos, sin))


@each_dtype
def test_rotary_in_place(kernels: ModuleType, dtype: torch.dtype) -> None:
    x, angles = random(9, 3, 96, dtype=dtype), random(9, 48, dtype=torch.float32)
    expected = reference.rotary(x, angles.cos(), angles.sin())
    rotary(kernels, x, angles.cos(), angles.sin(), x)
    assert same(x, expected)


@each_dtype
def test_the_same_bits_for_any_batch_threads_and_level(kernels: ModuleType, dtype: torch.dtype) -> None:
    size = 2500
    x, residual = random(16, size, dtype=dtype, scale=2.0), random(16, size, dtype=dtype, seed=1)
    weight, gate_up = random(size, dtype=dtype, seed=2), random(16, 2 * size, dtype=dtype, seed=3, scale=5.0)

    def results(rows: slice) -> tuple[Tensor, ...]:
        y, total = rms_norm(kernels, x[rows], weight, residual[rows])
        assert total is not None
        return (y, total, *(gated(kernels, gate_up[rows], number) for number in range(5)))

    kernels.set_threads(1)
    expected = results(slice(None))
    for level, threads, rows in itertools.product(
        kernels.supported_levels(), (1, 2, 3, 5), (slice(None), slice(2, 3), slice(1, 15))
    ):
        kernels.set_level(level)
        kernels.set_threads(threads)
        for got, all_rows in zip(results(rows), expected, strict=True):
            assert same(got, all_rows[rows]), (level, threads, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_not_a_number_and_infinity_pass_through(kernels: ModuleType, level: str, dtype: torch.dtype) -> None:
    a = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 60000.0] * 5, dtype=dtype)
    b = torch.tensor([1.0, 1.0, float("inf"), float("nan"), 60000.0] * 5, dtype=dtype)
    y = filled((25,), dtype)
    kernels.add(a=a.data_ptr(), b=b.data_ptr(), y=y.data_ptr(), count=25, dtype=DTYPES[dtype])
    torch.testing.assert_close(y, a + b, rtol=0, atol=0, equal_nan=True)
