"""The order of rotary channels outside of Hugging Face's checkpoints: neighbours (2i, 2i + 1) instead of halves."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_halves(rows: int, head_size: int) -> Tensor:
    """For each row of a q or k projection in Hugging Face's order, which pairs i with i + D / 2, the row that it is
    stored in where neighbours are rotated: i of a head is in 2i, and D / 2 + i in 2i + 1."""
    return torch.arange(rows).view(-1, head_size // 2, 2).transpose(1, 2).flatten()
