"""Attention kernels against plain sums in float64, over all forms of caches; what the deterministic form promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.ops import OpSpec, reference

pytest.importorskip("triton")

from puna.ops import triton_attention, triton_prompt, triton_rotary, triton_table

FP8 = torch.float8_e4m3fn


def slow(*values: object) -> Any:
    """Values of which the interpreter has seen enough in other combinations; a GPU takes no time for them."""
    return pytest.param(*values, marks=pytest.mark.slow)


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


def check(case: Case, device: torch.device, bound: float, seed: int = 0) -> None:
    inputs = case.made(device, seed)
    for deterministic in (False, True):
        result = triton_attention.paged_attention(*inputs, case.size**-0.5, case.window, deterministic=deterministic)
        assert result.dtype == case.dtype
        assert error(result, case.expected(*inputs)) < bound


@pytest.mark.parametrize(
    ("size", "cache"),
    [(size, torch.float32) for size in (64, 80, 96, 128, 256)]
    + [(80, FP8), (128, torch.int8)]
    + [slow(size, FP8) for size in (64, 96, 128, 256)]
    + [slow(size, torch.int8) for size in (64, 80, 96, 256)],
)
def test_sizes_of_heads(size: int, cache: torch.dtype, device: torch.device) -> None:
    check(Case([(19, 1), (33, 9)], size=size, cache=cache), device, 1e-5)


@pytest.mark.parametrize("group", [1, slow(2), 3, slow(4), slow(5), slow(6), slow(7), 8])
def test_heads_of_a_group(group: int, device: torch.device) -> None:
    check(Case([(70, 1), (7, 7), (40, 21), (1, 1)], heads=2 * group, kv_heads=2), device, 1e-5)


def test_more_heads_in_a_group_than_the_smallest_tile_has_rows(device: torch.device) -> None:
    check(Case([(19, 1), (9, 2)], heads=20), device, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "cache", "bound"),
    [
        (torch.bfloat16, torch.bfloat16, 6e-3),
        (torch.float16, torch.float16, 1e-3),
        (torch.float16, torch.bfloat16, 1e-3),
        (torch.bfloat16, FP8, 4e-3),
        (torch.float16, FP8, 1e-3),
        (torch.bfloat16, torch.int8, 4e-3),
        (torch.float16, torch.int8, 1e-3),
        (torch.float32, torch.bfloat16, 1e-5),
    ],
)
def test_types_of_caches(dtype: torch.dtype, cache: torch.dtype, bound: float, device: torch.device) -> None:
    check(Case([(75, 1), (40, 35), (3, 2)], dtype=dtype, cache=cache), device, bound)


@pytest.mark.parametrize("block_size", [1, slow(8), slow(16), slow(32), 64, slow(128), 48])
def test_sizes_of_blocks(block_size: int, device: torch.device) -> None:
    check(Case([(70, 1), (33, 9)], block_size=block_size), device, 1e-5)
    check(Case([(70, 1), (33, 9)], block_size=block_size, cache=torch.int8), device, 1e-5)


@pytest.mark.parametrize(
    ("window", "cache"),
    [(1, torch.float32), (65, torch.int8), slow(5, torch.int8), slow(64, torch.float32), slow(1000, torch.float32)],
)
def test_windows(window: int, cache: torch.dtype, device: torch.device) -> None:
    check(Case([(150, 1), (140, 40), (20, 20)], window=window, cache=cache), device, 1e-5)


def test_what_a_window_has_left_behind_does_not_matter(device: torch.device) -> None:
    case = Case([(150, 1), (170, 40)], window=10)
    query, keys, values, tables, *rest = case.made(device)
    expected = case.expected(query, keys, values, tables, *rest)
    tables[0, :8] = tables[1, :7] = 0  # the block of NaN
    result = triton_attention.paged_attention(query, keys, values, tables, *rest, 0.125, 10)
    assert error(result, expected) < 1e-5


def test_lengths_at_the_borders_of_blocks_and_tiles(device: torch.device) -> None:
    check(Case([(length, 1) for length in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128)]), device, 1e-5)
    check(Case([(length, 2) for length in (2, 16, 17, 32, 33, 64, 65)] + [(64, 32), (33, 33)]), device, 1e-5)


@pytest.mark.parametrize(
    ("cache", "window"),
    [(torch.float32, None), slow(FP8, 300), slow(torch.float32, 300), slow(FP8, None), slow(torch.int8, None)],
)
def test_keys_are_split(cache: torch.dtype, window: int | None, device: torch.device) -> None:
    """Room for many tokens gives splits, of which some have no keys."""
    for sequences in ([(700, 1)], [(300, 20), (40, 1)]):
        check(Case(sequences, cache=cache, window=window, spare_blocks=80), device, 1e-5)


def test_how_many_splits_fill_a_gpu() -> None:
    """132 multiprocessors; programs are sequences x key/value heads."""
    assert triton_attention.even_splits(8, 132, 64) == 33
    assert triton_attention.even_splits(8, 132, 16) == 16
    assert triton_attention.even_splits(8, 132, 0) == 1
    assert triton_attention.even_splits(40 * 8, 132, 64) == 2  # 3 programs where the share is 2.4, or 5 where it is 4.8
    assert triton_attention.even_splits(64 * 8, 132, 64) == 1
    assert triton_attention.even_splits(1024 * 8, 132, 64) == 1


def test_padding_rows_change_nothing(device: torch.device) -> None:
    """Rows of one token in a dummy block of zeros, as a recorded step has."""
    case = Case([(40, 1), (19, 1), (64, 1)])
    query, keys, values, tables, starts, lengths = case.made(device)
    keys[0] = values[0] = 0
    query = torch.cat((query, query))
    tables = torch.cat((tables, torch.zeros_like(tables)))
    starts = torch.arange(7, dtype=torch.int32, device=device)
    lengths = torch.cat((lengths, torch.ones_like(lengths)))
    result = triton_attention.paged_attention(query, keys, values, tables, starts, lengths, 0.125, None)
    assert error(result[:3], case.expected(query[:3], keys, values, tables[:3], starts[:4], lengths[:3])) < 1e-5
    assert not result[3:].any()


def test_query_may_be_part_of_wider_rows(device: torch.device) -> None:
    case = Case([(40, 1), (19, 7)])
    query, *rest = case.made(device)
    wide = torch.full((query.shape[0], query.shape[1] + 3, query.shape[2]), float("nan"), device=device)
    wide[:, 1 : query.shape[1] + 1] = query
    result = triton_attention.paged_attention(wide[:, 1 : query.shape[1] + 1], *rest, 0.125, None)
    assert error(result, case.expected(query, *rest)) < 1e-5


@pytest.mark.slow
def test_more_sequences_than_are_looked_at_together(device: torch.device) -> None:
    case = Case([(3, 1)] * 258 + [(20, 15)], heads=1, size=16, spare_blocks=0)
    inputs = case.made(device)
    result = triton_attention.paged_attention(*inputs, case.size**-0.5, None, deterministic=True)
    assert error(result, case.expected(*inputs)) < 1e-5


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shapes(data: st.DataObject, device: torch.device) -> None:
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    case = Case(
        [(length, data.draw(st.integers(1, length))) for length in lengths],
        heads=2 * data.draw(st.integers(1, 5)),
        kv_heads=data.draw(st.sampled_from([1, 2])),
        size=data.draw(st.sampled_from([16, 48])),
        block_size=data.draw(st.sampled_from([8, 16, 32])),
        cache=data.draw(st.sampled_from([torch.float32, FP8, torch.int8])),
        window=data.draw(st.one_of(st.none(), st.integers(1, 100))),
        spare_blocks=data.draw(st.sampled_from([0, 1, 40])),
    )
    check(case, device, 1e-5, seed=data.draw(st.integers(0, 9)))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize(
    ("cache", "window"),
    [(torch.bfloat16, None), slow(FP8, 37), slow(torch.int8, 37), slow(torch.int8, None), slow(FP8, None)],
)
def test_deterministic_bits_do_not_depend_on_chunks_or_neighbours(
    cache: torch.dtype, window: int | None, device: torch.device
) -> None:
    case = Case([(80, 80), (67, 30), (5, 1)], dtype=torch.bfloat16, cache=cache, window=window)
    query, keys, values, tables, _, _ = case.made(device)

    def attend(rows: Tensor, table: Tensor, starts: list[int], lengths: list[int]) -> Tensor:
        numbers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths)]
        return triton_attention.paged_attention(rows, keys, values, table, *numbers, 0.125, window, deterministic=True)

    whole = attend(query, tables, [0, 80, 110, 111], [80, 67, 5])
    one = tables[:1].contiguous()
    # As a prompt of its own, with room for many more tokens, in two chunks, and token by token.
    assert torch.equal(bits(attend(query[:80], one, [0, 80], [80])), bits(whole[:80]))
    roomy = torch.nn.functional.pad(one, (0, 300))
    assert torch.equal(bits(attend(query[:80], roomy, [0, 80], [80])), bits(whole[:80]))
    for first, last in ((0, 43), (43, 80)):
        assert torch.equal(bits(attend(query[first:last], one, [0, last - first], [last])), bits(whole[first:last]))
    for token in (0, 37, 64, 79):
        row = slice(token, token + 1)
        assert torch.equal(bits(attend(query[row], one, [0, 1], [token + 1])), bits(whole[row]))
    decode = attend(query[[79, 109, 110]], tables, [0, 1, 2, 3], [80, 67, 5])
    assert torch.equal(bits(decode), bits(whole[[79, 109, 110]]))


@pytest.mark.parametrize("cache", [torch.float32, slow(torch.int8)])
def test_deterministic_bits_do_not_depend_on_who_adds_up_the_splits(
    cache: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few sequences of this length are attended to by several programs each; many, by one."""
    case = Case([(2300, 2)], heads=2, size=32, cache=cache)
    inputs = case.made(device)
    split = triton_attention.paged_attention(*inputs, 32**-0.5, None, deterministic=True)
    assert error(split, case.expected(*inputs)) < 1e-5
    monkeypatch.setattr(triton_attention, "multiprocessors", lambda device: 0)
    whole = triton_attention.paged_attention(*inputs, 32**-0.5, None, deterministic=True)
    assert torch.equal(bits(whole), bits(split))


@pytest.mark.parametrize("cache", [slow(torch.float32), slow(torch.bfloat16), FP8, torch.int8])
def test_reads_what_rotate_and_store_writes(cache: torch.dtype, device: torch.device) -> None:
    random = torch.Generator().manual_seed(3)
    tokens, kv_heads, size, block_size = 37, 2, 64, 16
    query = torch.randn((tokens, 4, size), generator=random).to(device)
    key, value = (torch.randn((tokens, kv_heads, size), generator=random).to(device) for _ in range(2))
    angles = torch.rand((tokens, size // 2), generator=random).to(device)
    width = size + 4 if cache == torch.int8 else size
    caches = [torch.zeros((5, kv_heads, block_size, width), device=device).to(cache) for _ in range(2)]
    table = torch.tensor([[4, 1, 3]], dtype=torch.int32, device=device)
    positions = torch.arange(tokens, device=device)
    slots = table[0, positions // block_size].long() * block_size + positions % block_size
    rotated, rotated_key = triton_rotary.rotate_and_store(
        query.clone(), key.clone(), value, (angles.cos(), angles.sin()), *caches, slots
    )
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    result = triton_attention.paged_attention(rotated, *caches, table, starts, starts[1:], 0.125, None)
    exact = reference.prompt_attention(rotated.cpu(), rotated_key.cpu(), value.cpu(), [tokens], 0.125, None)
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3, FP8: 0.04, torch.int8: 0.01}[cache]
    assert error(result, exact.double()) < bound


@pytest.mark.parametrize("window", [None, 30, slow(200)])
def test_prompts_without_the_cache(window: int | None, device: torch.device) -> None:
    random = torch.Generator().manual_seed(4)
    lengths, size = (40, 1, 7, 7, 90), 64
    packed = torch.randn((sum(lengths), 8, size), generator=random).to(device)
    query, key, value = packed.split((4, 2, 2), dim=1)
    exact = reference.prompt_attention(query.cpu(), key.cpu(), value.cpu(), lengths, 0.125, window).double()
    for deterministic in (False, True):
        result = triton_prompt.prompt_attention(query, key, value, lengths, 0.125, window, deterministic=deterministic)
        assert error(result, exact) < 1e-5
    if window is None:
        assert error(triton_prompt.run_variant("library", query, key, value, lengths, 0.125, None), exact) < 1e-5
        low = [part.to(torch.bfloat16) for part in (query, key, value)]
        for variant in {*triton_prompt.variants(low[0], lengths, None), "library"}:
            assert error(triton_prompt.run_variant(variant, *low, lengths, 0.125, None), exact) < 2e-2


def test_kernels_that_are_planned_get_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_prompt, "_varlen_arguments", lambda: {"scale", "window_size"})

    class Query:
        device, dtype = torch.device("cuda"), torch.bfloat16

    def found(*lengths: int, window: int | None = None) -> tuple[str, ...]:
        return triton_prompt.variants(Query(), lengths, window)  # type: ignore[arg-type]

    assert found(8192) == found(256, 256) == ("triton", "varlen", "library")
    assert found(8191) == found(256, 128) == found(256, 1) == ("triton", "varlen")
    assert found(8192, window=100) == ("triton",)
    monkeypatch.setattr(triton_prompt, "_varlen_arguments", lambda: {"is_causal"})  # PyTorch 2.10
    assert found(8191) == ("triton", "library")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_prompts_have_the_bits_of_the_cache(dtype: torch.dtype, device: torch.device) -> None:
    case = Case([(70, 70)], dtype=dtype, cache=dtype)
    query, keys, values, table, *rest = case.made(device)
    key, value = (cache[table[0].long()].transpose(1, 2).flatten(0, 1)[:70] for cache in (keys, values))
    through = triton_attention.paged_attention(query, keys, values, table, *rest, 0.125, None, deterministic=True)
    beside = triton_prompt.prompt_attention(query, key, value, [70], 0.125, None, deterministic=True)
    assert torch.equal(bits(through), bits(beside))


def test_the_table_gives_them_for_heads_that_fit() -> None:
    def found(op: str, head_size: int) -> object:
        spec = OpSpec(device=torch.device("cuda"), dtype=torch.bfloat16, head_size=head_size)
        return triton_table.function(op, spec)

    assert found("paged_attention", 128) is triton_attention.paged_attention
    assert found("prompt_attention", 80) is triton_prompt.prompt_attention
    assert "multiples of 4 up to 256" in str(found("paged_attention", 320))


def test_caches_that_do_not_fit_are_refused(device: torch.device) -> None:
    query, keys, values, *rest = Case([(9, 1)], cache=torch.int8).made(device)
    with pytest.raises(ValueError, match="rows of 68 bytes: heads of 32 need 36"):
        triton_attention.paged_attention(query[..., :32], keys, values, *rest, 0.125, None)
    with pytest.raises(ValueError, match="must be contiguous"):
        triton_attention.paged_attention(query, keys[:, :, ::2], values[:, :, ::2], *rest, 0.125, None)
    with pytest.raises(ValueError, match="rows of 68 numbers: heads have 64"):
        triton_attention.paged_attention(query, keys.half(), values.half(), *rest, 0.125, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "blocks_of_few"), [("decode_one", 3), ("decode_many", 3), ("prefill", 1), ("deterministic", 1)]
)
def test_compiled_for_hopper(
    case: str, blocks_of_few: int, compiled_for_hopper: Callable[[str], list[dict[str, Any]]]
) -> None:
    """No spills, tensor cores as meant, and as many programs on a multiprocessor as keep its memory busy."""
    found = [kernel for kernel in compiled_for_hopper(f"attention_cases.{case}") if "attention" in kernel["kernel"]]
    assert len(found) >= 3
    for kernel in found:
        assert kernel["stack"] == 0
        assert kernel["LDGSTS"] >= 6
        warps = 4 if "HMMA" in kernel else 8
        assert kernel.get("HMMA", 0) + kernel.get("HGMMA", 0) >= 12
        by_registers = 65536 // (32 * warps * -(-kernel["registers"] // 8) * 8)
        by_shared = 233_472 // (kernel["shared"] + 1024)
        assert min(by_registers, by_shared) >= (blocks_of_few if warps == 4 else 1)
    if case == "prefill":
        assert sum("HGMMA" in kernel for kernel in found) == 3
    if case == "deterministic":
        assert all("HGMMA" in kernel for kernel in found)
