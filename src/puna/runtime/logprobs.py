"""Log-probabilities of given tokens, and each row's likeliest tokens, from the model's logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from puna.runtime import sampling_ops as ops
from puna.scheduling.step_plan import TokenLogprobs

# Rows at a time, so that a long prompt's log-probabilities never all exist at once.
MAX_ELEMENTS: Final = 1 << 20


def candidates(logits: Tensor, k: int) -> list[tuple[tuple[int, float], ...]]:
    """The k likeliest tokens of each row of logits [R, V] with their log-probabilities, best first.

    The lower id comes first among equals. Tokens of probability 0 are left out, so that a row may have fewer; one with
    a NaN or infinity has none.
    """
    found: list[tuple[tuple[int, float], ...]] = []
    if _looks_up(logits, k):
        nothing = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return [row.top for row in _on_gpu(logits, nothing, k)]
    for part in _parts(logits):
        values, ids = ops.top_k(part, k)
        logprobs = part.log_softmax(dim=1).gather(1, ids.clamp(max=part.shape[1] - 1))
        found += _pairs(ids, logprobs.masked_fill_(~values.isfinite(), -torch.inf))
    return found


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> list[TokenLogprobs]:
    """For each row of logits [R, V], what is known of the token [R] chosen there, and the k likeliest.

    The rank is 1 and one more for each token with a higher logit, so that equals share it.
    """
    found: list[TokenLogprobs] = []
    if _looks_up(logits, k):
        return _on_gpu(logits, token_ids, k)
    for part, chosen in zip(_parts(logits), _parts(token_ids.unsqueeze(1), logits.shape[1]), strict=True):
        everything = part.log_softmax(dim=1)
        ranks = (part > part.gather(1, chosen)).sum(dim=1) + 1
        own = everything.gather(1, chosen).squeeze(1)
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(part)
        if k > 0:
            values, ids = ops.top_k(part, k)
            logprobs = everything.gather(1, ids.clamp(max=part.shape[1] - 1))
            tops = _pairs(ids, logprobs.masked_fill_(~values.isfinite(), -torch.inf))
        rows = zip(chosen.squeeze(1).tolist(), own.tolist(), ranks.tolist(), tops, strict=True)
        found += [TokenLogprobs(*row) for row in rows]
    return found


def _looks_up(logits: Tensor, k: int) -> bool:
    """Whether kernels go over the logits once, without any log-probability that nobody asked for."""
    return logits.is_cuda and ops.has_triton() and k <= ops.LOOKED_UP_ON_GPU and len(logits) > 0


def _on_gpu(logits: Tensor, token_ids: Tensor, k: int) -> list[TokenLogprobs]:
    from puna.ops import triton_logprobs

    found = triton_logprobs.token_logprobs(logits, token_ids, min(k, logits.shape[1]))
    # In one copy to the host. Ids and ranks are exact as float64.
    columns = (
        token_ids.unsqueeze(1),
        found.own.unsqueeze(1),
        found.ranks.unsqueeze(1),
        found.top_ids,
        found.top_logprobs,
    )
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()
    width = found.top_ids.shape[1]
    return [
        TokenLogprobs(int(token), own, int(rank), _pairs_of(top[:width], top[width:]))
        for token, own, rank, *top in rows
    ]


def _parts(x: Tensor, width: int | None = None) -> Iterator[Tensor]:
    """Some rows of x at a time, as many as have MAX_ELEMENTS with `width` columns."""
    if len(x) > 0:
        yield from torch.split(x, max(1, MAX_ELEMENTS // (width or x.shape[1])))


def _pairs(ids: Tensor, logprobs: Tensor) -> list[tuple[tuple[int, float], ...]]:
    return [_pairs_of(row, values) for row, values in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def _pairs_of(ids: Sequence[float], logprobs: Sequence[float]) -> tuple[tuple[int, float], ...]:
    pairs = zip(ids, logprobs, strict=True)
    return tuple((int(token), logprob) for token, logprob in pairs if logprob > -torch.inf)
