"""Rounding weights to codes in groups, without calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from puna.ops.panels import PanelFormat


def round_to_groups(dense: Tensor, form: PanelFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows [n, E] -> codes uint8 [n, E], scales and minimums float32 [n, E / group size], rounded to float16.

    E must be a multiple of the group size.
    """
    groups = dense.float().reshape(dense.shape[0], -1, form.group_size)
    most = (1 << form.bits) - 1
    if form.minimums:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales, minimums = _half((high - low) / most), _half(low)
        codes = (groups - minimums.unsqueeze(-1)) * _inverse(scales).unsqueeze(-1)
    else:
        # The value farthest from zero gets the lowest code, as there is one more of these than of the highest.
        farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales, minimums = _half(farthest / -form.zero if form.bits == 4 else farthest.abs() / (form.zero - 1)), None
        codes = groups * _inverse(scales).unsqueeze(-1) + form.zero
    codes = codes.round_().clamp_(0, most).to(torch.uint8)
    return codes.flatten(1), scales, minimums


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0: such a group is all zero, but for the rounding of its scale."""
    return torch.where(scales == 0, 0, 1 / scales)
