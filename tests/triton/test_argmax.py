"""The highest logit of each row in Triton, against torch: which of equals, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from puna.ops import triton_argmax

INFINITY, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_highest(device: torch.device, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    for rows, width in ((3, 1), (3, 100), (2, 5003)):
        x = (torch.randn(rows, 2 * width, generator=random).round(decimals=1)).to(dtype)[:, :width]
        ids, highest = triton_argmax.argmax(x.to(device))
        assert highest.tolist() == x.float().amax(dim=1).tolist()
        # Many are level with it.
        assert ids.tolist() == [int((row == row.amax()).nonzero()[0]) for row in x]


def test_highest_of_odd_rows(device: torch.device) -> None:
    x = torch.zeros(5, 4100)
    x[0, 4099], x[1, 3], x[3, 4000], x[4, 0] = NAN, NAN, INFINITY, -1
    x[2] = -INFINITY
    x[1, 4000] = 1
    ids, highest = triton_argmax.argmax(x.to(device))
    assert highest.isnan().tolist() == [True, True, False, False, False]
    assert highest[2:].tolist() == [-INFINITY, INFINITY, 0]
    assert ids[2:].tolist() == [0, 4000, 1]
    assert (ids < 4100).all()
    assert triton_argmax.argmax(x[:0].to(device))[0].shape == (0,)
