"""Attention kernels against plain sums in float64, over all forms of caches; what the deterministic form promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from puna.ops import triton_attention

FP8 = torch.float8_e4m3fn


def stored_as_int8(x: Tensor) -> Tensor:
    """[blocks, K, block size, D] -> int8 [blocks, K, block size, D + 4]: the codes of a chunk, then their scales."""
    scales = x.float().abs().amax(-1) / 127
    codes = (x.float() / scales.clamp(min=1e-30)[..., None]).round().to(torch.int8)
    chunk = torch.cat((codes.flatten(2), scales.contiguous().view(torch.int8)), dim=-1)
    return chunk.view(*x.shape[:-1], x.shape[-1] + 4)


def as_wide(cache: Tensor, size: int) -> Tensor:
    """The numbers of a cache of any form."""
    if cache.dtype != torch.int8:
        return cache.double()
    chunk = cache.flatten(2)
    codes = chunk[..., : cache.shape[2] * size].reshape(*cache.shape[:3], size)
    scales = chunk[..., cache.shape[2] * size :].contiguous().view(torch.float32)
    return codes.double() * scales.double()[..., None]


@dataclass
class Case:
    """A step: for each sequence how many tokens it has, and how many of them are new."""

    sequences: Sequence[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 1
    size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32
    window: int | None = None
    spare_blocks: int = 1

    def made(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        random = torch.Generator().manual_seed(seed)
        widest = max(-(-length // self.block_size) for length, _ in self.sequences) + self.spare_blocks
        total = 1 + widest * len(self.sequences)
        shape = (total, self.kv_heads, self.block_size, self.size)
        caches = [torch.randn(shape, generator=random).to(self.dtype) for _ in range(2)]
        # Block 0 is the dummy: nothing of it may count.
        order = 1 + torch.randperm(total - 1, generator=random)
        tables = order.view(len(self.sequences), widest).to(torch.int32)
        for b, (length, _) in enumerate(self.sequences):
            used = -(-length // self.block_size)
            tables[b, used:] = 0
            for cache in caches:
                cache[tables[b, used - 1], :, length - (used - 1) * self.block_size :] = float("nan")
        if self.cache == torch.int8:
            caches = [stored_as_int8(torch.nan_to_num(cache)) for cache in caches]
        else:
            caches[0][0] = caches[1][0] = float("nan")
            caches = [cache.to(self.cache) for cache in caches]
        counts = torch.tensor([0] + [new for _, new in self.sequences])
        query = torch.randn((int(counts.sum()), self.heads, self.size), generator=random).to(self.dtype)
        starts, lengths = counts.cumsum(0).int(), torch.tensor([length for length, _ in self.sequences]).int()
        return [x.to(device) for x in (query, *caches, tables, starts, lengths)]

    def expected(self, query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        """In float64, position by position's rule, with nothing of the blocks' making."""
        tables, starts, lengths = (x.cpu() for x in rest)
        wide = [torch.nan_to_num(as_wide(cache.cpu(), self.size)) for cache in (keys, values)]
        output = torch.empty(query.shape, dtype=torch.float64)
        for b, length in enumerate(lengths.tolist()):
            key, value = (
                cache[tables[b].long()].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(
                    self.heads // self.kv_heads, 0
                )
                for cache in wide
            )  # fmt: skip
            rows = slice(int(starts[b]), int(starts[b + 1]))
            own = torch.arange(length)[length - (rows.stop - rows.start) :, None]
            visible = (torch.arange(length) <= own) & (torch.arange(length) > own - (self.window or length))
            scores = query[rows].cpu().double().transpose(0, 1) @ key.transpose(1, 2) * self.size**-0.5
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            output[rows] = (weights @ value).transpose(0, 1)
        return output


def error(result: Tensor, expected: Tensor) -> float:
    assert not result.isnan().any()
    return float((result.cpu().double() - expected).norm() / expected.norm())


def check(case: Case, device: torch.device, bound: float) -> None:
    inputs = case.made(device)
    for op in (triton_attention.paged_attention, triton_attention.deterministic_paged_attention):
        result = op(*inputs, case.size**-0.5, case.window)
        assert result.dtype == case.dtype
        assert error(result, case.expected(*inputs)) < bound


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_sizes_of_heads(size: int, device: torch.device) -> None:
    check(Case([(19, 1), (33, 9)], size=size), device, 1e-5)
