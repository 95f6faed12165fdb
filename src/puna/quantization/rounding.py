"""Rounding weights to codes in groups, without calibration data.

This is the plain version; for int8 and int4 `csrc/kernels/rounding.h` does the same, to the bit, and far faster.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from puna.ops.panels import PanelFormat

# The scales that are tried for 4 bits give the value farthest from zero these codes; see rounding.h.
_STEPS: Final = tuple(-6.0 - 0.25 * step for step in range(13))


def round_to_groups(dense: Tensor, form: PanelFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows [n, E] -> codes uint8 [n, E], scales and minimums float32 [n, E / group size], rounded to float16.

    8 bits go to the nearest code of a scale that the largest value sets. For 4 bits without minimums the scale with the
    least squared error is searched for: docs/quantization.md has what it gains. E must be a multiple of the group size.
    """
    groups = dense.float().reshape(dense.shape[0], -1, form.group_size)
    most = (1 << form.bits) - 1
    low, high = groups.amin(-1), groups.amax(-1)
    minimums: Tensor | None = None
    if form.minimums:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales, minimums = _half((high - low) / most), _half(low)
        codes = ((groups - minimums.unsqueeze(-1)) * _inverse(scales).unsqueeze(-1)).clamp_(0, most).round_()
    elif form.bits == 4:
        # There is one code more below zero than above, and the largest value gets it.
        scales = _half(_searched_scales(groups, torch.where(high > -low, high, low)))
        codes = _codes(groups, _inverse(scales), 8) + 8
    else:
        scales = _half(torch.maximum(high, 0 - low) / 127)  # not -low: -0 has other bits
        codes = _codes(groups, _inverse(scales), 128) + 128
    return codes.to(torch.uint8).flatten(1), scales, minimums


def _searched_scales(groups: Tensor, far: Tensor) -> Tensor:
    """The scale of each group [...] whose codes leave the least squared error of those that are tried."""
    best, scales = torch.zeros_like(far), torch.zeros_like(far)
    for step in _STEPS:
        codes = _codes(groups, _inverse(far, step), 8)
        # One after another, as the kernel does: sums in another order have other bits.
        products, squares = torch.zeros_like(far), torch.zeros_like(far)
        for k in range(groups.shape[-1]):
            products = products + groups[..., k] * codes[..., k]
            squares = squares + codes[..., k] * codes[..., k]
        # For these codes products / squares is the best scale, and takes products^2 / squares off the squared error.
        fitted = products / torch.where(squares > 0, squares, 1)
        taken = fitted * products
        better = taken > best
        best, scales = torch.where(better, taken, best), torch.where(better, fitted, scales)
    return scales


def _codes(groups: Tensor, inverse: Tensor, zero: int) -> Tensor:
    return (groups * inverse.unsqueeze(-1)).clamp_(-zero, zero - 1).round_()


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


def _inverse(scales: Tensor, numerator: float = 1.0) -> Tensor:
    """numerator / scale, and 0 where the scale is 0: such a group is all zero, but for the rounding of its scale."""
    # Not numerator / scales, which torch takes for a product with the reciprocal, rounded twice.
    return torch.where(scales == 0, 0, torch.full_like(scales, numerator) / scales)
