"""Panels on devices that do not pack themselves: written through a copy on the CPU, to the same bytes."""

from __future__ import annotations

import itertools

import pytest
import torch

from puna.ops.panels import PanelFormat
from puna.quantization import GroupQuantized, panels
from puna.quantization.panels import DensePanels, GroupPanels


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("cuts", [(0, 70), (0, 7, 40, 64, 70), (0, 32, 70)])
def test_a_copy_on_the_cpu_is_packed(
    kind: str, groups: bool, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(70, 96, generator=generator)
    codes = torch.randint(0, 16, (70, 96), generator=generator).to(torch.uint8)
    quantized = GroupQuantized(codes, torch.rand(70, 3, generator=generator), None, 8, 32)
    form: GroupPanels | DensePanels = DensePanels(torch.bfloat16, 70, 96)
    if kind != "bf16":
        form = GroupPanels(kind, PanelFormat(bits=int(kind[-1])), 70, 96)

    def write() -> torch.Tensor:
        parameters = {"weight": torch.full(form.form.buffer_shape(70, 96), 255, dtype=torch.uint8)}
        for start, stop in itertools.pairwise(cuts):
            if groups:
                form.write_quantized(parameters, slice(start, stop), quantized.rows(slice(start, stop)))
            else:
                form.write(parameters, slice(start, stop), dense[start:stop])
        return parameters["weight"]

    direct = write()
    assert (direct != 255).any()
    monkeypatch.setattr(panels, "is_on_host", lambda data: False)
    assert torch.equal(write(), direct)
