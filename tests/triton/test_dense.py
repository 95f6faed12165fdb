"""Linear layers over plain matrices: right, rounded once; in deterministic mode the same bits beside any others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.ops import OpSpec, TritonBackend, reference, triton_dense, triton_matrix

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def deterministic(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return triton_dense.linear(x, weight, bias, x.dtype, deterministic=True)


def assert_close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within one rounding to the result's dtype, and what sums in float32 may lose."""
    wide, weight = x.cpu().double(), weight.cpu().double()
    expected, size = wide @ weight.T, wide.abs() @ weight.abs().T
    if bias is not None:
        expected = expected + bias.cpu().double()
    error = (found.cpu().double() - expected).abs()
    allowed = torch.finfo(found.dtype).eps * expected.abs() * 0.51 + 1e-6 * size
    assert bool((error <= allowed).all()), float((error / allowed).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (3, 70, 200), (65, 64, 128), (33, 130, 72)])
def test_linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
    x = numbers(rows, inputs, dtype=dtype, device=device)
    weight = numbers(outputs, inputs, dtype=dtype, device=device, seed=2)
    bias = numbers(outputs, dtype=dtype, device=device, seed=3)
    for added in (None, bias):
        found = deterministic(x, weight, added)
        assert found.dtype == dtype
        assert_close(found, x, weight, added)


def test_wide_weights(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_dense, "_WIDE_OUTPUTS", 200)
    x = numbers(70, 136, dtype=torch.bfloat16, device=device)
    weight = numbers(210, 136, dtype=torch.bfloat16, device=device, seed=2)
    assert_close(deterministic(x, weight, None), x, weight, None)


def test_rows_of_many_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of rows than run together, the last group being smaller."""
    monkeypatch.setattr(triton_matrix, "_TOGETHER_BYTES", 2 * 64 * 48)
    x = numbers(64 * 4 + 5, 24, dtype=torch.bfloat16, device=device)
    weight = numbers(130, 24, dtype=torch.bfloat16, device=device, seed=2)
    assert_close(deterministic(x, weight, None), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_others(dtype: torch.dtype, device: torch.device) -> None:
    rows = 300 if device.type == "cuda" else 70
    x = numbers(rows, 264, dtype=dtype, device=device)
    weight = numbers(48, 264, dtype=dtype, device=device, seed=2)
    whole = deterministic(x, weight, None)
    for part in (slice(0, 1), slice(7, 8), slice(rows - 1, rows), slice(3, 68), slice(0, 16)):
        assert torch.equal(deterministic(x[part], weight, None), whole[part])


def test_shapes_and_strides(device: torch.device) -> None:
    x = numbers(2, 3, 64, dtype=torch.bfloat16, device=device)[..., ::2]
    weight = numbers(32, 40, dtype=torch.bfloat16, device=device, seed=2).T  # columns of a matrix
    found = deterministic(x, weight, None)
    assert found.shape == (2, 3, 40)
    assert_close(found, x, weight, None)
    assert deterministic(x[:0], weight, None).shape == (0, 3, 40)
    with pytest.raises(ValueError, match="one dtype"):
        deterministic(x.float(), weight, None)


@pytest.mark.parametrize("rows", [1, 20, 40, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", [torch.float32, None])
def test_the_backend_takes_any_number_of_rows(
    result: torch.dtype | None, dtype: torch.dtype, rows: int, device: torch.device
) -> None:
    spec = OpSpec(device=device, dtype=dtype, head_size=128, differentiable=False)
    linear = TritonBackend().function("linear", spec)
    assert callable(linear)
    x, weight = (numbers(n, 64, dtype=dtype, device=device, seed=n) for n in (rows, 40))
    bias = numbers(40, dtype=dtype, device=device)
    for added in (None, bias):
        found = linear(x, weight, added, result or dtype)
        assert found.dtype == (result or dtype)
        if device.type == "cpu" and rows > 32:  # torch has no sums in float32 on the CPU
            assert torch.equal(found, reference.linear(x, weight, added, result or dtype))
        else:
            assert_close(found, x, weight, added)
    assert linear(x[:0], weight, None, dtype).shape == (0, 40)


def test_rows_that_are_not_multiples_of_16_bytes(device: torch.device) -> None:
    """Their loads would be narrow, and so they are left to torch."""
    x, weight = (numbers(n, 36, dtype=torch.bfloat16, device=device, seed=n) for n in (2, 20))
    assert triton_dense._tiles(x, weight) == ()
    torch.testing.assert_close(triton_dense.linear(x, weight, None, x.dtype), x @ weight.T)


@pytest.mark.parametrize("rows", [1, 20, 70])
@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(dtype: torch.dtype, mode: bool, rows: int, device: torch.device) -> None:
    x, weight = (numbers(n, 128, dtype=dtype, device=device, seed=n) for n in (rows, 76))
    bias = numbers(76, dtype=dtype, device=device)
    found = triton_dense.gated_linear(x, weight * 0.1, bias, "silu", deterministic=mode)
    assert found.dtype == dtype
    expected = reference.gated_linear(x.double(), weight.mul(0.1).double(), bias.double(), "silu")
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=4 * epsilon, atol=max(2 * epsilon, 1e-5))


def test_deterministic_gated_rows_do_not_depend_on_others(device: torch.device) -> None:
    x, weight = (numbers(n, 200, dtype=torch.bfloat16, device=device, seed=n) for n in (70, 76))
    whole = triton_dense.gated_linear(x, weight, None, "gelu", deterministic=True)
    for part in (slice(0, 1), slice(69, 70), slice(3, 68)):
        assert torch.equal(triton_dense.gated_linear(x[part], weight, None, "gelu", deterministic=True), whole[part])


@pytest.mark.slow
def test_tensor_cores_and_no_spills(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("linear_cases.dense")
    assert len(kernels) == 4  # the same for 1 and 512 rows
    for kernel in kernels[:3]:
        assert kernel["HGMMA"] >= 8, kernel
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert "HMMA" not in kernel, kernel
        assert kernel["LDGSTS"] >= 16, kernel
