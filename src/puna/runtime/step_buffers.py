"""StepBuffers: fixed storage that every step's plan is copied into, and the tensors that the packed model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.layers.params import AttentionParams, CacheTables
from puna.scheduling.block_allocator import DUMMY_BLOCK
from puna.scheduling.step_plan import PENDING_TOKEN, StepPlan


@dataclass(frozen=True)
class StepInputs:
    """Views of the buffers for one step of T tokens and B rows, valid until the next one.

    input_ids and position_ids int64 [T]; logits_ids int64 [R], the tokens whose logits are wanted.
    """

    input_ids: Tensor
    position_ids: Tensor
    logits_ids: Tensor
    attention_params: AttentionParams

    def with_angles(self, cos_sin: tuple[Tensor, Tensor]) -> StepInputs:
        """The same with these rotary angles of the tokens."""
        params = dataclasses.replace(self.attention_params, cos_sin=cos_sin)
        return dataclasses.replace(self, attention_params=params)


class StepBuffers:
    """Room for `max_tokens` tokens of `max_rows` sequences with `max_blocks` cache blocks each.

    `num_windows` is how many different windows the model's layers have: each has cache tables of its own.
    On the CPU the tensors that the model sees are the storage itself; on another device the plan is put together in a
    staging copy, which goes over at once. The same addresses serve every step, so a recorded step can be replayed.
    """

    def __init__(
        self,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        num_windows: int = 1,
    ) -> None:
        self.max_rows, self.block_size = max_rows, block_size
        self.max_length = max_blocks * block_size  # tokens of one sequence
        self._device = torch.device(device)
        self._int64 = _Staged((4 + num_windows, max(max_tokens, max_rows)), torch.int64, self._device)
        self._int32 = _Staged((2, max_rows + 1), torch.int32, self._device)
        self._tables = [_Staged((max_rows, max_blocks), torch.int32, self._device) for _ in range(num_windows)]

    def fill(
        self, plan: StepPlan, pending_token: Callable[[int], int] = int, num_rows: int | None = None
    ) -> StepInputs:
        """Copies a plan in. `pending_token` gives the token last chosen for a sequence.

        With `num_rows`, rows of one token in the dummy block are added up to that count; all of the plan's must be of
        one token too. There are as many logits_ids then: those of any rows follow the ones that are wanted. Raises
        ValueError for an empty plan, and for a row whose blocks have no room for its tokens.
        """
        num_tokens = plan.num_tokens
        if num_tokens == 0:
            raise ValueError("the plan has no tokens: there is nothing to run")
        padding = 0 if num_rows is None else num_rows - len(plan.rows)
        tokens, positions, rotary, wanted, *slots = self._int64.host
        starts, lengths = self._int32.host
        tables, widest = [table.host for table in self._tables], 1
        at = num_wanted = 0
        for b, row in enumerate(plan.rows):
            length, count = row.sequence_length, len(row.token_ids)
            num_blocks = min(map(len, row.block_ids))
            if length > num_blocks * self.block_size:
                raise ValueError(
                    f"sequence {row.sequence_id} has {length} tokens, but its {num_blocks} blocks hold "
                    f"{num_blocks * self.block_size}"
                )
            here = slice(at, at + count)
            tokens[here] = row.token_ids
            if row.token_ids[-1] == PENDING_TOKEN:
                tokens[at + count - 1] = pending_token(row.sequence_id)
            position = np.arange(row.first_position, length)
            positions[here] = position
            widest = max(widest, num_blocks)
            for table, slot, block_ids in zip(tables, slots, row.block_ids, strict=True):
                table[b, : len(block_ids)] = block_ids
                slot[here] = table[b, position // self.block_size] * self.block_size + position % self.block_size
            rotary[here] = np.maximum(position + 1, row.prompt_length)
            starts[b], lengths[b] = at, length
            if row.logprob_targets:
                wanted[num_wanted : num_wanted + count] = np.arange(at, at + count)
                num_wanted += count
            elif row.wants_logits:
                wanted[num_wanted] = at + count - 1
                num_wanted += 1
            at += count
        rows = len(plan.rows)
        if padding > 0:
            ends = slice(at, at + padding)
            tokens[ends] = positions[ends] = 0
            rotary[ends] = lengths[rows : rows + padding] = 1
            for table, slot in zip(tables, slots, strict=True):
                slot[ends] = DUMMY_BLOCK * self.block_size
                table[rows : rows + padding, :] = DUMMY_BLOCK
            starts[rows : rows + padding] = np.arange(at, at + padding)
            at, rows = at + padding, rows + padding
        starts[rows] = at
        if num_rows is not None:
            wanted[num_wanted:num_rows] = np.arange(num_wanted, num_rows)
            num_wanted = num_rows

        input_ids, position_ids, rotary_lengths, logits_ids, *slot_mappings = self._int64.on_device(at)
        query_starts, sequence_lengths = self._int32.on_device(rows + 1)
        # The whole width where rows are padded to a bucket: a recorded step must not change its shapes.
        block_tables = [table.on_device(table.width if num_rows is not None else widest) for table in self._tables]
        return StepInputs(
            input_ids=input_ids,
            position_ids=position_ids,
            logits_ids=logits_ids[:num_wanted],
            attention_params=AttentionParams(
                query_starts=query_starts,
                sequence_lengths=sequence_lengths[:rows],
                cache_tables=tuple(
                    CacheTables(block_table[:rows], slot_mapping)
                    for block_table, slot_mapping in zip(block_tables, slot_mappings, strict=True)
                ),
                rotary_lengths=rotary_lengths,
            ),
        )


class _Staged:
    """Numbers that the CPU writes and the device reads: one tensor on the CPU, a pinned one and its copy elsewhere."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        is_cpu = device.type == "cpu"
        staging = torch.zeros(shape, dtype=dtype, pin_memory=not is_cpu)
        self.host: npt.NDArray[np.int64] = staging.numpy()
        self.width = shape[1]
        self._staging = staging
        self._tensor = staging if is_cpu else torch.zeros(shape, dtype=dtype, device=device)

    def on_device(self, width: int) -> Tensor:
        """The first `width` columns of every row, brought up to date."""
        if self._tensor is not self._staging:
            self._tensor[:, :width].copy_(self._staging[:, :width], non_blocking=True)
        return self._tensor[:, :width]
