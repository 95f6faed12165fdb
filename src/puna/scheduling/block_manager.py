"""BlockManager: the cache blocks of every sequence, in one pool for each window that the model's layers have.

Nearly all models have the same window in all layers, or none, and so one pool. In a mixed one (Qwen's `layer_types`) a
sequence has a block table for each of `LLaMAConfig.windows`: that of the layers that see everything keeps all of its
blocks, that of the windowed layers gives back those that no token to come can see. The tables of a sequence are equally
long, with the dummy block where one was given back; so the same places are shared, copied and appended to in all.

Why a pool for each window, and not one whose blocks serve either kind of layer: such a block would have to take the
same bytes for both. With 21 layers of one kind and 7 of the other that means four tables for each sequence, with 27 and
1 it means 28; or blocks of different sizes, and a cache that is no plain tensor for each layer. The price is a split
that is fixed at the start (planning/memory_plan.py): blocks that are free in one pool are of no use to the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from puna.scheduling.block_allocator import DUMMY_BLOCK, BlockAllocator, Utilization, prefix_hashes
from puna.scheduling.sequence import Sequence
from puna.scheduling.step_plan import BlockCopy


def most_blocks(window: int | None, num_tokens: int, num_sequences: int, step_tokens: int, block_size: int) -> int:
    """The most blocks that sequences of so many tokens each hold at once where layers have this window.

    `step_tokens` is how many tokens of theirs one step computes at the most: they need blocks whatever the window is.
    """
    whole = num_sequences * -(-num_tokens // block_size)
    if window is None:
        return whole
    # What the first token of a step sees before it, in blocks that are cut at both ends; and what the step adds.
    before = -(-(window - 1) // block_size) + 2
    return min(whole, num_sequences * before + -(-step_tokens // block_size))


class BlockManager:
    """Gives sequences their blocks and takes them back; `num_blocks` are those of the pool of each of `windows`.

    Between two plans a windowed table holds no block that its next token can't see. Raises ValueError for pools that
    are too small to hand out any block.
    """

    def __init__(
        self,
        num_blocks: tuple[int, ...],
        block_size: int = 16,
        windows: tuple[int | None, ...] = (None,),
        enable_prefix_caching: bool = True,
    ) -> None:
        if len(num_blocks) != len(windows):
            raise ValueError(f"num_blocks is {num_blocks}: give a number for each of the windows {windows}")
        self.block_size, self.windows = block_size, windows
        self.enable_prefix_caching = enable_prefix_caching
        self._allocators = [BlockAllocator(count, block_size, enable_prefix_caching) for count in num_blocks]

    @property
    def utilization(self) -> Utilization:
        """Over all pools."""
        pools = [allocator.utilization for allocator in self._allocators]
        return Utilization(
            in_use=sum(pool.in_use for pool in pools),
            cached=sum(pool.cached for pool in pools),
            empty=sum(pool.empty for pool in pools),
        )

    def check_length(self, num_tokens: int, num_sequences: int, step_tokens: int) -> None:
        """Raises ValueError where sequences of so many tokens don't fit even if nothing else runs."""
        for window, allocator in zip(self.windows, self._allocators, strict=True):
            needed = most_blocks(window, num_tokens, num_sequences, step_tokens, self.block_size)
            if needed > allocator.num_blocks - 1:
                raise ValueError(
                    f"{num_tokens} tokens (prompt and max_tokens) need {needed} cache blocks of {self.block_size}, but "
                    f"there are {allocator.num_blocks - 1}: ask for fewer tokens, or give the cache more memory"
                )

    def has_room(self, sequences: list[Sequence], step_tokens: int) -> bool:
        """Whether enough blocks are free for all tokens that the sequences have by now."""
        longest = max(sequence.num_tokens for sequence in sequences)
        for i, allocator in enumerate(self._allocators):
            needed = most_blocks(self.windows[i], longest, len(sequences), step_tokens, self.block_size)
            held = sum(len(sequence.tables[i]) - sequence.num_unseen[i] for sequence in sequences)
            if needed - held > allocator.num_free:
                return False
        return True

    def free_tokens(self, sequence: Sequence) -> int:
        """Tokens that fit into the sequence's last block and into the free ones, if it need not copy any."""
        free = min(allocator.num_free for allocator in self._allocators)
        return (len(sequence.tables[0]) + free) * self.block_size - sequence.num_computed

    def is_within_own_block(self, sequence: Sequence) -> bool:
        """Whether the next token goes into a block that the sequence has already, and shares with nobody."""
        place = sequence.num_computed % self.block_size
        return place > 0 and self._allocators[0].num_holders(sequence.tables[0][-1]) == 1

    def begin(self, sequence: Sequence) -> None:
        """Takes over the published blocks of the longest prefix; never the last token's, whose output is wanted."""
        sequence.tables = [[] for _ in self.windows]
        sequence.num_unseen = [0] * len(self.windows)
        request, size = sequence.request, self.block_size
        if not self.enable_prefix_caching or not request.reads_cache:
            return
        sequence.hashes = prefix_hashes(sequence.token_ids, size, request.cache_salt, sequence.hashes)
        found = self._longest_prefix(sequence.hashes[: (sequence.num_tokens - 1) // size])
        for i, allocator in enumerate(self._allocators):
            unseen = self._num_unseen(i, found * size)
            blocks = allocator.acquire_published(sequence.hashes[unseen:found])
            sequence.tables[i] = [DUMMY_BLOCK] * unseen + blocks
            sequence.num_unseen[i] = unseen
        sequence.num_computed, sequence.num_published = found * size, found

    def reserve(self, sequences: list[Sequence], counts: list[int]) -> list[BlockCopy] | None:
        """Blocks of their own for the next `counts` tokens, for all sequences or none (None); and the copies of blocks
        that they shared until now."""
        size, first = self.block_size, self._allocators[0]
        wanted: list[tuple[Sequence, bool, int]] = []
        leaving: dict[int, int] = {}
        for sequence, count in zip(sequences, counts, strict=True):
            table = sequence.tables[0]
            more = max(0, -(-(sequence.num_computed + count) // size) - len(table))
            is_copied = False
            if count and sequence.num_computed % size:
                block = table[sequence.num_computed // size]
                # Of several beams that share the block, the last one keeps it.
                is_copied = first.num_holders(block) - leaving.get(block, 0) > 1
                leaving[block] = leaving.get(block, 0) + is_copied
            wanted.append((sequence, is_copied, more))
        total = sum(is_copied + more for _, is_copied, more in wanted)
        if any(allocator.num_free < total for allocator in self._allocators):
            return None
        copies = []
        for i, allocator in enumerate(self._allocators):
            blocks = allocator.allocate(total)
            for sequence, is_copied, more in wanted:
                table = sequence.tables[i]
                if is_copied:
                    place, new = sequence.num_computed // size, blocks.pop()
                    copies.append(BlockCopy(i, table[place], new))
                    allocator.release([table[place]])
                    table[place] = new
                table += [blocks.pop() for _ in range(more)]
                if is_copied or more:
                    sequence.tables_changed()
        return copies

    def settle(self, sequence: Sequence) -> None:
        """Once the next step is planned: publishes what is full, and gives back what no token after it can see.

        Not before `sequence.settle_at` positions are computed is there anything to do.
        """
        self._publish(sequence)
        size, computed = self.block_size, sequence.num_computed
        sequence.settle_at = (sequence.num_published + 1) * size
        for i, window in enumerate(self.windows):
            if window is None:
                continue
            unseen, before = self._num_unseen(i, computed), sequence.num_unseen[i]
            if unseen > before:
                table = sequence.tables[i]
                self._allocators[i].release(table[before:unseen])
                table[before:unseen] = [DUMMY_BLOCK] * (unseen - before)
                sequence.num_unseen[i] = unseen
                sequence.tables_changed()
            sequence.settle_at = min(sequence.settle_at, (unseen + 1) * size + window - 1)

    def share(self, twin: Sequence) -> None:
        """Counts the references of a sequence that was forked from another; which may wait, and hold none."""
        for i, table in enumerate(twin.tables):
            for block in table:
                self._allocators[i].acquire(block)

    def release(self, sequence: Sequence) -> None:
        """Back to nothing computed and no blocks; the full ones stay findable while there is room."""
        if not sequence.tables:
            return
        self._publish(sequence)
        for allocator, table in zip(self._allocators, sequence.tables, strict=True):
            allocator.release(table)
        sequence.tables, sequence.num_unseen = [], []
        sequence.num_computed = sequence.num_published = sequence.settle_at = 0
        sequence.tables_changed()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises RuntimeError unless the pools' counts are those of the sequences' tables, and these are sound."""
        holders = [sequence for sequence in sequences if sequence.tables]
        for i, allocator in enumerate(self._allocators):
            allocator.check_integrity([sequence.tables[i] for sequence in holders])
        for sequence in holders:
            lengths = {len(table) for table in sequence.tables}
            unseen = [self._num_unseen(i, sequence.num_computed) for i in range(len(self.windows))]
            dummies = [[DUMMY_BLOCK] * count for count in unseen]
            problems = (
                (len(lengths) > 1, "has tables of different lengths"),
                (sequence.num_computed > min(lengths) * self.block_size, "has tokens without a block"),
                (sequence.num_unseen != unseen, "holds blocks that it can't see, or has given back what it can"),
                (
                    any(table[: len(gone)] != gone for table, gone in zip(sequence.tables, dummies, strict=True)),
                    "holds blocks that it has given back",
                ),
            )
            for is_wrong, what in problems:
                if is_wrong:
                    raise RuntimeError(f"the scheduler is corrupt: sequence {sequence.sequence_id} {what}")

    def _num_unseen(self, window_idx: int, num_computed: int) -> int:
        """How many blocks, from the first on, lie wholly before what the next token can see."""
        window = self.windows[window_idx]
        return 0 if window is None else max(0, num_computed - window + 1) // self.block_size

    def _longest_prefix(self, hashes: list[bytes]) -> int:
        """The most blocks from the beginning after which a sequence can go on: what it sees then is all published.

        So a windowed layer's blocks before that may be evicted; and where those are that it needs, the prefix is a
        shorter one, though the other layers may have more of it.
        """
        count, tried = len(hashes), -1
        while tried != count:
            tried = count
            for i, allocator in enumerate(self._allocators):
                if self.windows[i] is None:
                    missing = (place for place in range(count) if not allocator.is_published(hashes[place]))
                    count = next(missing, count)
                    continue
                place = count
                while place > self._num_unseen(i, count * self.block_size):
                    place -= 1
                    if not allocator.is_published(hashes[place]):
                        count = place
        return count

    def _publish(self, sequence: Sequence) -> None:
        """Makes the blocks findable whose tokens are known and computed, or will be before the next plan runs."""
        full = min(sequence.num_computed, len(sequence.token_ids)) // self.block_size
        if full <= sequence.num_published:
            return
        if self.enable_prefix_caching:
            salt = sequence.request.cache_salt
            sequence.hashes = prefix_hashes(sequence.token_ids, self.block_size, salt, sequence.hashes)
            for allocator, table in zip(self._allocators, sequence.tables, strict=True):
                for place in range(sequence.num_published, full):
                    if table[place] != DUMMY_BLOCK:
                        allocator.publish(table[place], sequence.hashes[place])
        sequence.num_published = full
