"""From logits to a choice: repetition penalty, temperature, top-k, top-p, min-p, and the draw itself."""

from __future__ import annotations

import torch
from torch import Tensor


def penalize_repetition(logits: Tensor, token_ids: Tensor, token_mask: Tensor, penalty: float) -> Tensor:
    """Divides the positive logits of tokens seen before by `penalty`, multiplies the negative ones (CTRL, Keskar 2019).

    logits [B, V]; token_ids [B, L], of which those where token_mask [B, L] is true count. -> [B, V]
    """
    seen = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, token_ids, token_mask.int()) > 0
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k highest of logits [B, V]; ties with the k-th stay. k of 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    lowest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest most probable tokens that hold the probability p together (Holtzman et al., 2019)."""
    if p >= 1:
        return logits
    ascending, order = logits.sort(dim=-1)
    below = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    below[:, -1] = False
    return logits.masked_fill(torch.zeros_like(below).scatter_(1, order, below), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens less probable than p times the most probable one (Nguyen et al., 2024)."""
    if p <= 0:
        return logits
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits [B, V], with the probabilities of their softmax -> [B]."""
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
