"""Draws of tokens to try kernels on, and where float64 says that each token's share of 0..1 lies."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TOLERANCE = 1e-5  # of the sum of a row's probabilities
CASES: tuple[frozenset[str], ...] = tuple(
    frozenset(names) for count in range(4) for names in itertools.combinations(("top_k", "top_p", "min_p"), count)
)


def arguments(rows: int, width: int, case: frozenset[str], scale: float, seed: int) -> dict[str, Any]:
    """Random logits [rows, width], and random parameters of what is in `case`, the others None."""
    random = torch.Generator().manual_seed(seed)
    top_k = torch.randint(1, width + 1, (rows,), generator=random)
    top_p = torch.rand(rows, generator=random, dtype=torch.float64).clamp(0.01, 1)
    min_p = torch.rand(rows, generator=random) * 0.3
    return {
        "logits": torch.randn(rows, width, generator=random) * scale,
        "temperature": torch.rand(rows, generator=random) * 1.5 + 0.1,
        "top_k": top_k if "top_k" in case else None,
        "top_p": top_p if "top_p" in case else None,
        "min_p": min_p if "min_p" in case else None,
        "uniform": torch.rand(rows, generator=random, dtype=torch.float64),
    }


def intervals(given: dict[str, Any], row: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where in 0..1 each token's probability begins and ends, in float64."""
    x = given["logits"][row].double().numpy()
    p = np.exp((x - x.max()) / float(given["temperature"][row]))
    relative, order = p.copy(), np.argsort(-x, kind="stable")
    if given["top_k"] is not None:
        p[x < x[order[int(given["top_k"][row]) - 1]]] = 0
    if given["top_p"] is not None:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= p.sum() * float(given["top_p"][row])]] = 0
    if given["min_p"] is not None:
        p[relative < float(given["min_p"][row])] = 0
    ends = np.cumsum(p / p.sum())
    return ends - p / p.sum(), ends
