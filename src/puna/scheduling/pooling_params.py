"""PoolingParams: how the hidden states of a prompt become one embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """`method`: the last token's hidden state after the last norm, or the mean of all tokens'. `normalize`: to a
    length (L2) of 1.

    Raises ValueError for an unknown pooling.
    """

    method: Pooling = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Pooling):
            raise ValueError(f"pooling is {self.method!r}: use one of {', '.join(get_args(Pooling))}")
