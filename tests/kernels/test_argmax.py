"""The largest number of each row: equal to numpy's, the first of equals, and NaN where there is one."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.ops import cpu

SIZES = (1, 2, 15, 16, 17, 31, 33, 1000, 32_003)


def check(x: Tensor) -> None:
    indices, values = cpu.argmax(x)
    rows = x.numpy()
    assert indices.tolist() == np.argmax(rows, axis=1).tolist()
    np.testing.assert_array_equal(values.numpy(), rows.max(axis=1))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_is_numpys_of_random_rows_and_of_many_equals(kernels: ModuleType, level: str, threads: int) -> None:
    kernels.set_threads(threads)
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        for rows in (1, 5):
            check(torch.randn(rows, size, generator=generator))
            check(torch.randint(-2, 3, (rows, size), generator=generator).float())  # the first of equals
            check(torch.randn(rows, size + 7, generator=generator)[:, 3 : 3 + size])  # rows that lie apart
            check(torch.randn(1, size, generator=generator).expand(rows, -1))  # the same row


def test_finds_the_only_one_at_every_place(kernels: ModuleType, level: str) -> None:
    for size in (17, 40):
        x = torch.full((size, size), -3.0)
        x.fill_diagonal_(-2.0)
        check(x)


def test_infinities_and_rows_with_nothing_else(kernels: ModuleType, level: str) -> None:
    inf = float("inf")
    check(torch.tensor([[-inf] * 20, [-inf] * 19 + [inf], [inf] * 20, [0.0] * 20, [-inf] * 18 + [-1e38, -inf]]))


def test_a_row_with_a_nan_has_nan_as_its_largest(kernels: ModuleType, level: str) -> None:
    for place in (0, 15, 16, 36):
        for sign in (1, -1):
            x = torch.zeros(3, 37)
            x[0, 5] = float("inf")
            x[1, place] = torch.tensor(float("nan")).copysign(torch.tensor(float(sign)))
            values = cpu.argmax(x)[1].tolist()
            assert values[0] == float("inf")
            assert np.isnan(values[1])
            assert values[2] == 0


def test_wrong_tensors_are_refused() -> None:
    for x in (torch.zeros(5), torch.zeros(2, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="logits "):
            cpu.argmax(x)
