"""Replicas: the processes that train copies of one model on different sequences, and what they average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Replicas:
    """This process is number `rank` of `count`; with more than one, torch.distributed must be initialised."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and reports."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, on every process, by its mean over the processes."""
        if self.count == 1:
            return
        # One message instead of one a tensor: at the size of a small model's gradients, latency is what costs.
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(joined)
        joined /= self.count
        parts = torch.split(joined, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()
