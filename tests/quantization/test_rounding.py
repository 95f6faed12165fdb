"""Rounding to groups: how far the weights move, beside plain nearest rounding and an exhaustive search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.ops.panels import PanelFormat
from puna.quantization.rounding import round_to_groups


def groups(rows: int = 40, inputs: int = 96, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator) * 0.02
    weight[::3, ::11] *= 4
    return weight


def squared_errors(weight: Tensor, form: PanelFormat) -> Tensor:
    """Of each group, in float64."""
    codes, scales, minimums = round_to_groups(weight, form)
    values = (codes.double() - form.zero).view(len(weight), -1, form.group_size) * scales.double().unsqueeze(-1)
    if minimums is not None:
        values += minimums.double().unsqueeze(-1)
    return (values - weight.double().view_as(values)).pow(2).sum(-1)


def nearest_errors(weight: Tensor) -> Tensor:
    """As Q4_0 is made: the farthest value sets the scale, and gets the code -8."""
    parts = weight.double().view(len(weight), -1, 32)
    far = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    scales = (far / -8).to(torch.float16).double()
    return ((parts / scales).round().clamp(-8, 7) * scales - parts).pow(2).sum(-1)


def best_errors(weight: Tensor) -> Tensor:
    """Of the best of 4,000 scales on both sides of zero, not rounded to float16."""
    parts = weight.double().view(len(weight), -1, 32)
    most = parts.abs().amax(-1, keepdim=True)
    best = torch.full(parts.shape[:2], torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.04, 0.4, 2000).tolist():
        for scale in (most * share, -most * share):
            left = ((parts / scale).round().clamp(-8, 7) * scale - parts).pow(2).sum(-1)
            best = torch.minimum(best, left)
    return best


def test_the_search_is_near_the_best_there_is() -> None:
    weight = groups()
    found, nearest, best = squared_errors(weight, PanelFormat(bits=4)), nearest_errors(weight), best_errors(weight)
    assert found.sum() < 0.92 * nearest.sum()
    assert found.sum() < 1.01 * best.sum()
    assert (found < nearest * 1.001).float().mean() > 0.95


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_off_by_more_than_its_clamping_explains(bits: int, minimums: bool, group_size: int) -> None:
    weight = groups(seed=bits)
    form = PanelFormat(bits=bits, minimums=minimums, group_size=group_size)
    codes, scales, lows = round_to_groups(weight, form)
    step = scales.abs().double().repeat_interleave(group_size, dim=1)
    values = (codes.double() - form.zero) * scales.double().repeat_interleave(group_size, dim=1)
    if lows is not None:
        values += lows.double().repeat_interleave(group_size, dim=1)
    off = (values - weight.double()).abs() / step
    limit = 3.1 if bits == 4 and not minimums else 0.51
    assert off.max() <= limit
    assert (off <= 0.5001).float().mean() > 0.98


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_codes_can_say_are_kept(bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    most = 1 << (bits - 1)
    codes = torch.randint(1 - most, most, (20, 64), generator=generator)
    codes[:, ::32] = 1 - most if bits == 8 else -most
    weight = codes * 2.0 ** torch.randint(-9, 0, (20, 1), generator=generator)
    assert squared_errors(weight, PanelFormat(bits=bits)).max() == 0


def test_zeros_stay_zeros() -> None:
    for bits in (4, 8):
        form = PanelFormat(bits=bits)
        codes, scales, _ = round_to_groups(torch.zeros(3, 64), form)
        assert codes.eq(form.zero).all()
        assert scales.eq(0).all()
