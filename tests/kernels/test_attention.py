"""store_kv against the described layout; paged_attention against float64 and, in bits, against itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Final

import pytest
import torch
from torch import Tensor

from puna.ops import reference

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
THREADS: Final = (1, 2, 3)
STRIP: Final = 16

each_cache_dtype = pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)


@dataclass
class Shape:
    kv_heads: int
    group: int
    head_size: int
    block_size: int = 16

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


class Cache:
    """Keys and values as the kernels take them. What no token was stored in is NaN, or -1 in int8."""

    def __init__(self, shape: Shape, blocks: int, dtype: torch.dtype) -> None:
        self.shape, self.blocks, self.dtype = shape, blocks, dtype
        width = shape.head_size + (4 if dtype == torch.int8 else 0)
        size = (blocks, shape.kv_heads, shape.block_size, width)
        self.keys, self.values = (torch.empty(size, dtype=dtype) for _ in range(2))
        for part in (self.keys, self.values):
            part.view(torch.uint8).fill_(255)

    def args(self) -> dict[str, int]:
        return {
            "keys": self.keys.data_ptr(),
            "values": self.values.data_ptr(),
            "blocks": self.blocks,
            "kv_heads": self.shape.kv_heads,
            "block_size": self.shape.block_size,
            "head_size": self.shape.head_size,
            "cache_dtype": DTYPES[self.dtype],
        }

    def store(self, kernels: ModuleType, key: Tensor, value: Tensor, slots: Tensor) -> None:
        kernels.store_kv(
            key=key.data_ptr(),
            value=value.data_ptr(),
            slots=slots.data_ptr(),
            tokens=slots.numel(),
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            dtype=DTYPES[key.dtype],
            **self.args(),
        )

    def attend(
        self,
        kernels: ModuleType,
        query: Tensor,
        tables: Tensor,
        counts: list[int],
        lengths: list[int],
        window: int = 0,
        scale: float | None = None,
    ) -> Tensor:
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        ends = torch.tensor(lengths, dtype=torch.int32)
        y = torch.full(query.shape, float("nan"), dtype=query.dtype)
        kernels.paged_attention(
            query=query.data_ptr(),
            y=y.data_ptr(),
            block_tables=tables.data_ptr(),
            query_starts=starts.data_ptr(),
            sequence_lengths=ends.data_ptr(),
            sequences=len(lengths),
            heads=self.shape.heads,
            query_stride=query.stride(0),
            table_stride=tables.stride(0),
            table_width=tables.shape[1],
            window=window,
            scale=self.shape.head_size**-0.5 if scale is None else scale,
            dtype=DTYPES[query.dtype],
            **self.args(),
        )
        return y

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """float32 keys and values [blocks, K, block size, D], read as the layout is described."""
        shape, size = self.shape, self.shape.head_size
        per_strip = shape.block_size // STRIP

        def strips(part: Tensor) -> Tensor:
            return part.reshape(self.blocks, shape.kv_heads, -1)[..., : shape.block_size * size].unflatten(
                -1, (per_strip, STRIP * size)
            )

        key_strips, value_strips = strips(self.keys), strips(self.values)
        group = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}[self.dtype]
        whole = size // group * group
        keys = (
            key_strips[..., : STRIP * whole].unflatten(-1, (whole // group, STRIP, group)).transpose(-3, -2).flatten(-2)
        )
        if whole < size:
            keys = torch.cat((keys, key_strips[..., STRIP * whole :].unflatten(-1, (STRIP, size - whole))), -1)
        value_group = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}[self.dtype]
        values = value_strips.unflatten(-1, (STRIP // value_group, size, value_group)).transpose(-2, -1).flatten(-3, -2)
        keys, values = keys.flatten(2, 3), values.flatten(2, 3)
        if self.dtype != torch.int8:
            return keys.float(), values.float()
        keys = keys.contiguous().view(torch.uint8).float() - 128
        key_scales, value_scales = (
            part.reshape(self.blocks, shape.kv_heads, -1)[..., shape.block_size * size :]
            .contiguous()
            .view(torch.float32)
            for part in (self.keys, self.values)
        )
        return keys * key_scales.unsqueeze(-1), values.float() * value_scales.unsqueeze(-1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@dataclass
class Sequences:
    """Sequences whose keys and values are in a cache, in blocks in random order, with a query for every token."""

    cache: Cache
    lengths: list[int]
    tables: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def make(
        cls,
        kernels: ModuleType,
        shape: Shape,
        lengths: list[int],
        cache_dtype: torch.dtype,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Sequences:
        counts = [-(-length // shape.block_size) for length in lengths]
        cache = Cache(shape, sum(counts) + 2, cache_dtype)
        order = torch.randperm(cache.blocks, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        # What is behind a sequence's end names no block at all: it must not be looked at.
        tables = torch.full((len(lengths), max(counts) + 1), 1 << 30, dtype=torch.int32)
        parts = []
        for b, length in enumerate(lengths):
            tables[b, : counts[b]] = order[sum(counts[:b]) : sum(counts[: b + 1])]
            kinds = [
                random(length, heads, shape.head_size, dtype=dtype, seed=1000 * seed + 3 * b + i, scale=1.5)
                for i, heads in enumerate((shape.heads, shape.kv_heads, shape.kv_heads))
            ]
            cache.store(kernels, kinds[1], kinds[2], cls.slots(shape, tables[b], length))
            parts.append(kinds)
        queries, keys, values = (list(kind) for kind in zip(*parts, strict=True))
        return cls(cache, lengths, tables, queries, keys, values)

    @staticmethod
    def slots(shape: Shape, table: Tensor, length: int) -> Tensor:
        positions = torch.arange(length)
        return table.long()[positions // shape.block_size] * shape.block_size + positions % shape.block_size

    def attend(
        self, kernels: ModuleType, rows: list[tuple[int, int, int]], window: int = 0, scale: float | None = None
    ) -> list[Tensor]:
        """What the tokens begin .. end - 1 of sequence b get, for each (b, begin, end) of `rows`, in one call."""
        query = torch.cat([self.queries[b][begin:end] for b, begin, end in rows])
        tables = torch.stack([self.tables[b] for b, _, _ in rows])
        counts = [end - begin for _, begin, end in rows]
        y = self.cache.attend(kernels, query, tables, counts, [end for _, _, end in rows], window, scale)
        return list(y.split(counts))

    def exact(self, b: int, begin: int, end: int, window: int = 0, scale: float | None = None) -> Tensor:
        """The same in float64, of the numbers that are in the cache."""
        shape = self.cache.shape
        blocks = self.tables[b, : -(-end // shape.block_size)].long()
        key, value = (
            part[blocks].transpose(0, 1).flatten(1, 2)[:, :end].double().repeat_interleave(shape.group, 0)
            for part in self.cache.unpacked()
        )
        query = self.queries[b][begin:end].double().transpose(0, 1)
        scores = query @ key.transpose(1, 2) * (shape.head_size**-0.5 if scale is None else scale)
        ahead = torch.arange(begin, end)[:, None] - torch.arange(end)[None, :]
        hidden = (ahead < 0) | (ahead >= window) if window else ahead < 0
        return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ value).transpose(0, 1)


def assert_close(y: Tensor, exact: Tensor, cache_dtype: torch.dtype) -> None:
    # int8: queries of 15 bits, weights of 16. Otherwise float32, and then the rounding of y.
    absolute = 1.5e-3 if cache_dtype == torch.int8 else 1e-5
    relative = 0.0 if y.dtype == torch.float32 else 0.51 * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), exact, atol=absolute, rtol=relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_cache_dtype
def test_store_writes_the_layout(kernels: ModuleType, level: str, cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for size, block_size, threads in ((2, 16, 1), (18, 32, 2), (20, 16, 3), (64, 48, 2), (80, 16, 1), (256, 16, 2)):
        kernels.set_threads(threads)
        shape = Shape(3, 1, size, block_size)
        cache = Cache(shape, 3, cache_dtype)
        before = cache.keys.clone()
        tokens = 2 * block_size + 5
        wide = random(tokens, 2, shape.kv_heads * size + 3, dtype=dtype, seed=size)
        key, value = (wide[:, i, : shape.kv_heads * size].unflatten(-1, (shape.kv_heads, size)) for i in range(2))
        slots = torch.randperm(3 * block_size, generator=torch.Generator().manual_seed(size))[:tokens]
        cache.store(kernels, key, value, slots)
        for part, stored in zip((key, value), cache.unpacked(), strict=True):
            found = stored.transpose(1, 2).flatten(0, 1)[slots]
            if cache_dtype == torch.int8:
                step = part.float().abs().amax(-1, keepdim=True) / 127
                assert bool(((found - part.float()).abs() <= 0.5001 * step).all())
            else:
                assert torch.equal(found, part.to(cache_dtype).float())
        # Nothing else was written.
        other = Cache(shape, 3, cache_dtype)
        other.store(kernels, key, value, slots)
        untouched = torch.ones(3 * block_size, dtype=torch.bool)
        untouched[slots] = False
        assert untouched.any()
        assert torch.equal(other.keys.view(torch.uint8), cache.keys.view(torch.uint8))
        if cache_dtype != torch.int8:
            assert cache.unpacked()[0].transpose(1, 2).flatten(0, 1)[untouched].isnan().all()
            assert torch.equal(
                before.view(torch.uint8)[0, 0, 0], torch.full_like(before.view(torch.uint8)[0, 0, 0], 255)
            )


def test_stored_int8_has_no_number_for_what_is_not_finite(kernels: ModuleType, level: str) -> None:
    shape = Shape(1, 1, 20)
    cache = Cache(shape, 1, torch.int8)
    key, value = random(16, 1, 20), random(16, 1, 20)
    key[3, 0, 7], key[4, 0, 19], value[5, 0, 0] = math.nan, math.inf, -math.inf
    value[6] = 0.0
    cache.store(kernels, key, value, torch.arange(16))
    keys, values = (part[0, 0] for part in cache.unpacked())
    assert keys.isnan().any(-1).nonzero().flatten().tolist() == [3, 4]
    assert values.isnan().any(-1).nonzero().flatten().tolist() == [5]
    assert bool((values[6] == 0).all())


SHAPES: Final = (
    Shape(2, 4, 64),
    Shape(2, 1, 16),
    Shape(1, 3, 20, 32),
    Shape(1, 8, 80),
    Shape(2, 2, 96, 48),
    Shape(1, 5, 112),
    Shape(1, 7, 128),
    Shape(1, 2, 256),
    Shape(1, 6, 18),
    Shape(3, 1, 2),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.kv_heads}x{shape.group}x{shape.head_size}")
@each_cache_dtype
def test_attention_is_exact(kernels: ModuleType, level: str, cache_dtype: torch.dtype, shape: Shape) -> None:
    # A decode row over two partitions, a whole prompt, the last tokens of a long one, a first token.
    rows = [(0, 599, 600), (1, 0, 37), (2, 525, 530), (3, 0, 1), (1, 36, 37)]
    sequences = Sequences.make(kernels, shape, [600, 37, 530, 1], cache_dtype, seed=shape.head_size)
    for threads, window in zip(THREADS, (0, 20, 517), strict=True):
        kernels.set_threads(threads)
        for (b, begin, end), y in zip(rows, sequences.attend(kernels, rows, window), strict=True):
            assert_close(y, sequences.exact(b, begin, end, window), cache_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_cache_dtype
def test_attention_in_half_precision(
    kernels: ModuleType, level: str, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    sequences = Sequences.make(kernels, Shape(2, 3, 48), [140, 70], cache_dtype, dtype)
    for (b, begin, end), y in zip(
        rows := [(0, 139, 140), (1, 20, 70)], sequences.attend(kernels, rows, 33), strict=True
    ):
        assert y.dtype == dtype
        assert_close(y, sequences.exact(b, begin, end, 33), cache_dtype)


def test_attention_equals_the_reference_op(kernels: ModuleType, level: str) -> None:
    shape = Shape(2, 4, 64)
    sequences = Sequences.make(kernels, shape, [90, 40, 33], torch.float32)
    rows = [(0, 89, 90), (1, 0, 40), (2, 31, 33)]
    tables = sequences.tables.clamp(max=sequences.cache.blocks - 1)
    for window in (None, 16):
        y = torch.cat(sequences.attend(kernels, rows, window or 0))
        plain = [part.nan_to_num() for part in sequences.cache.unpacked()]
        expected = reference.paged_attention(
            torch.cat([sequences.queries[b][begin:end] for b, begin, end in rows]),
            plain[0],
            plain[1],
            tables,
            torch.tensor([0, 1, 41, 43]),
            torch.tensor([90, 40, 33]),
            shape.head_size**-0.5,
            window,
        )
        torch.testing.assert_close(y, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [8.0, 0.0, -0.5])
@each_cache_dtype
def test_attention_of_any_scale(kernels: ModuleType, level: str, cache_dtype: torch.dtype, scale: float) -> None:
    # Scores of hundreds: one key takes all, and the running reference rises again and again.
    sequences = Sequences.make(kernels, Shape(1, 2, 32), [700], cache_dtype)
    (y,) = sequences.attend(kernels, [(0, 640, 700)], scale=scale)
    exact = sequences.exact(0, 640, 700, scale=scale)
    # A score of 1000 has an error of 1e-4 in float32, and so has its power.
    tolerance = (0.3 if scale == 8.0 else 5e-3) if cache_dtype == torch.int8 else (3e-3 if scale == 8.0 else 1e-4)
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("group", [1, 3, 4])
@each_cache_dtype
def test_bits_do_not_depend_on_chunks_batch_or_threads(
    kernels: ModuleType, level: str, cache_dtype: torch.dtype, group: int, window: int
) -> None:
    shape = Shape(2, group, 20 if group == 3 else 32)
    sequences = Sequences.make(kernels, shape, [560, 100, 523], cache_dtype, torch.bfloat16)
    kernels.set_threads(1)
    begin = 500
    (expected,) = sequences.attend(kernels, [(0, begin, 560)], window)
    for threads, cuts in ((2, [501, 510, 513, 530]), (3, [502, 503, 544]), (1, range(501, 560)), (2, range(501, 560))):
        kernels.set_threads(threads)
        edges = [begin, *cuts, 560]
        pieces = [sequences.attend(kernels, [(0, a, b)], window)[0] for a, b in itertools.pairwise(edges)]
        assert same(torch.cat(pieces), expected)
    # Beside others, in any place; and as one of so many rows that a row's keys are never split over threads.
    for threads in THREADS:
        kernels.set_threads(threads)
        mixed = sequences.attend(
            kernels, [(2, 522, 523), (0, 540, 560), (1, 3, 100), (0, begin, 540), (0, 529, 530)], window
        )
        assert same(torch.cat((mixed[3], mixed[1])), expected)
        assert same(mixed[4], expected[29:30])
        many = sequences.attend(kernels, [(0, end - 1, end) for end in range(begin + 1, 560)], window)
        assert same(torch.cat(many), expected[:-1])


@each_cache_dtype
def test_nothing_comes_from_positions_that_a_query_does_not_see(
    kernels: ModuleType, level: str, cache_dtype: torch.dtype
) -> None:
    for shape in (Shape(1, 4, 32), Shape(2, 1, 20), Shape(1, 3, 18, 32)):
        sequences = Sequences.make(kernels, shape, [150], cache_dtype)
        rows = [(0, 0, 1), (0, 120, 121), (0, 96, 121), (0, 101, 104)]
        whole, windowed = sequences.attend(kernels, rows), sequences.attend(kernels, rows[1:], 30)
        assert all(bool(y.isfinite().all()) for y in (*whole, *windowed))
        slots = sequences.slots(shape, sequences.tables[0], 150)
        nothing = torch.full((150, shape.kv_heads, shape.head_size), math.nan)
        sequences.cache.store(kernels, nothing[121:], nothing[121:], slots[121:])
        assert all(map(same, sequences.attend(kernels, rows), whole))
        sequences.cache.store(kernels, nothing[:67], nothing[:67], slots[:67])
        assert all(map(same, sequences.attend(kernels, rows[1:], 30), windowed))
        # What the neighbours in a tile see is hidden from a row, too: 104 .. 120 are for later rows of rows[2] only.
        sequences.cache.store(kernels, nothing[104:121], nothing[104:121], slots[104:121])
        _, chunk, early = sequences.attend(kernels, rows[1:], 30)
        assert same(chunk[:8], windowed[1][:8])
        assert bool(chunk[8:].isnan().all())
        assert same(early, windowed[2])


@each_cache_dtype
def test_nan_stays_nan(kernels: ModuleType, level: str, cache_dtype: torch.dtype) -> None:
    shape = Shape(2, 2, 20)
    sequences = Sequences.make(kernels, shape, [140], cache_dtype)
    rows = [(0, 100, 140), (0, 139, 140)]
    slots = sequences.slots(shape, sequences.tables[0], 140)
    for part in range(2):
        kind = [sequences.keys[0].clone(), sequences.values[0].clone()]
        kind[part][110, 1, 3] = math.nan
        sequences.cache.store(kernels, kind[0], kind[1], slots)
        chunk, last = sequences.attend(kernels, rows)
        for y, first in ((chunk, 10), (last, 0)):
            assert not y[:, :2].isnan().any()
            assert not y[:first].isnan().any()
            nan = y[first:, 2:].isnan()
            # A value that is not finite is lost with its neighbours in int8, but only in its own place otherwise.
            assert bool(nan[..., 3].all())
            assert bool(nan.all()) == (part == 0 or cache_dtype == torch.int8)
    sequences.cache.store(kernels, sequences.keys[0], sequences.values[0], slots)
    sequences.queries[0][120, 3, 0] = math.nan
    (y,) = sequences.attend(kernels, [(0, 118, 123)])
    assert y.isnan().any(-1).nonzero().tolist() == [[2, 3]]


def test_blocks_that_the_cache_does_not_have(kernels: ModuleType, level: str) -> None:
    shape = Shape(2, 2, 20)
    sequences = Sequences.make(kernels, shape, [600, 40], torch.float32)
    rows = [(0, 599, 600), (1, 30, 40)]
    good = sequences.attend(kernels, rows)
    for wrong in (-1, sequences.cache.blocks, 1 << 30, -(1 << 31)):
        for place in ((0, 0), (0, 37), (1, 2)):
            kept = int(sequences.tables[place])
            sequences.tables[place] = wrong
            for threads in THREADS:
                kernels.set_threads(threads)
                with pytest.raises(IndexError, match="cache block"):
                    sequences.attend(kernels, rows)
            sequences.tables[place] = kept
    assert all(map(same, sequences.attend(kernels, rows), good))
    # Longer than the row of its table is wide.
    with pytest.raises(IndexError, match="cache block"):
        sequences.cache.attend(kernels, sequences.queries[1][:1], sequences.tables[1:, :2], [1], [33])
    # A slot of no block writes nothing, the others are written.
    before = sequences.cache.keys.clone()
    key = sequences.keys[1][:3].contiguous()
    for slot in (-1, sequences.cache.blocks * 16, 1 << 60):
        with pytest.raises(IndexError, match="cache block"):
            sequences.cache.store(kernels, key, key, torch.tensor([int(sequences.tables[1, 2]) * 16 + 15, slot, 0]))
    assert not torch.equal(sequences.cache.keys.nan_to_num(), before.nan_to_num())


def test_sequences_without_tokens(kernels: ModuleType, level: str) -> None:
    sequences = Sequences.make(kernels, Shape(1, 2, 16), [20, 30], torch.bfloat16)
    (expected,) = sequences.attend(kernels, [(1, 25, 30)])
    empty, y, other = sequences.attend(kernels, [(0, 20, 20), (1, 25, 30), (0, 0, 0)])
    assert empty.numel() == other.numel() == 0
    assert same(y, expected)
