"""The kernel of weights in rows against float64: every tile, plain and FP8, gated, with tails; its code for Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.ops import reference, triton_matrix
from puna.ops.scaled import FP8, InputScaling, ScaledRows, ScaledWeight
from puna.ops.triton_matrix import BLOCK_TILES, ROUNDING_TILES, TILES, USUAL_TILES, launch
from puna.ops.triton_pointwise import ACTIVATIONS

# Of sums, relative to the sums of absolute products: float32's, and those of the tensor cores for FP8.
EXACT = 3e-6
FP8_ERROR = {"cpu": 1e-6, "cuda": 4e-3}
# gate, its activation and the product are rounded to bfloat16, by 2^-9 each, up too.
GATED_ERROR = 4.5 * 2**-9


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def scaled(rows: int, outputs: int, inputs: int, blocks: bool, device: torch.device) -> tuple[ScaledRows, ScaledWeight]:
    x = reference.quantize_rows(numbers(rows, inputs, dtype=torch.bfloat16, device=device), InputScaling(blocks=blocks))
    values = numbers(outputs, inputs, dtype=torch.float32, device=device, seed=2).to(FP8)
    shape = (-(-outputs // 128), -(-inputs // 128)) if blocks else (outputs, 1)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(device) + 0.5
    return x, ScaledWeight(values, scales * 0.05)


def wide(values: Tensor | ScaledRows | ScaledWeight) -> Tensor:
    return (values if isinstance(values, Tensor) else values.dequantize()).double()


def error_of(found: Tensor, x: Tensor | ScaledRows, weight: Tensor | ScaledWeight, bias: Tensor) -> float:
    exact = wide(x) @ wide(weight).T + bias.double()
    size = wide(x).abs() @ wide(weight).abs().T + bias.abs().double()
    return float(((found.double() - exact).abs() / size).max())


def assert_gated(found: Tensor, x: Tensor | ScaledRows, weight: Tensor | ScaledWeight, bias: Tensor, act: str) -> None:
    """Within four roundings to bfloat16 of the float64 result, and what these do to an activation near its zeros."""
    assert found.dtype == torch.bfloat16
    gate, up = (wide(x) @ wide(weight).T + bias.double()).chunk(2, dim=-1)
    exact = reference.gated_activation(torch.cat((gate, up), dim=-1), act)
    allowed = GATED_ERROR * (exact.abs() + gate.abs() * up.abs()) + 1e-5
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("inputs", [512, 200])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_of_plain_weights(tile: str, inputs: int, device: torch.device) -> None:
    rows, outputs = TILES[tile].rows + 3, TILES[tile].outputs + 6
    dtype = torch.float16 if inputs == 200 else torch.bfloat16
    x, weight = (numbers(n, inputs, dtype=dtype, device=device, seed=n) for n in (rows, outputs))
    bias = numbers(outputs, dtype=dtype, device=device)
    found = launch(x, weight, bias, torch.float32, TILES[tile]).values
    assert error_of(found, x, weight, bias) < EXACT


@pytest.mark.parametrize("inputs", [512, 200])
@pytest.mark.parametrize("tile", USUAL_TILES)
def test_every_tile_of_plain_weights_gated(tile: str, inputs: int, device: torch.device) -> None:
    rows, outputs = min(TILES[tile].rows, 20), 2 * TILES[tile].outputs + 12
    x, weight = (numbers(n, inputs, dtype=torch.bfloat16, device=device, seed=n) for n in (rows, outputs))
    weight *= 0.1
    bias = numbers(outputs, dtype=torch.bfloat16, device=device)
    assert_gated(launch(x, weight, bias, torch.bfloat16, TILES[tile], "silu").values, x, weight, bias, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, device: torch.device) -> None:
    x, weight = (numbers(n, 72, dtype=torch.bfloat16, device=device, seed=n) for n in (5, 76))
    bias = numbers(76, dtype=torch.bfloat16, device=device)
    assert_gated(
        launch(x, weight, bias, torch.bfloat16, TILES["32x16"], activation).values, x, weight, bias, activation
    )


@pytest.mark.parametrize("tile", ["16x16", "64x32"])
def test_float16_has_its_own_roundings(tile: str, device: torch.device) -> None:
    x, weight = (numbers(n, 128, dtype=torch.float16, device=device, seed=n) for n in (3, 40))
    apart = reference.gated_activation(launch(x, weight, None, torch.float16, TILES[tile]).values, "gelu")
    found = launch(x, weight, None, torch.float16, TILES[tile], "gelu").values
    torch.testing.assert_close(found, apart, rtol=2**-9, atol=2**-12)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tile", ["16x16", "64x16", "32x32", "64x64", "256x16"])
def test_fp8_gated(tile: str, blocks: bool, device: torch.device) -> None:
    """Gates and ups share a block of scales here, too."""
    x, weight = scaled(9, 2 * 170, 300, blocks, device)
    bias = numbers(340, dtype=torch.bfloat16, device=device)
    found = launch(x, weight, bias, torch.bfloat16, TILES[tile], "silu").values
    assert found.shape == (9, 170)
    if device.type == "cpu":
        assert_gated(found, x, weight, bias, "silu")
    else:
        exact = reference.scaled_gated_linear(x, weight, bias, "silu", None)
        assert isinstance(exact, Tensor)
        assert float((found - exact).norm() / exact.norm()) < 2 * FP8_ERROR["cuda"]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tile", ROUNDING_TILES)
def test_rounding_tiles_of_fp8(tile: str, blocks: bool, device: torch.device) -> None:
    x, weight = scaled(TILES[tile].rows + 1, 300, 260, blocks, device)
    bias = numbers(300, dtype=torch.float32, device=device)
    found = launch(x, weight, bias, torch.float32, TILES[tile]).values
    assert error_of(found, x, weight, bias) < FP8_ERROR[device.type]


@pytest.mark.parametrize(
    ("kind", "tile", "inner"),
    [("static", "16x16", 20), ("static", "64x16", 70), *(("block", t, n) for t in ROUNDING_TILES for n in (256, 330))],
)
def test_results_are_rounded_as_quantize_rows_does(kind: str, tile: str, inner: int, device: torch.device) -> None:
    x, weight = scaled(18, 2 * inner, 128, kind == "block", device)
    scaling = InputScaling(torch.tensor([0.02], device=device) if kind == "static" else None, kind == "block")
    plain = launch(x, weight, None, torch.bfloat16, TILES[tile], "silu").values
    found = launch(x, weight, None, torch.bfloat16, TILES[tile], "silu", scaling).scaled()
    expected = reference.quantize_rows(plain, scaling)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)
    assert found.dtype == torch.bfloat16


def test_a_scale_by_row_is_refused(device: torch.device) -> None:
    x, weight = scaled(2, 64, 32, False, device)
    with pytest.raises(ValueError, match="whole row"):
        launch(x, weight, None, torch.bfloat16, TILES["16x16"], "silu", InputScaling())


def test_rows_of_many_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of rows than go together, the last ones being fewer."""
    monkeypatch.setattr(triton_matrix, "_TOGETHER_BYTES", 2 * 16 * 48)
    x, weight = (numbers(n, 24, dtype=torch.bfloat16, device=device, seed=n) for n in (16 * 4 + 5, 130))
    bias = numbers(130, dtype=torch.bfloat16, device=device)
    found = launch(x, weight, bias, torch.float32, TILES["64x16"]).values
    assert error_of(found, x, weight, bias) < EXACT


# Rows of the weight, and bytes of each, of an 8B model's layers in bfloat16 and in FP8.
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


@pytest.mark.parametrize("kind", ["bfloat16", "FP8", "blocks"])
@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize(("outputs", "inputs"), LAYERS)
def test_few_rows_get_a_tile_that_should_not_hold_up_the_memory(
    outputs: int, inputs: int, rows: int, kind: str
) -> None:
    row_bytes, blocks = inputs * (2 if kind == "bfloat16" else 1), kind == "blocks"
    names = BLOCK_TILES if blocks else USUAL_TILES
    best = triton_matrix.ranked_tiles(names, rows, outputs, row_bytes, blocks, 132)[0]
    memory = outputs * row_bytes / (4.3e12 / 1.755e9)  # clocks to read the weight
    slower = 1.25 if blocks else 1.0
    assert triton_matrix.clocks(TILES[best], rows, outputs, row_bytes, blocks, 132) < slower * memory


def test_one_wave_of_programs_is_better_than_two() -> None:
    """Gate and up of an 8B model: 224 programs, three of which fit a multiprocessor, and not 448, of which two fit."""
    assert triton_matrix.ranked_tiles(USUAL_TILES, 1, 28672, 8192, False, 132)[0] == "128x16"
    assert triton_matrix.ranked_tiles(USUAL_TILES, 1, 4096, 8192, False, 132)[0] == "16x16"


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_tiles_that_round_keep_up_with_the_memory(rows: int) -> None:
    best = triton_matrix.ranked_tiles(ROUNDING_TILES, rows, 28672, 4096, True, 132)[0]
    memory = 28672 * 4096 / (4.3e12 / 1.755e9)
    assert triton_matrix.clocks(TILES[best], rows, 28672, 4096, True, 132) < memory


def test_tiles_fit_a_multiprocessor() -> None:
    for tile in TILES.values():
        assert tile.outputs * tile.parts >= 64, "the tensor cores' instruction has 64 lines"
        assert tile.stages * tile.bytes * (tile.outputs + tile.rows) * tile.parts <= 227 * 1024
        assert tile.rows * tile.parts <= 256


@pytest.mark.slow
def test_tensor_cores_and_no_spills(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    plain = compiled_for_hopper("matrix_cases.plain_tiles") + compiled_for_hopper("matrix_cases.gated_tiles")
    scaled = compiled_for_hopper("matrix_cases.gated_fp8_tiles")
    assert len(plain) == 4 + sum(TILES[name].rows <= 64 for name in USUAL_TILES)
    for kernel in plain:
        assert kernel["HGMMA"] >= 4, kernel
    for kernel in scaled:
        assert kernel["QGMMA"] >= 4, kernel
    for kernel in (*plain, *scaled):
        assert kernel["stack"] == 0, kernel
        assert "HMMA" not in kernel, kernel
        assert kernel["LDGSTS"] >= 16, kernel
