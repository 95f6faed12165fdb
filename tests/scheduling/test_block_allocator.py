"""BlockAllocator: counting, prefixes, the order of eviction, and what its integrity check finds."""

from __future__ import annotations

import pytest

from puna.scheduling.block_allocator import DUMMY_BLOCK, BlockAllocator, Utilization, prefix_hashes


def test_the_dummy_block_is_never_handed_out() -> None:
    allocator = BlockAllocator(5)
    blocks = allocator.allocate(4)
    assert DUMMY_BLOCK not in blocks
    assert len(set(blocks)) == 4
    with pytest.raises(ValueError, match="1 blocks are wanted, but 0 are free"):
        allocator.allocate(1)
    allocator.release([*blocks, DUMMY_BLOCK])
    assert allocator.num_free == 4
    allocator.check_integrity([])


def test_all_or_nothing() -> None:
    allocator = BlockAllocator(4)
    with pytest.raises(ValueError, match="4 blocks are wanted, but 3 are free"):
        allocator.allocate(4)
    assert allocator.num_free == 3
    assert allocator.allocate(0) == []


def test_a_published_prefix_is_found_until_its_place_is_needed() -> None:
    allocator = BlockAllocator(5, block_size=2)
    hashes = prefix_hashes([1, 2, 3, 4, 5], 2, b"")
    assert len(hashes) == 2
    blocks = allocator.allocate(2)
    for block, prefix_hash in zip(blocks, hashes, strict=True):
        allocator.publish(block, prefix_hash)
    allocator.release(blocks)
    assert allocator.utilization == Utilization(in_use=0, cached=2, empty=2)
    assert all(map(allocator.is_published, hashes))
    assert allocator.acquire_published(hashes) == blocks
    assert allocator.acquire_published(hashes) == blocks
    assert allocator.num_holders(blocks[0]) == 2
    allocator.check_integrity([blocks, blocks])
    allocator.release(blocks)
    allocator.release(blocks)
    # Empty blocks go first, then the end of the prefix, then its beginning.
    assert set(allocator.allocate(2)).isdisjoint(blocks)
    assert allocator.allocate(1) == [blocks[1]]
    assert [allocator.is_published(prefix_hash) for prefix_hash in hashes] == [True, False]
    assert allocator.acquire_published(hashes[:1]) == [blocks[0]]


def test_the_least_recently_released_prefix_is_evicted_first() -> None:
    allocator = BlockAllocator(3, block_size=1)
    first, second = allocator.allocate(2)
    allocator.publish(first, b"first")
    allocator.publish(second, b"second")
    allocator.release([first])
    allocator.release([second])
    assert allocator.acquire_published([b"first"]) == [first]  # used again, so now the second is the older one
    allocator.release([first])
    assert allocator.allocate(1) == [second]


def test_the_first_block_of_a_prefix_stays_the_one() -> None:
    allocator = BlockAllocator(4, block_size=1)
    one, other = allocator.allocate(2)
    allocator.publish(one, b"same")
    allocator.publish(other, b"same")
    allocator.publish(one, b"another")
    assert allocator.acquire_published([b"same"]) == [one]
    assert not allocator.is_published(b"another")
    allocator.release([one, one, other])
    assert allocator.utilization == Utilization(in_use=0, cached=1, empty=2)
    allocator.clear_cache()
    assert allocator.utilization == Utilization(in_use=0, cached=0, empty=3)
    allocator.check_integrity([])


def test_without_caching_nothing_is_found() -> None:
    allocator = BlockAllocator(3, enable_prefix_caching=False)
    (block,) = allocator.allocate(1)
    allocator.publish(block, b"hash")
    assert not allocator.is_published(b"hash")


def test_hashes_cover_all_before_them_and_the_salt() -> None:
    tokens = list(range(12))
    hashes = prefix_hashes(tokens, 4, b"")
    assert hashes == prefix_hashes(tokens, 4, b"", known=hashes[:1])
    assert prefix_hashes([9, *tokens[1:]], 4, b"")[2] != hashes[2]
    assert set(prefix_hashes(tokens, 4, b"salt")).isdisjoint(hashes)
    assert prefix_hashes(tokens[:11], 4, b"") == hashes[:2]
    assert prefix_hashes([2**40, -1], 2, b"") != prefix_hashes([2**40, 1], 2, b"")


def test_mistakes_are_found() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    with pytest.raises(RuntimeError, match="number of holders"):
        allocator.check_integrity([blocks, blocks])
    allocator.release(blocks)
    with pytest.raises(RuntimeError, match="once too often"):
        allocator.release(blocks[:1])
    with pytest.raises(ValueError, match="num_blocks is 1"):
        BlockAllocator(1)
