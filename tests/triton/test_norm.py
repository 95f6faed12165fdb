"""RmsNorm's kernels against the reference, float64, and themselves in other batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.ops import reference, triton_norm
from puna.ops.scaled import InputScaling, ScaledRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALINGS = ("row", "static", "blocks")


def scaling_of(name: str, device: torch.device) -> InputScaling:
    if name == "static":
        return InputScaling(static=torch.tensor([0.013], device=device))
    return InputScaling(blocks=name == "blocks")


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(*shape, generator=generator))
    return (torch.randn(*shape, generator=generator) * spread).to(device, dtype)


def assert_same_rows(found: ScaledRows, expected: ScaledRows) -> None:
    """To the bit, values and scales."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.scales.cpu(), expected.scales.cpu())
    assert torch.equal(found.values.view(torch.uint8).cpu(), expected.values.view(torch.uint8).cpu())


def assert_close(found: Tensor, wide: Tensor) -> None:
    """Within two roundings to found's dtype, since rms_norm rounds before the weight (of less than 64) too; sums in
    float32 add a little to that."""
    info = torch.finfo(found.dtype)
    error = (found.double() - wide).abs()
    assert bool(
        (
            error <= (4 if found.dtype == torch.float32 else 1.5) * info.eps * wide.abs() + 64 * info.tiny * info.eps
        ).all()
    ), float(error.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (1, 100), (2, 3, 1000), (2, 4096)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = numbers(*shape, dtype=dtype, device=device)
    weight = numbers(shape[-1], dtype=dtype, device=device, seed=1)
    found = triton_norm.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    assert found.shape == x.shape
    wide = x.double()
    assert_close(found, wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double())
    # What differs from the reference are roundings of the sum: rarely any, and never more than one step each.
    expected = reference.rms_norm(x, weight, 1e-5)
    if dtype != torch.float32:
        assert float((found != expected).double().mean()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_add_rms_norm_has_the_references_bits(dtype: torch.dtype, device: torch.device) -> None:
    x, residual = (numbers(5, 300, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = numbers(300, dtype=dtype, device=device, seed=2)
    total, found = triton_norm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    wide = total.double()
    assert_close(found, wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double())


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_heads_inside_of_wider_rows(size: int, device: torch.device) -> None:
    heads = 5
    qkv = numbers(7, 9 * size, dtype=torch.bfloat16, device=device)
    query = qkv[:, 2 * size : (2 + heads) * size].view(7, heads, size)
    weight = numbers(size, dtype=torch.bfloat16, device=device, seed=1)
    found = triton_norm.rms_norm(query, weight, 1e-6)
    assert torch.equal(found, triton_norm.rms_norm(query.contiguous(), weight, 1e-6))
    wide = query.double()
    assert_close(found, wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("size", [64, 200, 1024])
def test_rounded_results_have_the_bits_of_two_steps(scaling: str, size: int, device: torch.device) -> None:
    x, residual = (numbers(3, size, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 1))
    weight = numbers(size, dtype=torch.bfloat16, device=device, seed=2)
    how = scaling_of(scaling, device)
    expected = reference.quantize_rows(triton_norm.rms_norm(x, weight, 1e-5), how)
    assert_same_rows(triton_norm.rms_norm_scaled(x, weight, 1e-5, how), expected)
    total, found = triton_norm.add_rms_norm_scaled(x, residual, weight, 1e-5, how)
    assert torch.equal(total, x + residual)
    assert_same_rows(found, reference.quantize_rows(triton_norm.rms_norm(total, weight, 1e-5), how))


@pytest.mark.parametrize("size", [96, 640])
def test_a_row_alone_has_the_bits_that_it_has_among_others(size: int, device: torch.device) -> None:
    x = numbers(11, size, dtype=torch.bfloat16, device=device)
    weight = numbers(size, dtype=torch.bfloat16, device=device, seed=1)
    together = triton_norm.rms_norm(x, weight, 1e-5)
    for row in (0, 4, 10):
        assert torch.equal(triton_norm.rms_norm(x[row : row + 1], weight, 1e-5)[0], together[row])


def test_nan_and_infinity_come_through(device: torch.device) -> None:
    x = numbers(2, 256, dtype=torch.float32, device=device)
    x[0, 17] = float("nan")
    weight = torch.ones(256, device=device)
    assert bool(triton_norm.rms_norm(x, weight, 1e-5)[0].isnan().all())
    rows = triton_norm.rms_norm_scaled(x, weight, 1e-5, InputScaling())
    assert bool(rows.scales[0].isnan().all())
    assert not bool(rows.scales[1].isnan().any())


def test_no_rows(device: torch.device) -> None:
    weight = torch.ones(64, device=device)
    assert triton_norm.rms_norm(torch.empty(0, 64, device=device), weight, 1e-5).shape == (0, 64)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="must be the weight's 32"):
        triton_norm.rms_norm(torch.empty(2, 64, device=device), torch.ones(32, device=device), 1e-5)


def compile_norms() -> None:
    """What Llama 3.1 8B launches, the longest row of 70B, and Qwen3's norms of heads."""
    weight = torch.ones(4096, dtype=torch.bfloat16)
    x = torch.empty(8192, 4096, dtype=torch.bfloat16)
    triton_norm.add_rms_norm(x, x, weight, 1e-5)
    for scaling in (InputScaling(), InputScaling(blocks=True)):
        triton_norm.add_rms_norm_scaled(x, x, weight, 1e-5, scaling)
    wide = torch.empty(8, 16384, dtype=torch.bfloat16)
    triton_norm.add_rms_norm_scaled(wide, wide, torch.ones(16384, dtype=torch.bfloat16), 1e-5, InputScaling())
    qkv = torch.empty(16, 48 * 128, dtype=torch.bfloat16)
    triton_norm.rms_norm(qkv[:, : 32 * 128].view(16, 32, 128), torch.ones(128, dtype=torch.bfloat16), 1e-6)


@pytest.mark.slow
def test_compiled_for_hopper(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("test_norm.compile_norms")
    assert len(kernels) == 5
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert not kernel.get("LDL"), kernel
        assert not kernel.get("STL"), kernel
        assert kernel["registers"] <= 64, kernel  # 1024 threads a multiprocessor at least
