"""Panels: rows in and out of every format, and the order of the bytes against a slow, obvious reading of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from puna.ops import reference
from puna.ops.panels import PanelFormat, Panels

DENSE = [PanelFormat(torch.float32), PanelFormat(torch.bfloat16), PanelFormat(torch.float16)]
GROUPS = [
    PanelFormat(bits=bits, group_size=size, minimums=minimums)
    for bits, size, minimums in itertools.product((4, 8), (16, 32), (False, True))
]
SHAPES = [(64, 64), (70, 96), (33, 41), (1, 32)]


def panels_of(form: PanelFormat, outputs: int, inputs: int, fill: int = 0) -> Panels:
    data = torch.full(form.buffer_shape(outputs, inputs), fill, dtype=torch.uint8)
    return Panels(data, form, outputs, inputs)


def random_groups(form: PanelFormat, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(outputs)
    padded = -(-inputs // 32) * 32
    codes = torch.randint(0, 1 << form.bits, (outputs, padded), dtype=torch.uint8)
    scales, minimums = (torch.randn(outputs, padded // form.group_size).half().float() for _ in range(2))
    return codes, scales, minimums if form.minimums else None


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("form", DENSE, ids=str)
def test_dense_rows_come_back(form: PanelFormat, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs)
    for cuts in ((0, outputs), (0, min(13, outputs), outputs), (0, min(32, outputs), outputs)):
        panels = panels_of(form, outputs, inputs)
        for start, stop in itertools.pairwise(cuts):
            panels.write_dense(start, weight[start:stop])
        assert torch.equal(panels.read_dense(0, outputs), weight.to(form.dtype))
    middle = slice(outputs // 3, outputs // 2)
    found = panels.dequantize(middle.start, middle.stop - middle.start)
    assert torch.equal(found, weight[middle].to(form.dtype).float())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("form", GROUPS, ids=str)
def test_groups_come_back(form: PanelFormat, outputs: int, inputs: int) -> None:
    codes, scales, minimums = random_groups(form, outputs, inputs)
    for cuts in ((0, outputs), (0, min(7, outputs), outputs), (0, min(32, outputs), outputs)):
        panels = panels_of(form, outputs, inputs)
        for start, stop in itertools.pairwise(cuts):
            rows = slice(start, stop)
            panels.write_groups(start, codes[rows], scales[rows], None if minimums is None else minimums[rows])
        found = panels.read_groups(0, outputs)
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], scales)
        assert found[2] is None if minimums is None else torch.equal(found[2], minimums)
    wide = scales.repeat_interleave(form.group_size, 1)
    lowest = 0 if minimums is None else minimums.repeat_interleave(form.group_size, 1)
    weight = ((codes.double() - form.zero) * wide + lowest)[:, :inputs]
    assert torch.allclose(panels.dequantize(0, outputs).double(), weight, rtol=1e-6, atol=1e-6)


def test_order_of_the_bytes() -> None:
    """As csrc/kernels/args.h tells it, one byte at a time."""
    for form in GROUPS:
        codes, scales, minimums = random_groups(form, 64, 64)
        panels = panels_of(form, 64, 64)
        panels.write_groups(0, codes, scales, minimums)
        groups = 32 // form.group_size
        for panel, block in itertools.product(range(2), range(2)):
            size = form.block_bytes
            data = panels.data[panel, block * size : (block + 1) * size]
            halves = data[: 64 * groups * (1 + form.minimums)].view(torch.float16).view(-1, groups, 32)
            rows = slice(32 * panel, 32 * panel + 32)
            own = slice(block * groups, (block + 1) * groups)
            assert torch.equal(halves[0].float(), scales[rows, own].T)
            if minimums is not None:
                assert torch.equal(halves[1].float(), minimums[rows, own].T)
            stored = data[64 * groups * (1 + form.minimums) :].view(-1, 2, 16, 4)
            for (q, half, lane, i), byte in (
                (index, stored[index]) for index in itertools.product(*map(range, stored.shape))
            ):
                code = codes[32 * panel + 16 * half + lane, 32 * block :]
                if form.bits == 8:
                    assert byte == code[4 * q + i]
                else:
                    assert byte & 15 == code[8 * q + i]
                    assert byte >> 4 == code[8 * q + 4 + i]


def test_padding_is_cleared() -> None:
    for form in (*DENSE, *GROUPS):
        panels = panels_of(form, 33, 64, fill=255)
        if form.bits:
            panels.write_groups(0, *random_groups(form, 33, 64))
        else:
            panels.write_dense(0, torch.randn(33, 64))
        panels.clear_padding()
        whole = Panels(panels.data, form, 64, 64)
        if form.bits:
            codes, scales, _ = whole.read_groups(33, 31)
            assert not codes.any()
            assert not scales.any()
        else:
            assert not whole.read_dense(33, 31).any()


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 3}, {"bits": 8, "group_size": 64}, {"dtype": torch.int8}, {"bits": 4, "dtype": torch.float32}],
)
def test_formats_that_are_none(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a format of panels"):
        PanelFormat(**options)  # type: ignore[arg-type]


def test_reference_ops_multiply_what_is_dequantised() -> None:
    torch.manual_seed(1)
    form = PanelFormat(bits=4)
    panels = panels_of(form, 96, 64)
    panels.write_groups(0, *random_groups(form, 96, 64))
    weight, x, bias = panels.dequantize(0, 96), torch.randn(5, 64), torch.randn(96)
    assert torch.allclose(reference.panel_linear(x, panels, bias, torch.float32), x @ weight.T + bias, atol=1e-4)
    gate_up = x @ weight.T
    gated = torch.nn.functional.silu(gate_up[:, :48]) * gate_up[:, 48:]
    assert torch.allclose(reference.panel_gated_linear(x, panels, None, "silu"), gated, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[3, 95], [0, 3]])
    assert torch.equal(reference.panel_embedding(ids, panels, torch.float32), weight[ids])
