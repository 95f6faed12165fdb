"""BlockAllocator: which cache block belongs to whom, and which blocks still hold a prefix that somebody may ask for."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

# Rows that only pad a step, and positions that a sliding window has left behind, point here. It is never handed out.
DUMMY_BLOCK: Final = 0


@dataclass(frozen=True)
class Utilization:
    """Blocks by what they are for: `in_use` by sequences, `cached` (free, with a prefix kept for reuse), `empty`."""

    in_use: int
    cached: int
    empty: int


class BlockAllocator:
    """Hands out blocks of `block_size` tokens by number, counts who refers to each, and remembers full prefixes.

    A block whose tokens are all computed can be published under the hash of everything up to its end (see
    `prefix_hashes`); a later sequence that begins alike acquires it instead of computing it. A published block that
    nobody refers to stays until its place is needed; then the one that was released longest ago goes first.

    Raises ValueError where there is no block to hand out beside the dummy one.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"num_blocks is {num_blocks} and block_size {block_size}: give at least 2 blocks (one is a dummy) "
                "of at least 1 token"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._ref_counts[DUMMY_BLOCK] = 1
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Free blocks. Those without a published prefix are taken first; the others in the order they were released.
        self._empty = list(range(num_blocks - 1, DUMMY_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._empty) + len(self._cached)

    @property
    def utilization(self) -> Utilization:
        return Utilization(self.num_blocks - 1 - self.num_free, len(self._cached), len(self._empty))

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and unspecified content. Raises ValueError where fewer are free."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks are wanted, but {self.num_free} are free: look at num_free before")
        return [self._take() for _ in range(count)]

    def is_published(self, prefix_hash: bytes) -> bool:
        """Whether a block holds what the hash stands for."""
        return prefix_hash in self._block_of

    def acquire_published(self, hashes: Sequence[bytes]) -> list[int]:
        """One reference to the block of each of the hashes, all of which must be published."""
        blocks = [self._block_of[prefix_hash] for prefix_hash in hashes]
        for block in blocks:
            self.acquire(block)
        return blocks

    def acquire(self, block: int) -> None:
        """One more reference to a block that is in use or published; the dummy block does not count."""
        if block == DUMMY_BLOCK:
            return
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; the dummy block may be among them, and does not count.

        Blocks should come in the order of the sequence: its end is then evicted before its beginning, without which the
        end would be of no use.
        """
        for block in reversed(list(blocks)):
            if block == DUMMY_BLOCK:
                continue
            if self._ref_counts[block] < 1:
                raise RuntimeError(f"block {block} is released once too often")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def num_holders(self, block: int) -> int:
        """How many references there are to the block."""
        return self._ref_counts[block]

    def publish(self, block: int, prefix_hash: bytes) -> None:
        """Makes a full block in use findable; without effect where another block holds the same prefix already."""
        if self.enable_prefix_caching and prefix_hash not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = prefix_hash
            self._block_of[prefix_hash] = block

    def clear_cache(self) -> None:
        """Forgets all prefixes; blocks in use stay in use."""
        self._hash_of.clear()
        self._block_of.clear()
        self._empty.extend(reversed(self._cached))
        self._cached.clear()

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError unless the counts are those of `holders`, the block lists of all who hold blocks."""
        expected = [0] * self.num_blocks
        for block in (block for blocks in holders for block in blocks):
            expected[block] += 1
        expected[DUMMY_BLOCK] = 1
        free = [*self._empty, *self._cached]
        problems = (
            (expected != self._ref_counts, "a reference count differs from the number of holders"),
            (len(set(free)) != len(free), "a block is free twice"),
            (any(self._ref_counts[block] for block in free), "a free block has a holder"),
            (len(free) + sum(count > 0 for count in expected) != self.num_blocks, "a block is lost"),
            (any(block in self._hash_of for block in self._empty), "a block without a prefix has a hash"),
            (any(block not in self._hash_of for block in self._cached), "a cached block has no hash"),
            ({h: b for b, h in self._hash_of.items()} != self._block_of, "hashes and blocks differ"),
        )
        for is_wrong, what in problems:
            if is_wrong:
                raise RuntimeError(f"the block allocator is corrupt: {what}")

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._ref_counts[block] = 1
        return block


def prefix_hashes(token_ids: Sequence[int], block_size: int, salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
    """For each full block, a hash of all tokens up to its end; `known` are the first ones, already computed.

    Each hash covers the one before it, so that equal hashes mean equal prefixes: 128 bits of BLAKE2b, since Python's
    own hash would let somebody craft a prompt that is given another's cache. `salt` keeps the prefixes of those apart
    who must not share.
    """
    hashes = list(known)
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else salt
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        hashes.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())
    return hashes
