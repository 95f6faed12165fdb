"""Mapping: which part of the model a rank holds; pure arithmetic, validated once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """The place of one rank in a grid of `pp_size` pipeline stages with `tp_size` tensor-parallel ranks each.

    Ranks are numbered stage by stage: `rank = pp_rank * tp_size + tp_rank`, so that the ranks that exchange the most
    (one tensor-parallel group) are neighbours. Raises ValueError for sizes below one and ranks outside of the grid.
    """

    tp_size: int = 1
    pp_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}: it must be in 0..{self.world_size - 1} (tp_size * pp_size ranks)")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def tp_group(self) -> tuple[int, ...]:
        """The ranks of this stage, which hold slices of the same layers."""
        first = self.pp_rank * self.tp_size
        return tuple(range(first, first + self.tp_size))

    @property
    def pp_group(self) -> tuple[int, ...]:
        """The ranks that hold the same slice in each stage, in the order of the layers."""
        return tuple(range(self.tp_rank, self.world_size, self.tp_size))

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def prev_pp_rank(self) -> int:
        """The rank that sends hidden states to this one. Raises ValueError on the first stage."""
        if self.is_first_pp_rank():
            raise ValueError(f"rank {self.rank} is in the first pipeline stage: nothing comes before it")
        return self.rank - self.tp_size

    def next_pp_rank(self) -> int:
        """The rank that this one sends hidden states to. Raises ValueError on the last stage."""
        if self.is_last_pp_rank():
            raise ValueError(f"rank {self.rank} is in the last pipeline stage: nothing comes after it")
        return self.rank + self.tp_size

    def pp_layers(self, num_layers: int) -> range:
        """The layers of this stage; where they do not divide evenly, the first stages hold one more.

        Raises ValueError where a stage would be empty.
        """
        if num_layers < self.pp_size:
            raise ValueError(
                f"pp_size is {self.pp_size}: a model of {num_layers} layers has no more than that many stages"
            )
        share, extra = divmod(num_layers, self.pp_size)
        first = self.pp_rank * share + min(self.pp_rank, extra)
        return range(first, first + share + (self.pp_rank < extra))
