"""BlockTables: the block tables of sequences as arrays, which are rewritten only where a plan has other blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from puna.scheduling.block_allocator import DUMMY_BLOCK
from puna.scheduling.step_plan import StepRow

Ints = npt.NDArray[np.int64]


class _Known(NamedTuple):
    place: int
    block_ids: tuple[tuple[int, ...], ...]
    num_blocks: int


class BlockTables:
    """Tables of up to 2 * `max_rows` sequences, those of the latest plans; int32 [places, max_blocks] for each window.

    Nearly every row of nearly every plan has the blocks that it had in the one before, in the same tuple: to look at
    that takes a tenth of what it takes to read some hundred numbers out of it.
    """

    def __init__(self, max_rows: int, max_blocks: int, num_windows: int) -> None:
        self.arrays = [np.full((2 * max_rows, max_blocks), DUMMY_BLOCK, np.int32) for _ in range(num_windows)]
        self._known: dict[int, _Known] = {}
        self._empty = list(range(2 * max_rows))[::-1]

    def places(self, rows: Sequence[StepRow]) -> tuple[Ints, Ints]:
        """Where in `arrays` the rows' tables are, and of how many blocks they are at least -> [B], [B]."""
        found = []
        for row in rows:
            known = self._known.get(row.sequence_id)
            if known is None or known.block_ids is not row.block_ids:
                known = self._write(row, rows)
            found.append((known.place, known.num_blocks))
        both = np.array(found, dtype=np.int64)
        return both[:, 0], both[:, 1]

    def _write(self, row: StepRow, rows: Sequence[StepRow]) -> _Known:
        known = self._known.get(row.sequence_id)
        if known is not None:
            place = known.place
        else:
            if not self._empty:
                self._forget_all_but({row.sequence_id for row in rows})
            place = self._empty.pop()
        for array, block_ids in zip(self.arrays, row.block_ids, strict=True):
            array[place, : len(block_ids)] = block_ids
            array[place, len(block_ids) :] = DUMMY_BLOCK
        known = _Known(place, row.block_ids, min(map(len, row.block_ids)))
        self._known[row.sequence_id] = known
        return known

    def _forget_all_but(self, wanted: set[int]) -> None:
        for sequence_id in self._known.keys() - wanted:
            self._empty.append(self._known.pop(sequence_id).place)
