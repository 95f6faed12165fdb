"""Linear layers over int8 and int4 panels: the kernels against the reference, whose sums are taken in float64 here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.ops import reference, triton_linear, triton_panels
from puna.ops.panels import BLOCK, PanelFormat, Panels
from puna.ops.triton_linear import TILES
from puna.quantization.groups import GroupQuantized
from puna.quantization.panels import GroupPanels

FORMATS = tuple(
    PanelFormat(bits=bits, group_size=group, minimums=minimums)
    for bits in (4, 8)
    for group in (32, 16)
    for minimums in (False, True)
)
PLAIN = PanelFormat(bits=4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def name_of(value: object) -> str | None:
    if isinstance(value, PanelFormat):
        return f"int{value.bits}-{value.group_size}{'-min' * value.minimums}"
    return None


def random_panels(form: PanelFormat, outputs: int, inputs: int, device: torch.device, seed: int = 0) -> Panels:
    """All codes, scales of both signs; what no output or input uses is there too, and must not matter."""
    generator = torch.Generator().manual_seed(seed)
    panels = Panels(torch.empty(form.buffer_shape(outputs, inputs), dtype=torch.uint8), form, outputs, inputs)
    rows, width = panels.data.shape[0] * 32, -(-inputs // BLOCK) * BLOCK
    codes = torch.randint(0, 1 << form.bits, (rows, width), generator=generator, dtype=torch.uint8)
    shape = (rows, width // form.group_size)
    scales = torch.randn(shape, generator=generator) * 0.02
    minimums = torch.randn(shape, generator=generator) * 0.1 if form.minimums else None
    panels.write_groups(0, codes, scales, minimums)
    return Panels(panels.data.to(device), form, outputs, inputs)


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def on_cpu(panels: Panels) -> Panels:
    return Panels(panels.data.cpu(), panels.format, panels.outputs, panels.inputs)


def exact(x: Tensor, panels: Panels, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the absolute values of its terms, which its error is measured by."""
    weight = on_cpu(panels).dequantize(0, panels.outputs).double()
    wide = x.cpu().double()
    y, size = wide @ weight.T, wide.abs() @ weight.abs().T
    return (y, size) if bias is None else (y + bias.cpu().double(), size + bias.cpu().double().abs())


def assert_close(found: Tensor, x: Tensor, panels: Panels, bias: Tensor | None = None) -> None:
    """Within one rounding to the result's dtype, and what sums in float32 may lose."""
    expected, size = exact(x, panels, bias)
    error = (found.cpu().double() - expected).abs()
    allowed = torch.finfo(found.dtype).eps * expected.abs() * 0.51 + 2e-6 * size
    assert bool((error <= allowed).all()), float((error / allowed).max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_on_a_gpu_are_packed_there(bits: int, device: torch.device) -> None:
    form = GroupPanels("", PanelFormat(bits=bits), 100, 96)
    codes = torch.randint(0, 1 << bits, (100, 96), dtype=torch.uint8)
    given = GroupQuantized(codes, torch.rand(100, 3) + 0.5, None, zero=1 << (bits - 1), group_size=32)
    there = dataclasses.replace(given, codes=codes.to(device), scales=given.scales.to(device))
    found = {}
    for where, one in (("cpu", given), ("gpu", there)):
        weight = torch.empty(form.form.buffer_shape(100, 96), dtype=torch.uint8, device=one.codes.device)
        for rows in (slice(0, 32), slice(32, 90), slice(90, 100)):
            form.write_quantized({"weight": weight}, rows, one.rows(rows))
        found[where] = weight.cpu()
    assert torch.equal(found["cpu"], found["gpu"])


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_and_dtype(form: PanelFormat, dtype: torch.dtype, device: torch.device) -> None:
    panels = random_panels(form, 40, 200, device)
    x = numbers(3, 200, dtype=dtype, device=device)
    bias = numbers(40, dtype=dtype, device=device, seed=2)
    assert_close(triton_linear.panel_linear(x, panels, bias, torch.float32), x, panels, bias)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 17, 64, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (1, 8), (96, 256), (65, 296)])
def test_numbers_of_rows_and_tails(rows: int, outputs: int, inputs: int, device: torch.device) -> None:
    panels = random_panels(PLAIN, outputs, inputs, device)
    x = numbers(rows, inputs, dtype=torch.bfloat16, device=device)
    found = triton_linear.panel_linear(x, panels, None, torch.bfloat16)
    assert found.shape == (rows, outputs)
    assert_close(found, x, panels)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("form", [PLAIN, PanelFormat(bits=8, group_size=16, minimums=True)], ids=name_of)
def test_every_tile(tile: str, form: PanelFormat, device: torch.device) -> None:
    shape = TILES[tile]
    panels = random_panels(form, 32 * shape.panels + 40, 32 * 2 * shape.runs + 40, device)
    x = numbers(shape.rows + 1, panels.inputs, dtype=torch.bfloat16, device=device)
    assert_close(triton_linear.launch(x, panels, None, torch.bfloat16, shape), x, panels)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize(("outputs", "rows"), [(128, 2), (128, 11), (80, 2)])
def test_gated(activation: str, outputs: int, rows: int, device: torch.device) -> None:
    """80 outputs: a panel holds the last gates and the first ups."""
    panels = random_panels(PanelFormat(bits=4, minimums=True), outputs, 96, device)
    x = numbers(rows, 96, dtype=torch.bfloat16, device=device)
    bias = numbers(outputs, dtype=torch.bfloat16, device=device, seed=3)
    found = triton_linear.panel_gated_linear(x, panels, bias, activation)
    expected = reference.panel_gated_linear(x.cpu(), on_cpu(panels), bias.cpu(), activation)
    assert found.shape == (rows, outputs // 2)
    torch.testing.assert_close(found.cpu(), expected, rtol=0.008, atol=1e-4)


@pytest.mark.parametrize("tile", [name for name, tile in TILES.items() if tile.stacked == 2])
@pytest.mark.parametrize("outputs", [64, 192])
def test_gated_in_every_tile(tile: str, outputs: int, device: torch.device) -> None:
    """With numbers of panels that are no multiples of a tile's."""
    panels = random_panels(PanelFormat(bits=8), outputs, 72, device)
    x = numbers(TILES[tile].rows + 1, 72, dtype=torch.bfloat16, device=device)
    bias = numbers(outputs, dtype=torch.bfloat16, device=device, seed=3)
    found = triton_linear.launch(x, panels, bias, torch.bfloat16, TILES[tile], "silu")
    expected = reference.panel_gated_linear(x.cpu(), on_cpu(panels), bias.cpu(), "silu")
    torch.testing.assert_close(found.cpu(), expected, rtol=0.008, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_many_rows_go_to_the_library(gated: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "_WRITTEN_OUT", 64 * 96)
    panels = random_panels(PLAIN, 128, 96, device)
    x = numbers(300, 96, dtype=torch.float32, device=device)
    bias = numbers(128, dtype=torch.float32, device=device, seed=3)
    called = []
    library = triton_linear._library
    monkeypatch.setattr(triton_linear, "_library", lambda *arguments: called.append(1) or library(*arguments))
    if gated:
        found = triton_linear.panel_gated_linear(x, panels, bias, "silu")
        expected = reference.panel_gated_linear(x.cpu(), on_cpu(panels), bias.cpu(), "silu")
    else:
        found = triton_linear.panel_linear(x, panels, bias, torch.float32)
        expected = reference.panel_linear(x.cpu(), on_cpu(panels), bias.cpu(), torch.float32)
    assert called
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_written_out(form: PanelFormat, dtype: torch.dtype, device: torch.device) -> None:
    panels = random_panels(form, 70, 200, device)
    found = triton_panels.dequantize(panels, 32, 38, dtype)
    expected = on_cpu(panels).dequantize(32, 38)
    assert found.dtype == dtype
    if form.minimums:  # a product and a sum, which a GPU rounds once
        torch.testing.assert_close(found.cpu().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_embedding(form: PanelFormat, device: torch.device) -> None:
    panels = random_panels(form, 70, 200, device)
    ids = torch.tensor([[0, 69, 5], [31, 32, 5]], device=device)
    found = triton_panels.panel_embedding(ids, panels, torch.float32)
    expected = reference.panel_embedding(ids.cpu(), on_cpu(panels), torch.float32)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-7)
    outside = triton_panels.panel_embedding(torch.tensor([-1, 70], device=device), panels, torch.float32)
    assert not outside.any()


def test_shapes_of_x(device: torch.device) -> None:
    panels = random_panels(PLAIN, 32, 64, device)
    x = numbers(2, 3, 128, dtype=torch.bfloat16, device=device)[..., ::2]
    found = triton_linear.panel_linear(x, panels, None, torch.bfloat16)
    assert found.shape == (2, 3, 32)
    assert_close(found.view(6, 32), x.reshape(6, 64), panels)
    assert triton_linear.panel_linear(x[:0], panels, None, torch.bfloat16).shape == (0, 3, 32)
    slices = numbers(3, 200, dtype=torch.bfloat16, device=device)[:, 64:128]  # rows with a stride
    assert_close(triton_linear.panel_linear(slices, panels, None, torch.bfloat16), slices, panels)


def test_infinity_and_nan_stay_in_their_rows(device: torch.device) -> None:
    panels = random_panels(PLAIN, 32, 64, device)
    x = numbers(3, 64, dtype=torch.bfloat16, device=device)
    x[1, 5] = float("nan")
    found = triton_linear.panel_linear(x, panels, None, torch.bfloat16)
    assert bool(found[1].isnan().all())
    assert bool(found[::2].isfinite().all())


@pytest.mark.parametrize("form", [PLAIN, PanelFormat(bits=8, minimums=True)], ids=name_of)
@pytest.mark.parametrize("gated", [False, True])
def test_deterministic_rows_do_not_depend_on_others(form: PanelFormat, gated: bool, device: torch.device) -> None:
    panels = random_panels(form, 64, 328, device)
    x = numbers(35, 328, dtype=torch.bfloat16, device=device)

    def run(rows: Tensor) -> Tensor:
        if gated:
            return triton_linear.panel_gated_linear(rows, panels, None, "silu", deterministic=True)
        return triton_linear.panel_linear(rows, panels, None, torch.bfloat16, deterministic=True)

    whole = run(x)
    for rows in (slice(0, 1), slice(7, 8), slice(34, 35), slice(3, 20), slice(16, 35)):
        assert torch.equal(run(x[rows]), whole[rows])


@pytest.mark.slow
def test_tensor_cores_and_no_spills(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("linear_cases.panel_tiles") + compiled_for_hopper("linear_cases.panel_formats")
    assert len(kernels) == len(TILES) + 7 + 3
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert "LDL" not in kernel, kernel
        assert kernel["HMMA"] >= 4, kernel
        assert kernel["LDGSTS"] >= 4, kernel
