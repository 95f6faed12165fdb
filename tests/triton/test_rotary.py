"""Rotation and the paged cache: the kernels against the reference, and the compiled CPU kernels' int8 codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.ops import cpu, reference, triton_rotary
from puna.ops.scaled import FP8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(device, dtype)


def angles(*shape: int, device: torch.device) -> tuple[Tensor, Tensor]:
    turns = torch.rand(*shape, generator=torch.Generator().manual_seed(9)).to(device) * 100
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 64, 80, 96, 128, 256])
def test_rotary_has_the_references_bits(size: int, dtype: torch.dtype, device: torch.device) -> None:
    x = numbers(3, 9, size, dtype=dtype, device=device)
    cos, sin = angles(3, size // 2, device=device)
    assert torch.equal(triton_rotary.rotary(x, cos, sin), reference.rotary(x, cos, sin))


def test_rotary_of_the_dense_form(device: torch.device) -> None:
    qkv = numbers(2, 3, 6 * 64, dtype=torch.bfloat16, device=device)
    x = qkv[..., 64 : 5 * 64].view(2, 3, 4, 64)
    cos, sin = angles(2, 3, 32, device=device)
    assert torch.equal(triton_rotary.rotary(x, cos, sin), reference.rotary(x, cos, sin))


def fused_rows(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Query of 6, key and value of 2 heads for 5 tokens, as parts of one tensor."""
    qkv = numbers(5, 10 * size, dtype=dtype, device=device)
    query, key, value = qkv.split((6 * size, 2 * size, 2 * size), dim=1)
    return query.view(5, 6, size), key.view(5, 2, size), value.view(5, 2, size)


SLOTS = (17, 3, 63, 32, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [*DTYPES, FP8])
@pytest.mark.parametrize("size", [64, 80])
def test_rotate_and_store(size: int, cache_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    query, key, value = fused_rows(size, dtype, device)
    value[0, 0, 3], value[1, 1, 5] = 1000.0, -460.0  # too large for e4m3
    slots = torch.tensor(SLOTS, device=device)
    cos_sin = angles(5, size // 2, device=device)
    caches = [torch.zeros(4, 2, 16, size, device=device).to(cache_dtype) for _ in range(4)]
    expected = reference.rotate_and_store(query, key, value, cos_sin, caches[2], caches[3], slots)
    found = triton_rotary.rotate_and_store(query, key, value, cos_sin, caches[0], caches[1], slots)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # No copies: what the layer gets back lies where it was.
    assert found[0].data_ptr() == query.data_ptr()
    assert found[1].data_ptr() == key.data_ptr()
    for ours, theirs in ((caches[0], caches[2]), (caches[1], caches[3])):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_more_heads_than_a_block_takes(device: torch.device) -> None:
    qkv = numbers(2, 23 * 128, dtype=torch.bfloat16, device=device)
    query, key, value = (part.view(2, -1, 128) for part in qkv.split((128, 11 * 128, 11 * 128), dim=1))
    slots, cos_sin = torch.tensor([4, 1], device=device), angles(2, 64, device=device)
    caches = [torch.zeros(2, 11, 4, 128, device=device, dtype=torch.bfloat16) for _ in range(4)]
    expected = reference.rotate_and_store(query, key, value, cos_sin, caches[2], caches[3], slots)
    found = triton_rotary.rotate_and_store(query, key, value, cos_sin, caches[0], caches[1], slots)
    for ours, theirs in zip((*found, *caches[:2]), (*expected, *caches[2:]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not cpu.compiled(), reason="the CPU's kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80])
def test_int8_cache_has_the_codes_and_scales_of_the_cpus(size: int, dtype: torch.dtype, device: torch.device) -> None:
    query, key, value = fused_rows(size, dtype, device)
    value[2, 1] = 0.0
    value[3, 0, 7], key[4, 1, 9] = float("inf"), float("nan")
    slots, cos_sin = torch.tensor(SLOTS, device=device), angles(5, size // 2, device=device)
    rotated = reference.rotary(key, *cos_sin)
    ours = [torch.zeros(4, 2, 16, size + 4, dtype=torch.int8, device=device) for _ in range(2)]
    triton_rotary.rotate_and_store(query, key, value, cos_sin, ours[0], ours[1], slots)
    theirs = [torch.zeros(4, 2, 16, size + 4, dtype=torch.int8) for _ in range(2)]
    cpu.store_kv(rotated.cpu(), value.cpu(), theirs[0], theirs[1], slots.cpu())
    # csrc/kernels/kv_cache.h: keys [D / 4][16 n][4 d] with 128 added, values [4 quads of n][D][4 n], then the scales.
    split = [cache.cpu().view(4, 2, -1).split((16 * size, 64), dim=2) for cache in (*ours, *theirs)]
    codes = [part[0].reshape(4, 2, 16, size) for part in split[:2]]
    their_keys = split[2][0].reshape(4, 2, size // 4, 16, 4).permute(0, 1, 3, 2, 4).reshape(4, 2, 16, size)
    their_values = split[3][0].reshape(4, 2, 4, size, 4).permute(0, 1, 2, 4, 3).reshape(4, 2, 16, size)
    for token, slot in enumerate(SLOTS):
        at = slot // 16, slice(None), slot % 16
        assert torch.equal(codes[0][at], (their_keys[at].view(torch.uint8) ^ 128).view(torch.int8)), token
        assert torch.equal(codes[1][at], their_values[at]), token
    scales = [part[1].contiguous().view(torch.float32) for part in split]
    for ours_, theirs_ in ((scales[0], scales[2]), (scales[1], scales[3])):
        assert torch.equal(ours_.isnan(), theirs_.isnan())
        assert int(ours_.isnan().sum()) == 1
        assert torch.equal(ours_.nan_to_num(), theirs_.nan_to_num())


def test_slots_outside_of_the_cache_are_not_written(device: torch.device) -> None:
    query, key, value = fused_rows(64, torch.float32, device)
    caches = [torch.zeros(6, 2, 16, 64, device=device) for _ in range(2)]
    inner = [cache[1:5] for cache in caches]
    slots = torch.tensor([-1, 64, -16, 70, 5], device=device)
    triton_rotary.rotate_and_store(query, key, value, angles(5, 32, device=device), inner[0], inner[1], slots)
    written = [cache.abs().sum(dim=(1, 3)).nonzero().tolist() for cache in caches]
    assert written == [[[1, 5]], [[1, 5]]]


def test_no_tokens(device: torch.device) -> None:
    empty = torch.empty(0, 2, 64, device=device)
    cache = torch.zeros(1, 2, 16, 64, device=device)
    nothing = torch.empty(0, 32, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    query, _ = triton_rotary.rotate_and_store(empty, empty, empty, (nothing, nothing), cache, cache, slots)
    assert query.shape == (0, 2, 64)


def test_caches_of_other_widths_are_refused(device: torch.device) -> None:
    x = torch.empty(1, 2, 64, device=device)
    cache = torch.zeros(1, 2, 16, 64, dtype=torch.int8, device=device)
    part = torch.empty(1, 32, device=device)
    with pytest.raises(ValueError, match="positions of 64 numbers: 68"):
        triton_rotary.rotate_and_store(
            x, x, x, (part, part), cache, cache, torch.zeros(1, dtype=torch.int64, device=device)
        )


def compile_rotary() -> None:
    """What Llama 3.1 8B launches, with each kind of cache."""
    qkv = torch.empty(64, 48 * 128, dtype=torch.bfloat16)
    query, key, value = (part.view(64, -1, 128) for part in qkv.split((4096, 1024, 1024), dim=1))
    cos_sin = torch.empty(64, 64), torch.empty(64, 64)
    for dtype in (torch.bfloat16, FP8, torch.int8):
        cache = torch.empty(16, 8, 16, 132 if dtype == torch.int8 else 128, dtype=dtype)
        slots = torch.zeros(64, dtype=torch.int64)
        triton_rotary.rotate_and_store(query, key, value, cos_sin, cache, cache, slots)


@pytest.mark.slow
def test_compiled_for_hopper(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("test_rotary.compile_rotary")
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert not kernel.get("LDL"), kernel
        assert not kernel.get("STL"), kernel
        assert kernel["registers"] <= 64, kernel  # 8 blocks of 128 threads a multiprocessor at least
