"""Linear layers in FP8 against float64: all kinds of scales, sizes that hit the tails, bits, and code for Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.ops import OpSpec, TritonBackend, reference, triton_fp8
from puna.ops.scaled import FP8, InputScaling, ScaledRows, ScaledWeight
from puna.ops.triton_matrix import BLOCK_TILES, TILES, USUAL_TILES, launch

# The tensor cores' sums of FP8 products have fewer bits than float32, which the interpreter's have.
TOLERANCES = {"cpu": 1e-6, "cuda": 4e-3}


def random_weight(outputs: int, inputs: int, kind: str, device: torch.device) -> ScaledWeight:
    generator = torch.Generator().manual_seed(outputs * inputs)
    values = torch.randn(outputs, inputs, generator=generator).to(FP8)
    shapes = {"tensor": (1,), "channel": (outputs, 1), "block": (-(-outputs // 128), -(-inputs // 128))}
    scales = torch.rand(shapes[kind], generator=generator) + 0.5
    return ScaledWeight(values.to(device), scales.to(device))


def random_rows(shape: tuple[int, ...], kind: str, device: torch.device) -> ScaledRows:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    static = torch.tensor([0.01]) if kind == "static" else None
    rows = reference.quantize_rows(x.to(torch.bfloat16), InputScaling(static, kind == "block"))
    return ScaledRows(rows.values.to(device), rows.scales.to(device), rows.dtype)


def expected(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None) -> Tensor:
    wide = x.dequantize().double() @ weight.dequantize().double().t()
    return wide if bias is None else wide + bias.double()


def assert_near(got: Tensor, wanted: Tensor, device: torch.device) -> None:
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < TOLERANCES[device.type]


@pytest.mark.parametrize("tile", USUAL_TILES)
@pytest.mark.parametrize(("inputs", "weight_kind"), [(512, "channel"), (560, "channel"), (300, "tensor")])
def test_every_tile(tile: str, inputs: int, weight_kind: str, device: torch.device) -> None:
    rows = TILES[tile].rows + 3
    x, weight = random_rows((rows, inputs), "row", device), random_weight(70, inputs, weight_kind, device)
    got = launch(x, weight, None, torch.float32, TILES[tile]).values
    assert_near(got, expected(x, weight, None), device)


@pytest.mark.parametrize("tile", BLOCK_TILES)
@pytest.mark.parametrize("inputs", [512, 700])
def test_every_tile_with_blocks(tile: str, inputs: int, device: torch.device) -> None:
    rows = TILES[tile].rows // 2 + 1
    x, weight = random_rows((rows, inputs), "block", device), random_weight(200, inputs, "block", device)
    got = launch(x, weight, None, torch.float32, TILES[tile]).values
    assert_near(got, expected(x, weight, None), device)


@pytest.mark.parametrize("kind", ["row", "static", "block"])
@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (2, 9, 272), (70, 128)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_backend_takes_any_shape(
    kind: str, shape: tuple[int, ...], deterministic: bool, device: torch.device
) -> None:
    spec = OpSpec(device=device, dtype=torch.bfloat16, head_size=64, differentiable=False, deterministic=deterministic)
    scaled_linear = TritonBackend().function("scaled_linear", spec)
    assert callable(scaled_linear)
    x = random_rows(shape, kind, device)
    weight = random_weight(136, shape[-1], "block" if kind == "block" else "channel", device)
    bias = torch.randn(136, device=device)
    got = scaled_linear(x, weight, bias, torch.float32)
    assert got.shape == (*shape[:-1], 136)
    if shape[0]:
        assert_near(got, expected(x, weight, bias), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random_rows((5, 256), "row", device), random_weight(96, 256, "channel", device)
    bias = torch.randn(96, dtype=dtype, device=device)
    got = triton_fp8.scaled_linear(x, weight, bias, dtype)
    exact = triton_fp8.scaled_linear(x, weight, bias, torch.float32)
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("kind", ["row", "static", "block"])
def test_deterministic_rows_do_not_depend_on_the_others(kind: str, device: torch.device) -> None:
    x = random_rows((133, 300), kind, device)
    weight = random_weight(140, 300, "block" if kind == "block" else "channel", device)

    def run(rows: slice) -> Tensor:
        scales = x.scales if kind == "static" else x.scales[rows]
        part = ScaledRows(x.values[rows], scales, x.dtype)
        return triton_fp8.scaled_linear(part, weight, None, torch.float32, deterministic=True)

    together = run(slice(0, 133))
    for rows in (slice(0, 1), slice(100, 101), slice(3, 70), slice(132, 133)):
        assert torch.equal(run(rows), together[rows])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("scaling", ["none", "row", "static", "block"])
@pytest.mark.parametrize(("kind", "rows"), [("row", 1), ("static", 70), ("block", 5)])
def test_gate_up_activation_and_rounding(
    kind: str, rows: int, scaling: str, deterministic: bool, device: torch.device
) -> None:
    spec = OpSpec(device=device, dtype=torch.bfloat16, head_size=64, differentiable=False, deterministic=deterministic)
    scaled_gated_linear = TritonBackend().function("scaled_gated_linear", spec)
    assert callable(scaled_gated_linear)
    x = random_rows((rows, 256), kind, device)
    outputs = 272 if kind == "block" else 80
    weight = random_weight(outputs, 256, "block" if kind == "block" else "channel", device)
    bias = torch.randn(outputs, device=device)
    static = torch.tensor([0.5], device=device) if scaling == "static" else None
    wanted = None if scaling == "none" else InputScaling(static, scaling == "block")
    got = scaled_gated_linear(x, weight, bias, "silu", wanted)
    known = reference.scaled_gated_linear(x, weight, bias, "silu", wanted)
    if isinstance(got, ScaledRows):
        assert isinstance(known, ScaledRows)
        assert got.values.shape == (rows, outputs // 2)
        assert got.scales.shape == known.scales.shape
        assert got.dtype == torch.bfloat16
        # Where sums differ in their last bit, a number now and then goes to FP8's next one: a sixteenth of it.
        error = (got.dequantize() - known.dequantize()).norm() / known.dequantize().norm()
        assert error < 2**-4
    else:
        assert isinstance(known, Tensor)
        assert got.dtype == torch.bfloat16
        assert (got - known).norm() / known.norm() < 2**-8 + TOLERANCES[device.type]


@pytest.mark.parametrize("kind", ["row", "static"])
def test_torchs_own_kernel_gets_what_it_wants(kind: str, device: torch.device) -> None:
    x, weight = random_rows((2, 40, 64), kind, device), random_weight(48, 64, "channel", device)
    bias = torch.randn(48, dtype=torch.bfloat16, device=device)
    got = triton_fp8.library_scaled_linear(x, weight, bias, torch.bfloat16)
    assert got.shape == (2, 40, 48)
    wanted = expected(x, weight, bias)
    # One rounding to bfloat16, 2^-9 at most, beside the sums' own.
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=TOLERANCES[device.type] * wanted.abs().max())


@pytest.mark.parametrize(
    ("outputs", "inputs", "kind", "dtype"),
    [
        (40, 64, "channel", torch.bfloat16),
        (48, 72, "channel", torch.bfloat16),
        (128, 128, "block", torch.bfloat16),
        (48, 64, "channel", torch.float16),
    ],
)
def test_torchs_own_kernel_is_not_asked_for_more(outputs: int, inputs: int, kind: str, dtype: torch.dtype) -> None:
    weight = random_weight(outputs, inputs, kind, torch.device("cpu"))
    assert not triton_fp8.library_can(weight, None, dtype)
    assert triton_fp8.library_can(random_weight(48, 64, "channel", torch.device("cpu")), None, torch.bfloat16)


def test_gpus_without_fp8_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.ops.triton_table.capability", lambda device: (8, 0))
    spec = OpSpec(device=torch.device("cpu"), dtype=torch.bfloat16, head_size=64, differentiable=False)
    answer = TritonBackend().function("scaled_linear", spec)
    assert isinstance(answer, str)
    assert "8.9" in answer


def test_many_rows_go_to_torchs_own_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(triton_fp8, "_has_library", lambda device: True)
    asked = []

    def library(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        asked.append(len(x.values))
        return reference.scaled_linear(x, weight, bias, dtype)

    monkeypatch.setattr(triton_fp8, "library_scaled_linear", library)
    weight = random_weight(64, 128, "channel", device)
    for rows in (1, 128, 129):
        triton_fp8.scaled_linear(random_rows((rows, 128), "row", device), weight, None, torch.bfloat16)
    triton_fp8.scaled_linear(random_rows((129, 128), "row", device), weight, None, torch.float32)
    assert asked == [129]


@pytest.mark.slow
def test_tensor_cores_for_fp8_and_no_spills(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("fp8_cases.row_tiles") + compiled_for_hopper("fp8_cases.block_tiles")
    assert len(kernels) == len(USUAL_TILES) + len(BLOCK_TILES)
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert "LDL" not in kernel, kernel
        assert "HMMA" not in kernel, kernel
        assert kernel["QGMMA"] >= 4, kernel
        assert kernel["LDGSTS"] >= 16, kernel
