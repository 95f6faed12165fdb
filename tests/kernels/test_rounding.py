"""The kernel that rounds weights into panels, against the same in torch, bit for bit, at every level."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from puna.ops.packing import can_round, round_rows
from puna.ops.panels import PanelFormat, Panels
from puna.quantization.rounding import round_to_groups


def expected(rows: Tensor, form: PanelFormat, outputs: int, first: int, background: int) -> Tensor:
    """Panels that held `background` in every byte, with the rows put into them by torch."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32))
    data = torch.full(form.buffer_shape(outputs, rows.shape[1]), background, dtype=torch.uint8)
    Panels(data, form, outputs, rows.shape[1]).write_groups(first, *round_to_groups(padded, form))
    return data


def weights(count: int, inputs: int, seed: int) -> Tensor:
    """Rows of many sizes: with outliers, zeros, ties, numbers below the least scale and near the largest one."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, inputs, generator=generator)
    rows *= 10.0 ** torch.randint(-6, 3, (count, 1), generator=generator)
    rows[::5, ::7] *= 30
    rows[1::9] = 0
    rows[2::9] = rows[2::9].sign() * 0.75
    rows[3::9, :32] = 1e-9
    rows[4::9] = torch.randint(-8, 8, rows[4::9].shape, generator=generator) * 0.5
    return rows


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("outputs", "inputs", "first", "count"),
    [(64, 64, 0, 64), (70, 96, 0, 70), (96, 40, 32, 33), (100, 33, 7, 50), (40, 32, 39, 1), (33, 7, 0, 33)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_as_torch(
    kernels: ModuleType,
    level: str,
    bits: int,
    dtype: torch.dtype,
    outputs: int,
    inputs: int,
    first: int,
    count: int,
    threads: int,
) -> None:
    kernels.set_threads(threads)
    form = PanelFormat(bits=bits)
    rows = weights(count, inputs, seed=outputs + first).to(dtype)
    data = torch.full(form.buffer_shape(outputs, inputs), 0xA5, dtype=torch.uint8)
    round_rows(rows, Panels(data, form, outputs, inputs), first)
    assert torch.equal(data, expected(rows, form, outputs, first, 0xA5))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_lie_apart(level: str, bits: int) -> None:
    form, wide = PanelFormat(bits=bits), weights(64, 200, seed=1)
    found, whole = (torch.zeros(form.buffer_shape(64, 96), dtype=torch.uint8) for _ in range(2))
    round_rows(wide[:, 3:99], Panels(found, form, 64, 96), 0)
    round_rows(wide[:, 3:99].contiguous(), Panels(whole, form, 64, 96), 0)
    assert torch.equal(found, whole)


def test_not_finite_weights_end_in_some_code(level: str) -> None:
    for bits in (8, 4):
        form = PanelFormat(bits=bits)
        rows = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0]).repeat(32, 16)
        data = torch.zeros(form.buffer_shape(32, 64), dtype=torch.uint8)
        round_rows(rows, Panels(data, form, 32, 64), 0)


def test_what_does_not_fit_is_refused(kernels: ModuleType) -> None:
    form = PanelFormat(bits=8)
    panels = Panels(torch.zeros(form.buffer_shape(64, 64), dtype=torch.uint8), form, 64, 64)
    for rows, first in ((torch.zeros(65, 64), 0), (torch.zeros(32, 64), 33), (torch.zeros(4, 32), 0)):
        with pytest.raises(ValueError, match="do not fit"):
            round_rows(rows, panels, first)
    short = Panels(panels.data[:1], form, 64, 64)
    with pytest.raises(ValueError, match="is needed"):
        round_rows(torch.zeros(1, 64), short, 0)
    halves = PanelFormat(bits=8, group_size=16)
    assert not can_round(torch.zeros(1, 64), Panels(panels.data, halves, 64, 64))
    with pytest.raises(ValueError, match="can't be rounded"):
        round_rows(torch.zeros(1, 64, dtype=torch.float64), panels, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"dtype": 3}, "dtype is 3"),
        ({"rows": 0}, "rows is null"),
        ({"panels": 32}, "not aligned"),
        ({"inputs": 0}, "inputs is 0"),
        ({"stride": 63}, "stride is 63"),
        ({"first": -1}, "first is -1"),
        ({"count": 1 << 31}, "count is"),
    ],
)
def test_the_binding_refuses(kernels: ModuleType, changes: dict[str, int], message: str) -> None:
    rows, panels = torch.zeros(64, 64), torch.zeros(PanelFormat(bits=8).buffer_shape(64, 64), dtype=torch.uint8)
    good = {"rows": rows.data_ptr(), "panels": panels.data_ptr(), "first": 0, "count": 64, "inputs": 64, "stride": 64}
    with pytest.raises(ValueError, match=message):
        kernels.round_groups(**{**good, "bits": 8, "dtype": 0, **changes})
