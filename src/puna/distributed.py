"""Communicator: how a rank talks to the others; one that is alone, and one over torch.distributed."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

from puna.mapping import Mapping


class Communicator(Protocol):
    """What layers and runners may ask of the other ranks. `device` is where this rank's tensors live."""

    @property
    def mapping(self) -> Mapping: ...

    @property
    def device(self) -> torch.device: ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the tensor-parallel group, on every rank of it; may reuse `tensor`."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The group's tensors joined along the last axis in the order of the ranks: [..., n] -> [..., tp_size * n]."""
        ...

    def send(self, tensor: Tensor, rank: int) -> None:
        """Sends to a global rank, which must call `recv` with the same shape and dtype."""
        ...

    def recv(self, tensor: Tensor, rank: int) -> Tensor:
        """Fills `tensor` with what the global rank sends, and returns it."""
        ...


class NullCommunicator:
    """The communicator of a rank that is alone: reductions and gathers give back their argument."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.mapping = Mapping()
        self.device = torch.device(device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def send(self, tensor: Tensor, rank: int) -> None:
        raise ValueError(f"cannot send to rank {rank}: this rank is alone")

    def recv(self, tensor: Tensor, rank: int) -> Tensor:
        raise ValueError(f"cannot receive from rank {rank}: this rank is alone")


class TorchCommunicator:
    """Talks through torch.distributed (gloo on CPUs, nccl on GPUs), whose default group must be initialised.

    Every rank must construct it, since making a process group is a collective call. Raises ValueError where the default
    group is not of `mapping.world_size` ranks or this process is not `mapping.rank`.
    """

    def __init__(self, mapping: Mapping, device: torch.device | str = "cpu") -> None:
        world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if (world_size, rank) != (mapping.world_size, mapping.rank):
            raise ValueError(
                f"the process group has {world_size} ranks and this is rank {rank}, but the mapping is for rank "
                f"{mapping.rank} of {mapping.world_size}: start {mapping.world_size} processes"
            )
        self.mapping = mapping
        self.device = torch.device(device)
        # torch.distributed wants every rank to make every group, in the same order.
        for first in range(0, mapping.world_size, mapping.tp_size):
            ranks = list(range(first, first + mapping.tp_size))
            group = torch.distributed.new_group(ranks)
            if mapping.rank in ranks:
                self._tp_group = group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.mapping.tp_size > 1:
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor, group=self._tp_group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.mapping.tp_size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.mapping.tp_size)]
        torch.distributed.all_gather(parts, tensor, group=self._tp_group)
        return torch.cat(parts, dim=-1)

    def send(self, tensor: Tensor, rank: int) -> None:
        torch.distributed.send(tensor.contiguous(), rank)

    def recv(self, tensor: Tensor, rank: int) -> Tensor:
        torch.distributed.recv(tensor, rank)
        return tensor
