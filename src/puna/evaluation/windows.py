"""Sliding windows: parts of a long text that a context holds, in which every token is predicted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens of which the last `num_scored` are to be predicted, each from all that stand before it in the window."""

    token_ids: list[int]
    num_scored: int


def check_window(context: int, stride: int) -> None:
    """Raises ValueError unless windows of `context` tokens that move by `stride` can predict every token."""
    if context < 2:
        raise ValueError(f"context is {context}: it must be at least 2, a token and the one before it")
    if not 1 <= stride < context:
        raise ValueError(
            f"stride is {stride}: it must be in 1..{context - 1}, below the context of {context}, so that every token "
            "has one before it"
        )


def sliding_windows(token_ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Windows of up to `context` tokens, each `stride` after the last, that score every token but the first once.

    A token scored in any window but the first has at least context - stride tokens before it there. This is how
    perplexity is measured in the documentation of transformers ("Perplexity of fixed-length models").
    """
    check_window(context, stride)
    scored_to = 1
    for begin in range(0, len(token_ids), stride):
        end = min(begin + context, len(token_ids))
        if end > scored_to:
            yield Window(list(token_ids[begin:end]), end - scored_to)
        if end == len(token_ids):
            return
        scored_to = end
