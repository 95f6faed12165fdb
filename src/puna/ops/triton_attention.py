"""Attention on GPUs: how it is cut into programs, for the paged cache and for packed keys and values.

Caches are [blocks, K, block size, D] of the query's dtype, of another float dtype, of float8_e4m3fn with unit scale
(the layer applies others), or int8 with D + 4 bytes a row: there the chunk of a block and a head is `block size` rows
of D codes, then as many float32 scales, and a number is its code times its row's scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from puna.ops.triton_attention_kernel import attention_kernel, combine_kernel
from puna.ops.triton_device import capability, multiprocessors
from puna.ops.triton_overlap import launch_options
from puna.ops.triton_sizes import power_of_two

LOG2_E: Final = 1.4426950408889634
# Keys after which the deterministic form starts new sums, which are then added up in order: of these runs several
# programs may take one each, without a change of any bit.
FIXED_SPLIT: Final = 1024
# Bytes that the sums of splits may take.
MAX_PARTIAL: Final = 1 << 28


@dataclass(frozen=True)
class Cut:
    """How a launch is cut: `rows` of queries (tokens x heads of a group) and `keys` of a tile."""

    rows: int
    keys: int
    warps: int
    stages: int


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    sequence_lengths: Tensor,
    scale: float,
    sliding_window: int | None,
    *,
    deterministic: bool = False,
) -> Tensor:
    """reference.paged_attention, also for caches in FP8 and int8. -> [T, H, D]

    deterministic: a token's bits depend on nothing but its position, its query, and the keys that it sees.
    """
    source = _paged(query, key_cache, value_cache, block_tables)
    sequences = query_starts.shape[0] - 1
    if deterministic:
        launches, splits = _fixed_launches(query, source, sequences)
    else:
        launches, splits = _launches(query, source, sequences, sliding_window)
    fixed = FIXED_SPLIT if deterministic else 0
    return _attend(query, source, query_starts, sequence_lengths, scale, sliding_window, launches, splits, fixed)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    sliding_window: int | None,
    deterministic: bool,
) -> Tensor:
    """Causal attention of whole prompts to themselves: key and value [T, K, D] beside query [T, H, D] -> [T, H, D].

    lengths: int32 [B], the differences of query_starts. `deterministic` gives the bits of paged_attention's own over a
    cache of the query's dtype.
    """
    if key.stride() != value.stride() or key.stride(2) != 1:
        key, value = key.contiguous(), value.contiguous()
    source = Source(key, value, key, value, query_starts, "float", 0, key.shape[1], _itemsize(query, key))
    sequences = lengths.shape[0]
    if deterministic:
        launch = _fixed_launch(query, source, sequences)
    else:
        cut = many_cut(query.shape[1] // source.kv_heads, query.shape[2], source.itemsize)
        launch = Launch(cut, _tiles(query.shape[0], sequences, cut.rows * source.kv_heads // query.shape[1]))
    fixed = FIXED_SPLIT if deterministic else 0
    return _attend(query, source, query_starts, lengths, scale, sliding_window, [launch], 1, fixed)


def even_splits(programs: int, multiprocessors: int, most: int) -> int:
    """Into how many parts to cut the keys: as few as give each multiprocessor two programs, and the busiest of them no
    more than an eighth above its share, if all sequences are of one length."""
    for splits in range(1, most + 1):
        all_programs = programs * splits
        busiest = -(-all_programs // multiprocessors)
        if all_programs >= 2 * multiprocessors and 8 * busiest * multiprocessors <= 9 * all_programs:
            return splits
    return max(1, most)


def few_cut(group: int, head_size: int, itemsize: int) -> Cut:
    """For sequences of a few tokens: bound by memory, so the smallest tile that tensor cores take.

    At 4.3 TB/s a multiprocessor of 132 gets 33 bytes a nanosecond, and a load takes about one microsecond when memory
    is busy, so 33 KB must be on their way at any time. Of `stages` tiles of keys and values one is worked on and the
    next stages - 2 are on their way: in bfloat16 32 KB for each of 3 programs that fit, in FP8 32 KB for each of 4.
    """
    rows = max(16, power_of_two(group))
    keys = 64 if head_size * itemsize <= 256 else 32 if head_size * itemsize <= 512 else 16
    return Cut(rows, keys, 4, 3 if itemsize > 1 else 4)


def many_cut(group: int, head_size: int, itemsize: int) -> Cut:
    """For prompts and their chunks: bound by tensor cores, which want groups of four warps with 64 rows each."""
    if itemsize == 4:  # three products for each: of the larger tiles' registers there are not enough
        return few_cut(group, head_size, itemsize)
    return Cut(max(128, power_of_two(group)), 64 if head_size <= 128 else 32, 8, 3)


def fixed_cut(group: int, head_size: int, itemsize: int) -> Cut:
    """For both, where bits must not depend on which of them it is: eight warps, since two sets of sums do not fit the
    registers of four."""
    if itemsize == 4:
        return few_cut(group, head_size, itemsize)
    return Cut(max(64, power_of_two(group)), 32 if head_size > 128 or itemsize == 1 else 64, 8, 3)


@dataclass(frozen=True)
class Source:
    """Where the keys and values are: with a block size of 0 in rows [T, K, D], else in the blocks that tables name.

    keys, values: of bytes, pairs of them as int16. key_scales, value_scales: float32, beginning with the first scale.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor
    block_tables: Tensor
    kind: Literal["float", "fp8", "int8"]
    block_size: int
    kv_heads: int
    itemsize: int  # see _itemsize


@dataclass(frozen=True)
class Launch:
    """One of a step's launches: which sequences it takes, those of at least `first` tokens or, with `each_sequence`,
    those whose tokens fit one tile; and for how many programs along its first axis."""

    cut: Cut
    programs: int
    first: int = 1
    each_sequence: bool = False


def _paged(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor) -> Source:
    head_size = query.shape[2]
    itemsize = _itemsize(query, key_cache)
    if not key_cache.is_contiguous() or not value_cache.is_contiguous():
        raise ValueError("the caches must be contiguous")
    _, kv_heads, block_size, width = key_cache.shape
    caches = (key_cache, value_cache)
    if key_cache.dtype == torch.int8:
        if width != head_size + 4 or block_size * head_size % 4:
            raise ValueError(f"the int8 cache has rows of {width} bytes: heads of {head_size} need {head_size + 4}")
        # Of the memory as a row of float32, from where the first chunk's scales are.
        key_scales, value_scales = (
            cache.view(torch.float32).view(-1)[block_size * head_size // 4 :] for cache in caches
        )
        keys, values = (cache.view(torch.int16) for cache in caches)
        return Source(keys, values, key_scales, value_scales, block_tables, "int8", block_size, kv_heads, itemsize)
    if width != head_size:
        raise ValueError(f"the cache has rows of {width} numbers: heads have {head_size}")
    if key_cache.dtype == torch.float8_e4m3fn:
        if capability(key_cache.device) < (8, 9):
            raise ValueError("this GPU has no FP8: use a cache of the model's dtype or int8")
        keys, values = (cache.view(torch.int16) for cache in caches)
        return Source(keys, values, keys, values, block_tables, "fp8", block_size, kv_heads, itemsize)
    return Source(*caches, *caches, block_tables, "float", block_size, kv_heads, itemsize)


def _itemsize(query: Tensor, keys: Tensor) -> int:
    """What matters of the two for the cut: all is float32 where queries are, else bytes come as the cache has them."""
    return 4 if query.dtype == torch.float32 else keys.dtype.itemsize


def _launches(query: Tensor, source: Source, sequences: int, sliding_window: int | None) -> tuple[list[Launch], int]:
    """The launches of a step over the cache, and into how many parts they cut the keys."""
    tokens = query.shape[0]
    group = query.shape[1] // source.kv_heads
    few, many = (cut(group, query.shape[2], source.itemsize) for cut in (few_cut, many_cut))
    # Sequences of a token or a few are one launch, longer ones another, each with a tile that suits it; a program finds
    # out whose sequence it has. Where there are as many tokens as sequences, all have one.
    launches = [Launch(few, sequences, each_sequence=True)]
    if tokens > sequences:
        few_tokens = few.rows // group
        launches.append(Launch(many, _tiles(tokens, sequences, many.rows // group), first=few_tokens + 1))
    fewest = max(launch.programs for launch in launches) * source.kv_heads
    longest = source.block_tables.shape[1] * source.block_size
    longest = longest if sliding_window is None else min(longest, sliding_window)
    most = min(longest // 256, 64, _most_splits(query))
    return launches, even_splits(fewest, multiprocessors(query.device), most)


def _fixed_launches(query: Tensor, source: Source, sequences: int) -> tuple[list[Launch], int]:
    """The same of deterministic mode, whose sums are cut at fixed positions, whoever adds them up."""
    launch = _fixed_launch(query, source, sequences)
    splits = -(-source.block_tables.shape[1] * source.block_size // FIXED_SPLIT)
    if launch.programs * source.kv_heads > 2 * multiprocessors(query.device) or splits > _most_splits(query):
        splits = 1
    return [launch], splits


def _fixed_launch(query: Tensor, source: Source, sequences: int) -> Launch:
    group = query.shape[1] // source.kv_heads
    cut = fixed_cut(group, query.shape[2], source.itemsize)
    if query.shape[0] == sequences:
        return Launch(cut, sequences, each_sequence=True)
    return Launch(cut, _tiles(query.shape[0], sequences, cut.rows // group))


def _tiles(tokens: int, sequences: int, tokens_of_tile: int) -> int:
    """As many as any lengths need that the shapes allow, and as triton_attention_kernel counts them."""
    return tokens // tokens_of_tile + sequences


def _most_splits(query: Tensor) -> int:
    return MAX_PARTIAL // (4 * query.numel())


def _attend(
    query: Tensor,
    source: Source,
    query_starts: Tensor,
    sequence_lengths: Tensor,
    scale: float,
    sliding_window: int | None,
    launches: list[Launch],
    splits: int,
    fixed: int,
) -> Tensor:
    query = query if query.stride(2) == 1 else query.contiguous()
    tokens, heads, size = query.shape
    output = highest = totals = sums = torch.empty((tokens, heads, size), dtype=query.dtype, device=query.device)
    if splits > 1:
        highest, totals = (
            torch.empty((splits, tokens, heads), dtype=torch.float32, device=query.device) for _ in range(2)
        )
        sums = torch.empty((splits, tokens, heads, size), dtype=torch.float32, device=query.device)
    keys, block = source.keys, source.block_size
    width = 2 if source.kind == "int8" else 1  # int16 in a scale
    for launch in launches:
        attention_kernel[(launch.programs, source.kv_heads, splits)](
            query,
            keys,
            source.values,
            source.key_scales,
            source.value_scales,
            output,
            highest,
            totals,
            sums,
            source.block_tables,
            query_starts,
            sequence_lengths,
            scale * LOG2_E,
            sliding_window or 0,
            query_starts.shape[0] - 1,
            tokens,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            keys.stride(0) // width,
            keys.stride(1) // width,
            source.block_tables.stride(0),
            FEW=launch.each_sequence,
            FIRST_OF_MANY=launch.first,
            SPLIT=splits > 1,
            FIXED=fixed,
            WINDOWED=sliding_window is not None,
            KIND=source.kind,
            HEADS=heads,
            GROUP=heads // source.kv_heads,
            D=size,
            BLOCK=block,
            M=launch.cut.rows,
            N=launch.cut.keys,
            STAGES=launch.cut.stages,
            PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
            num_warps=launch.cut.warps,
            **launch_options(),
        )
    if splits > 1:
        combine_kernel[(tokens, heads)](
            highest,
            totals,
            sums,
            output,
            tokens,
            splits,
            SPLITS=power_of_two(splits),
            FIXED=fixed > 0,
            HEADS=heads,
            D=size,
            num_warps=4,
            **launch_options(),
        )
    return output
