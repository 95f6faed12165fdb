"""Linear layers over plain matrices in deterministic mode: right, and the same bits for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.ops import OpSpec, TritonBackend, triton_dense

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


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
        found = triton_dense.deterministic_linear(x, weight, added)
        assert found.dtype == dtype
        assert_close(found, x, weight, added)


def test_wide_weights(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_dense, "_WIDE_OUTPUTS", 200)
    x = numbers(70, 136, dtype=torch.bfloat16, device=device)
    weight = numbers(210, 136, dtype=torch.bfloat16, device=device, seed=2)
    assert_close(triton_dense.deterministic_linear(x, weight, None), x, weight, None)


def test_rows_of_many_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of rows than run together, the last group being smaller."""
    monkeypatch.setattr(triton_dense, "_TOGETHER", 2)
    x = numbers(64 * 4 + 5, 24, dtype=torch.bfloat16, device=device)
    weight = numbers(130, 24, dtype=torch.bfloat16, device=device, seed=2)
    assert_close(triton_dense.deterministic_linear(x, weight, None), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_others(dtype: torch.dtype, device: torch.device) -> None:
    rows = 300 if device.type == "cuda" else 70
    x = numbers(rows, 264, dtype=dtype, device=device)
    weight = numbers(48, 264, dtype=dtype, device=device, seed=2)
    whole = triton_dense.deterministic_linear(x, weight, None)
    for part in (slice(0, 1), slice(7, 8), slice(rows - 1, rows), slice(3, 68), slice(0, 16)):
        assert torch.equal(triton_dense.deterministic_linear(x[part], weight, None), whole[part])


def test_shapes_and_strides(device: torch.device) -> None:
    x = numbers(2, 3, 64, dtype=torch.bfloat16, device=device)[..., ::2]
    weight = numbers(32, 40, dtype=torch.bfloat16, device=device, seed=2).T  # columns of a matrix
    found = triton_dense.deterministic_linear(x, weight, None)
    assert found.shape == (2, 3, 40)
    assert_close(found, x, weight, None)
    assert triton_dense.deterministic_linear(x[:0], weight, None).shape == (0, 3, 40)
    with pytest.raises(ValueError, match="one dtype"):
        triton_dense.deterministic_linear(x.float(), weight, None)


def test_only_deterministic_mode_has_it() -> None:
    backend = TritonBackend()
    spec = OpSpec(device=torch.device("cpu"), dtype=torch.bfloat16, head_size=128, differentiable=False)
    refusal = backend.function("linear", spec)
    assert isinstance(refusal, str)
    assert "cuBLAS" in refusal
    deterministic = OpSpec(
        device=torch.device("cpu"), dtype=torch.bfloat16, head_size=128, differentiable=False, deterministic=True
    )
    assert backend.function("linear", deterministic) is triton_dense.deterministic_linear
    for op in ("panel_linear", "panel_gated_linear"):
        assert backend.function(op, spec) is not backend.function(op, deterministic)


@pytest.mark.slow
def test_tensor_cores_and_no_spills(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("linear_cases.dense")
    assert len(kernels) == 3  # the same for 1 and 512 rows
    for kernel in kernels[:2]:
        assert kernel["HGMMA"] >= 8, kernel
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert "HMMA" not in kernel, kernel
        assert kernel["LDGSTS"] >= 16, kernel
