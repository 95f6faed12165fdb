"""StepBuffers: what a plan becomes, row by row, and what a padded or a later plan leaves of the one before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.runtime.step_buffers import StepBuffers, StepInputs
from puna.runtime.step_graph import bucket_for, bucket_sizes
from puna.scheduling.step_plan import PENDING_TOKEN, StepPlan, StepRow

SIZE = 4


def buffers() -> StepBuffers:
    return StepBuffers(max_tokens=16, max_rows=6, max_blocks=5, block_size=SIZE)


def row(number: int, first: int, tokens: tuple[int, ...], blocks: tuple[int, ...], **fields: Any) -> StepRow:
    return StepRow(number, first, tokens, (blocks,), **({"prompt_length": 3} | fields))


def plan_of(*rows: StepRow) -> StepPlan:
    return StepPlan(rows)


def numbers(inputs: StepInputs) -> dict[str, list[Any]]:
    attention = inputs.attention_params
    (tables,) = attention.cache_tables
    named: dict[str, Tensor | None] = {
        "input_ids": inputs.input_ids,
        "position_ids": inputs.position_ids,
        "logits_ids": inputs.logits_ids,
        "query_starts": attention.query_starts,
        "sequence_lengths": attention.sequence_lengths,
        "block_tables": tables.block_tables,
        "slot_mapping": tables.slot_mapping,
        "rotary_lengths": attention.rotary_lengths,
    }
    return {name: tensor.tolist() for name, tensor in named.items() if tensor is not None}


MIXED = plan_of(
    row(1, 2, (50, 51, 52), (7, 9), prompt_length=9),  # within a prompt: no logits
    row(2, 8, (PENDING_TOKEN,), (1, 2, 3), sampled_ids=(2,)),
    row(3, 0, (60, 61), (4,), prompt_length=2, sampled_ids=(3,), logprob_targets=(61,)),
)


def test_a_mixed_plan() -> None:
    found = numbers(buffers().fill(MIXED, {2: 77}.__getitem__))
    assert found["input_ids"] == [50, 51, 52, 77, 60, 61]
    assert found["position_ids"] == [2, 3, 4, 8, 0, 1]
    assert found["slot_mapping"] == [7 * 4 + 2, 7 * 4 + 3, 9 * 4, 3 * 4, 4 * 4, 4 * 4 + 1]
    # The prompt's length within it, then the token's own place.
    assert found["rotary_lengths"] == [9, 9, 9, 9, 2, 2]
    assert found["query_starts"] == [0, 3, 4, 6]
    assert found["sequence_lengths"] == [5, 9, 2]
    assert [table[:count] for table, count in zip(found["block_tables"], (2, 3, 1), strict=True)] == [
        [7, 9],
        [1, 2, 3],
        [4],
    ]
    # One for a row that samples, all of a row whose prompt is scored, none within a prompt.
    assert found["logits_ids"] == [3, 4, 5]


def test_types() -> None:
    inputs = buffers().fill(MIXED, {2: 77}.__getitem__)
    assert {inputs.input_ids.dtype, inputs.position_ids.dtype, inputs.logits_ids.dtype} == {torch.int64}
    attention = inputs.attention_params
    (tables,) = attention.cache_tables
    assert tables.slot_mapping.dtype == torch.int64
    assert {attention.query_starts.dtype, attention.sequence_lengths.dtype, tables.block_tables.dtype} == {torch.int32}


def test_a_pending_token_is_asked_for_only_where_there_is_one() -> None:
    asked = []

    def pending(sequence_id: int) -> int:
        asked.append(sequence_id)
        return 5

    chunk = row(8, 4, (11, PENDING_TOKEN), (1, 2), sampled_ids=(8,))
    found = numbers(buffers().fill(plan_of(row(1, 0, (9,), (3,)), chunk), pending))
    assert asked == [8]
    assert found["input_ids"] == [9, 11, 5]


def test_rows_are_padded_to_a_bucket_in_the_dummy_block() -> None:
    decode = plan_of(
        row(1, 5, (50,), (7, 9), sampled_ids=(1,)), row(2, 8, (PENDING_TOKEN,), (1, 2, 3), sampled_ids=(2,))
    )
    it = buffers()
    it.fill(MIXED, {2: 77}.__getitem__)  # what it leaves behind must not show
    found = numbers(it.fill(decode, {2: 77}.__getitem__, num_rows=4))
    assert found["input_ids"] == [50, 77, 0, 0]
    assert found["position_ids"] == [5, 8, 0, 0]
    assert found["slot_mapping"] == [9 * 4 + 1, 3 * 4, 0, 0]
    assert found["query_starts"] == [0, 1, 2, 3, 4]
    assert found["sequence_lengths"] == [6, 9, 1, 1]
    assert found["rotary_lengths"][2:] == [1, 1]
    assert found["block_tables"][2:] == [[0] * 5, [0] * 5]
    assert [len(table) for table in found["block_tables"]] == [5] * 4  # the same shapes whatever the lengths
    assert found["logits_ids"] == [0, 1, 2, 3]  # as many whatever the plan wants


def test_a_padded_step_has_a_row_of_logits_for_every_row() -> None:
    rows = [row(1, 5, (50,), (7, 9)), row(2, 8, (51,), (1, 2, 3), sampled_ids=(2,)), row(3, 1, (52,), (4,))]
    found = numbers(buffers().fill(plan_of(*rows), num_rows=5))
    assert len(found["logits_ids"]) == 5
    assert found["logits_ids"][0] == 1  # the wanted one comes first
    assert set(found["logits_ids"]) <= set(range(5))


def test_every_window_has_tables_of_its_own() -> None:
    it = StepBuffers(max_tokens=16, max_rows=6, max_blocks=5, block_size=SIZE, num_windows=2)
    rows = [
        StepRow(1, 7, (50, 51), ((7, 9, 2), (0, 3, 5)), 3, (1,)),
        StepRow(2, 8, (52,), ((1, 4, 6), (0, 0, 8)), 3, (2,)),
    ]
    full, windowed = it.fill(plan_of(*rows)).attention_params.cache_tables
    assert full.block_tables.tolist() == [[7, 9, 2], [1, 4, 6]]
    assert windowed.block_tables.tolist() == [[0, 3, 5], [0, 0, 8]]
    assert full.slot_mapping.tolist() == [9 * 4 + 3, 2 * 4, 6 * 4]
    assert windowed.slot_mapping.tolist() == [3 * 4 + 3, 5 * 4, 8 * 4]
    full, windowed = it.fill(plan_of(rows[1]), num_rows=2).attention_params.cache_tables
    assert full.block_tables.tolist() == [[1, 4, 6, 0, 0], [0] * 5]
    assert windowed.block_tables.tolist() == [[0, 0, 8, 0, 0], [0] * 5]
    assert (full.slot_mapping.tolist(), windowed.slot_mapping.tolist()) == ([6 * 4, 0], [8 * 4, 0])
    with pytest.raises(ValueError, match="zip"):
        it.fill(plan_of(row(1, 0, (9,), (3,))))


def test_every_step_lies_at_the_same_addresses() -> None:
    it = buffers()

    def addresses(inputs: StepInputs) -> list[int]:
        attention = inputs.attention_params
        tensors = (
            inputs.input_ids,
            inputs.position_ids,
            inputs.logits_ids,
            attention.query_starts,
            attention.sequence_lengths,
            attention.cache_tables[0].block_tables,
            attention.cache_tables[0].slot_mapping,
        )
        return [tensor.data_ptr() for tensor in tensors]

    first = addresses(it.fill(MIXED, {2: 77}.__getitem__))
    decode = plan_of(row(1, 5, (50,), (7, 9), sampled_ids=(1,)))
    assert addresses(it.fill(decode)) == first
    assert addresses(it.fill(decode, num_rows=2)) == first


def test_a_shorter_plan_after_a_longer_one() -> None:
    it, fresh = buffers(), buffers()
    short = plan_of(row(5, 0, (33,), (2,), sampled_ids=(5,)))
    it.fill(MIXED, {2: 77}.__getitem__)
    assert numbers(it.fill(short)) == numbers(fresh.fill(short))


def test_plans_that_cannot_be_run() -> None:
    with pytest.raises(ValueError, match="the plan has no tokens"):
        buffers().fill(plan_of())
    with pytest.raises(ValueError, match="sequence 6 has 5 tokens, but its 1 blocks hold 4"):
        buffers().fill(plan_of(row(6, 3, (1, 2), (2,))))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 7, 8, 9, 64, 65])
def test_buckets(max_rows: int) -> None:
    buckets = bucket_sizes(max_rows)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == max_rows
    for rows in range(1, max_rows + 1):
        bucket = bucket_for(rows, buckets)
        assert bucket is not None
        assert rows <= bucket < max(rows + 8, 2 * rows)
    assert bucket_for(max_rows + 1, buckets) is None
    assert bucket_for(1, ()) is None
