"""Gated activations, rounding to FP8, sums and choices of rows: the kernels against the reference and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops import reference, triton_pointwise
from puna.ops.scaled import FP8, InputScaling, ScaledRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(device, dtype)


def assert_same_rows(found: ScaledRows, expected: ScaledRows) -> None:
    """To the bit, values and scales."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))


def scalings(device: torch.device) -> tuple[InputScaling, ...]:
    return InputScaling(), InputScaling(static=torch.tensor([0.013], device=device)), InputScaling(blocks=True)


def activation_in_float64(gate: Tensor, activation: str) -> Tensor:
    wide = gate.double()
    if activation == "silu":
        return wide * wide.sigmoid()
    if activation == "relu":
        return wide.relu()
    return F.gelu(wide, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = numbers(3, 2, 2 * 1100, dtype=dtype, device=device)
    found = triton_pointwise.gated_activation(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = activation_in_float64(gate, activation) * up.double()
    step = torch.finfo(dtype).eps
    # Far below zero, gelu in float32 is a small difference of numbers near one: that error is up's and gate's size.
    error = (found.double() - expected).abs()
    lost = 4e-7 * (gate.double() * up.double()).abs() if "gelu" in activation else 0.0
    smallest = torch.finfo(dtype).tiny * step * 32
    assert bool((error <= (16 if dtype == torch.float32 else 1.5) * step * expected.abs() + lost + smallest).all())
    if dtype != torch.float32 and activation in ("silu", "relu"):
        # Rounded where torch rounds: what is left of differences are those of exp's last bits.
        assert float((found != reference.gated_activation(gate_up, activation)).double().mean()) < 0.002


def test_gated_activation_of_rows_that_lie_apart(device: torch.device) -> None:
    wider = numbers(4, 3 * 200, dtype=torch.bfloat16, device=device)
    part = wider[:, 100:500]
    found = triton_pointwise.gated_activation(part, "silu")
    assert torch.equal(found, triton_pointwise.gated_activation(part.contiguous(), "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100, 128, 300, 2048])
def test_quantize_rows_has_the_references_bits(size: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 3, size, generator=generator) * torch.exp(2 * torch.randn(2, 3, size, generator=generator))
    x[0, 1] = 0.0
    x[1, 2, :7] = 60000.0
    x = x.to(device, dtype)
    for scaling in scalings(device):
        assert_same_rows(triton_pointwise.quantize_rows(x, scaling), reference.quantize_rows(x, scaling))


def test_quantize_rows_rounds_ties_to_even(device: torch.device) -> None:
    every = torch.arange(0, 127, dtype=torch.uint8).view(FP8).float()
    between = torch.cat((every, (every[1:] + every[:-1]) / 2, every[1:-1] * 1.0001)).to(device)
    scaling = InputScaling(static=torch.ones(1, device=device))
    for x in (between, -between):
        assert_same_rows(triton_pointwise.quantize_rows(x[None], scaling), reference.quantize_rows(x[None], scaling))


def test_nan_stays_nan(device: torch.device) -> None:
    x = numbers(2, 256, dtype=torch.bfloat16, device=device)
    x[0, 200] = float("nan")
    found = triton_pointwise.quantize_rows(x, InputScaling())
    assert bool(found.scales[0].isnan())
    assert not bool(found.scales[1].isnan())
    found = triton_pointwise.quantize_rows(x, InputScaling(blocks=True))
    assert found.scales.isnan().tolist() == [[False, True], [False, False]]
    found = triton_pointwise.quantize_rows(x, InputScaling(static=torch.ones(1, device=device)))
    assert bool(found.values.float().isnan()[0, 200])
    assert int(found.values.float().isnan().sum()) == 1


@pytest.mark.parametrize("size", [96, 1000, 1536])
def test_rounded_activation_has_the_bits_of_two_steps(size: int, device: torch.device) -> None:
    gate_up = numbers(3, 2 * size, dtype=torch.bfloat16, device=device)
    activated = triton_pointwise.gated_activation(gate_up, "silu")
    for scaling in scalings(device):
        found = triton_pointwise.gated_activation_scaled(gate_up, "silu", scaling)
        assert_same_rows(found, reference.quantize_rows(activated, scaling))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_has_the_references_bits(dtype: torch.dtype, device: torch.device) -> None:
    a, b = (numbers(3, 700, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    assert torch.equal(triton_pointwise.add(a, b), a + b)
    assert torch.equal(triton_pointwise.add(a[:, :300], b[:, 300:600]), a[:, :300] + b[:, 300:600])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_embedding(dtype: torch.dtype, ids_dtype: torch.dtype, device: torch.device) -> None:
    table = numbers(50, 1030, dtype=dtype, device=device)
    ids = torch.tensor([[3, 49, 0], [7, 3, 3]], dtype=ids_dtype, device=device)
    assert torch.equal(triton_pointwise.embedding(ids, table), table[ids.long()])
    assert torch.equal(triton_pointwise.embedding(ids, table[:, 10:90]), table[:, 10:90][ids.long()])


def test_embedding_of_an_id_that_does_not_exist_reads_nothing(device: torch.device) -> None:
    table = numbers(5, 64, dtype=torch.float32, device=device)
    found = triton_pointwise.embedding(torch.tensor([5, -1, 4], device=device), table)
    assert not bool(found[:2].any())
    assert torch.equal(found[2], table[4])


def test_an_unknown_activation_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="'swish': use silu"):
        triton_pointwise.gated_activation(torch.empty(1, 4, device=device), "swish")


def compile_pointwise() -> None:
    """What Llama 3.1 8B and 70B launch."""
    gate_up = torch.empty(64, 2 * 14336, dtype=torch.bfloat16)
    triton_pointwise.gated_activation(gate_up, "silu")
    triton_pointwise.gated_activation_scaled(gate_up, "silu", InputScaling())
    triton_pointwise.gated_activation_scaled(gate_up, "silu", InputScaling(blocks=True))
    wide = torch.empty(64, 2 * 28672, dtype=torch.bfloat16)
    triton_pointwise.gated_activation_scaled(wide, "silu", InputScaling())
    x = torch.empty(64, 4096, dtype=torch.bfloat16)
    triton_pointwise.quantize_rows(x, InputScaling())
    triton_pointwise.add(x, x)
    triton_pointwise.embedding(torch.zeros(64, dtype=torch.int64), torch.empty(128256, 4096, dtype=torch.bfloat16))


@pytest.mark.slow
def test_compiled_for_hopper(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("test_pointwise.compile_pointwise")
    assert len(kernels) == 7
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert not kernel.get("LDL"), kernel
        assert not kernel.get("STL"), kernel
        assert kernel["registers"] <= 64, kernel  # 1024 threads a multiprocessor at least
