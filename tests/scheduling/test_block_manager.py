"""BlockManager: what windowed layers hold, what prefixes of a mixed model are found again, and its integrity check."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.scheduling.block_allocator import DUMMY_BLOCK
from puna.scheduling.block_manager import BlockManager, most_blocks
from puna.scheduling.sequence import Sequence

SIZE = 4
PROMPT = tuple(range(40))


def computed(blocks: BlockManager, request: Any, *counts: int) -> Sequence:
    """A sequence that has run so many tokens in each of its steps, after what it found of its prefix."""
    sequence = Sequence(0, request)
    blocks.begin(sequence)
    for count in counts:
        assert blocks.reserve([sequence], [count]) == []
        sequence.num_computed += count
        blocks.settle(sequence)
        blocks.check_integrity([sequence])
    return sequence


def held(sequence: Sequence) -> list[int]:
    return [sum(block != DUMMY_BLOCK for block in table) for table in sequence.tables]


def found(blocks: BlockManager, request: Any) -> int:
    """Tokens of the request that need not be computed."""
    sequence = Sequence(1, request)
    blocks.begin(sequence)
    count = sequence.num_computed
    blocks.check_integrity([sequence])
    blocks.release(sequence)
    return count


@given(
    window=st.integers(1, 30),
    size=st.integers(1, 7),
    steps=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=12),
    num_sequences=st.integers(1, 3),
)
def test_most_blocks_is_enough(window: int, size: int, steps: list[list[int]], num_sequences: int) -> None:
    """Sequences that compute tokens in any portions, one table of the seen and the new tokens each."""
    lengths = [0] * num_sequences
    step_tokens = max(sum(step[:num_sequences]) for step in steps)
    for step in steps:
        needed = 0
        for i in range(num_sequences):
            if step[i]:
                first = max(0, lengths[i] - window + 1) // size
                needed += -(-(lengths[i] + step[i]) // size) - first
                lengths[i] += step[i]
        assert needed <= most_blocks(window, max(lengths), num_sequences, step_tokens, size)
        assert needed <= most_blocks(None, max(lengths), num_sequences, step_tokens, size)


@pytest.mark.parametrize("counts", [(40,), (7, 7, 7, 7, 7, 5), (1,) * 40, (13, 1, 1, 1, 1, 20, 1, 1, 1)])
def test_windowed_tables_hold_what_the_next_token_sees(request_of: Callable[..., Any], counts: tuple[int, ...]) -> None:
    blocks = BlockManager((20, 20), SIZE, (None, 6))
    sequence = computed(blocks, request_of("a", PROMPT), *counts)
    # The token at 40 sees itself and the five before it, which are in the blocks of 32..35 and 36..39.
    assert held(sequence) == [10, 2]
    assert [len(table) for table in sequence.tables] == [10, 10]
    blocks.release(sequence)
    assert blocks.utilization.in_use == 0


def test_a_prefix_needs_the_windows_blocks_before_its_end_alone(request_of: Callable[..., Any]) -> None:
    blocks = BlockManager((40, 40), SIZE, (None, 6))
    blocks.release(computed(blocks, request_of("a", PROMPT), 40))
    again = request_of("b", PROMPT)
    assert found(blocks, again) == 36  # never the last token
    windowed = blocks._allocators[1]
    # 36 sees 31 and what follows: the blocks from 28 on. Those before may go.
    hashes = again_hashes(blocks, again)
    for place in range(7):
        forget(windowed, hashes[place])
    assert found(blocks, again) == 36
    forget(windowed, hashes[7])
    assert found(blocks, again) == 0  # nothing is left before any place within these
    assert found(blocks, request_of("c", (*PROMPT, 1))) == 40  # which sees 35 and what follows


def test_a_shorter_prefix_is_taken_where_the_windowed_blocks_of_the_longer_are_gone(
    request_of: Callable[..., Any],
) -> None:
    blocks = BlockManager((40, 40), SIZE, (None, 6))
    blocks.release(computed(blocks, request_of("a", PROMPT), 40))
    again = request_of("b", PROMPT)
    hashes = again_hashes(blocks, again)
    forget(blocks._allocators[1], hashes[6])
    # 28 and 32 see the tokens 24..27, which are gone; 24 sees 19 and what follows.
    assert found(blocks, request_of("c", PROMPT[:33])) == 24
    assert found(blocks, again) == 36
    forget(blocks._allocators[0], hashes[3])
    assert found(blocks, again) == 12  # and the other layers need everything


def again_hashes(blocks: BlockManager, request: Any) -> list[bytes]:
    sequence = Sequence(2, request)
    blocks.begin(sequence)
    blocks.release(sequence)
    return sequence.hashes


def forget(allocator: Any, prefix_hash: bytes) -> None:
    """As when the block is evicted."""
    del allocator._hash_of[block := allocator._block_of.pop(prefix_hash)]
    del allocator._cached[block]
    allocator._empty.append(block)


def test_forks_share_and_copy_in_every_table(request_of: Callable[..., Any]) -> None:
    blocks = BlockManager((20, 20), SIZE, (None, 6))
    sequence = computed(blocks, request_of("a", PROMPT[:14]), 14)
    twin = sequence.fork(7, 1)
    blocks.share(twin)
    blocks.check_integrity([sequence, twin])
    assert not blocks.is_within_own_block(sequence)
    before = [table[-1] for table in sequence.tables]
    copies = blocks.reserve([sequence, twin], [1, 1])
    assert copies is not None
    # One keeps the block, the other gets a copy: the same one in both pools.
    assert [(copy.window_idx, copy.source) for copy in copies] == list(enumerate(before))
    assert [copy.target for copy in copies] == [table[-1] for table in sequence.tables]
    assert [table[-1] for table in twin.tables] == before
    assert blocks.is_within_own_block(sequence)
    assert blocks.is_within_own_block(twin)
    blocks.check_integrity([sequence, twin])
    blocks.release(sequence)
    blocks.release(twin)
    blocks.check_integrity([])


def test_all_or_none(request_of: Callable[..., Any]) -> None:
    """The pool of one window is full: nothing is taken from the other."""
    blocks = BlockManager((20, 6), SIZE, (None, 6))
    sequence = computed(blocks, request_of("a", PROMPT), 18, 1)
    assert held(sequence) == [5, 2]
    assert blocks.free_tokens(sequence) == (5 + 3) * SIZE - 19
    assert blocks.reserve([sequence], [14]) is None
    blocks.check_integrity([sequence])
    assert blocks.reserve([sequence], [13]) == []


def test_a_long_sequence_of_a_mixed_model_holds_a_window(
    harness: Callable[..., Any], request_of: Callable[..., Any]
) -> None:
    """Beside others, with a pool for the windowed layers that is far smaller than that for the others."""
    window, step = 10, 16
    chooser = random.Random(0)
    it = harness(num_blocks=(200, 30), windows=(None, window), max_num_batched_tokens=step)
    for number in range(5):
        prompt = tuple(chooser.randrange(50) for _ in range(60))
        it.scheduler.add(request_of(f"r{number}", prompt, 60, eos_token_ids=frozenset()))
    run, lengths = it.runner.run, []

    def watched(plan: Any) -> Any:
        for row in plan.rows:
            full, windowed = (sum(block != DUMMY_BLOCK for block in table) for table in row.block_ids)
            assert full == -(-row.sequence_length // SIZE)
            assert windowed <= -(-(window + len(row.token_ids) - 2) // SIZE) + 1
            lengths.append(row.sequence_length)
        return run(plan)

    it.runner.run = watched
    it.run()
    assert set(it.reasons.values()) == {"length"}
    assert max(lengths) == 119


def test_mistakes_are_found(request_of: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"num_blocks is \(20,\): give a number for each of the windows"):
        BlockManager((20,), SIZE, (None, 6))
    with pytest.raises(ValueError, match="num_blocks is 1"):
        BlockManager((20, 1), SIZE, (None, 6))
    blocks = BlockManager((20, 20), SIZE, (None, 6), enable_prefix_caching=False)
    with pytest.raises(ValueError, match=r"80 tokens .* need 20 cache blocks of 4, but there are 19"):
        blocks.check_length(80, 1, 16)
    blocks.check_length(76, 1, 16)
    with pytest.raises(ValueError, match=r"36 tokens .* need 20 cache blocks of 4"):
        BlockManager((100, 20), SIZE, (None, 6)).check_length(36, 4, 16)
    for spoil, words in (
        (lambda s: s.tables[0].pop(), "number of holders"),
        (lambda s: s.tables[1].append(DUMMY_BLOCK), "different lengths"),
        (lambda s: setattr(s, "num_computed", 13), "without a block"),
        (lambda s: setattr(s, "num_unseen", [0, 0]), "can't see"),
        (lambda s: s.tables[1].reverse(), "has given back"),
    ):
        sequence = computed(blocks, request_of("a", PROMPT), 12)
        tables = [list(table) for table in sequence.tables]
        spoil(sequence)
        with pytest.raises(RuntimeError, match=words):
            blocks.check_integrity([sequence])
        sequence.tables, sequence.num_computed, sequence.num_unseen = tables, 12, [0, 1]
        blocks.release(sequence)
        blocks.check_integrity([])
