"""The draw of a token: against float64 by sorting, at every level, and the same on any number of threads."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from draw_oracle import CASES, TOLERANCE, arguments, intervals
from puna.ops import cpu

ROWS = 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(sorted(case)) or "plain")
def test_points_where_float64_does(kernels: ModuleType, level: str, case: frozenset[str]) -> None:
    kernels.set_threads(2)
    for seed, (width, scale) in enumerate(itertools.product((1, 7, 16, 100, 3001), (0.3, 2.0, 8.0))):
        given = arguments(ROWS, width, case, scale, seed)
        tokens, highest = cpu.draw(**given)
        assert torch.equal(highest, given["logits"].amax(dim=1))
        for row, (token, uniform) in enumerate(zip(tokens.tolist(), given["uniform"].tolist(), strict=True)):
            begins, ends = intervals(given, row)
            assert begins[token] < ends[token]
            assert begins[token] - TOLERANCE <= uniform <= ends[token] + TOLERANCE


def test_levels_and_threads_draw_the_same(kernels: ModuleType) -> None:
    given = arguments(ROWS, 5003, frozenset(["top_k", "top_p", "min_p"]), 2.0, 0)
    found = []
    for level in kernels.supported_levels():
        kernels.set_level(level)
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            found.append(cpu.draw(**given)[0].tolist())
    assert all(tokens == found[0] for tokens in found)
    alone = [cpu.draw(**{k: None if v is None else v[i : i + 1] for k, v in given.items()})[0] for i in range(ROWS)]
    assert torch.cat(alone).tolist() == found[0]
    assert len(set(found[0])) > ROWS // 4  # not always the same token


def draw_one(x: list[float], uniform: float, **more: Any) -> int:
    ones = {"top_k": None, "top_p": None, "min_p": None} | {k: torch.tensor([v]) for k, v in more.items()}
    tokens, _ = cpu.draw(torch.tensor([x]), torch.ones(1), uniform=torch.tensor([uniform], dtype=torch.float64), **ones)
    return int(tokens)


def test_ties(kernels: ModuleType, level: str) -> None:
    half = torch.tensor(0.5, dtype=torch.float64).item()
    x = [0.0] * 40
    assert draw_one(x, 0.999, top_k=3) == 39  # all are level with the third
    nucleus = {"top_p": np.float64(half)}
    assert draw_one(x, 0.999, **nucleus) == 19  # the lowest ids
    assert draw_one(x, 0.0, **nucleus) == 0
    assert draw_one([0.0, -0.0, 0.0], 0.999, top_k=1) == 2  # both zeros are level


def test_what_is_ruled_out_or_not_finite(kernels: ModuleType, level: str) -> None:
    inf, nan = float("inf"), float("nan")
    for uniform in (0.0, 0.5, 1 - 2.0**-53, 1.0):
        assert draw_one([-inf] * 30 + [1.0] + [-inf] * 9, uniform) == 30
        assert draw_one([-inf] * 30 + [1.0] + [-inf] * 9, uniform, top_k=5, top_p=np.float64(0.3)) == 30
        for bad in ([nan, 1.0], [inf, 1.0], [-inf, -inf]):
            assert draw_one(bad, uniform) == 0
    x = torch.tensor([[1.0, -inf, 2.0]])
    for temperature in (0.0, -1.0, nan, inf):  # no probabilities: never more than a token without meaning
        found, _ = cpu.draw(x, torch.tensor([temperature]), None, None, None, torch.zeros(1, dtype=torch.float64))
        assert found.tolist() == [0]


def test_wrong_tensors_are_refused() -> None:
    given = arguments(ROWS, 10, frozenset(["top_k", "top_p", "min_p"]), 1.0, 0)
    wrong: list[tuple[str, Tensor]] = [
        ("logits", given["logits"].double()),
        ("temperature", given["temperature"][:5]),
        ("top_k", given["top_k"].int()),
        ("top_p", given["top_p"].float()),
        ("min_p", given["min_p"].unsqueeze(1)),
        ("uniform", given["uniform"].float()),
    ]
    for name, tensor in wrong:
        with pytest.raises(ValueError, match=name):
            cpu.draw(**given | {name: tensor})
