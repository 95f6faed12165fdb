"""StepBuffers: what a plan becomes, row by row, and what a padded or a later plan leaves of the one before."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fake_accelerator import FakeAccelerator
from puna.runtime.block_tables import BlockTables
from puna.runtime.step_buffers import StepBuffers, StepInputs
from puna.runtime.step_graph import bucket_for, bucket_sizes, padded_mixed, table_widths
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


def test_a_step_with_prompts_is_padded_to_tokens_and_rows() -> None:
    prompt = row(3, 0, (60, 61, 62), (4,), sampled_ids=(3,))
    decode = row(2, 8, (PENDING_TOKEN,), (1, 2, 3), sampled_ids=(2,))
    it = buffers()
    it.fill(MIXED, {2: 77}.__getitem__)  # what it leaves behind must not show
    found = numbers(it.fill(plan_of(prompt, decode), {2: 77}.__getitem__, num_rows=5, num_tokens=10))
    assert found["input_ids"] == [60, 61, 62, 77] + [0] * 6
    assert found["position_ids"] == [0, 1, 2, 8] + [0] * 6
    assert found["slot_mapping"] == [16, 17, 18, 3 * 4] + [0] * 6
    assert found["query_starts"] == [0, 3, 4, 5, 6, 10]  # the last row takes the rest
    assert found["sequence_lengths"] == [3, 9, 1, 1, 4]
    assert found["rotary_lengths"][4:] == [1] * 6
    assert found["block_tables"][2:] == [[0] * 5] * 3
    assert found["logits_ids"][:2] == [2, 3]
    assert len(found["logits_ids"]) == 5
    # All rows that there may be, and the one that padding takes.
    rows = [row(i, 0, (60 + i,) * (1 + (i == 0)), (1 + i,), sampled_ids=(i,)) for i in range(6)]
    found = numbers(buffers().fill(plan_of(*rows), num_rows=7, num_tokens=16))
    assert found["query_starts"] == [0, 2, 3, 4, 5, 6, 7, 16]
    assert len(found["logits_ids"]) == 6  # no more than tokens are kept of


def test_sizes_of_padded_steps() -> None:
    for num_rows in (1, 2, 3, 7, 8, 30, 100, 511, 1000, 1023, 1024):
        sizes = set()
        for num_tokens in range(num_rows + 1, 2049):
            size = padded_mixed(num_tokens, num_rows, 1024, 2048)
            if size is None:
                assert num_tokens + num_rows // 8 + 16 > 2048 - 128
                continue
            tokens, rows = size
            assert num_rows < rows <= min(1025, max(num_rows + 4, num_rows * 9 // 8 + 1))
            added = tokens - num_tokens
            assert rows - num_rows <= added <= max(20, (num_tokens + rows - num_rows) // 8) + rows - num_rows
            sizes.add(size)
        assert len(sizes) <= 60


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


def test_steps_of_a_bucket_come_in_the_same_tensors() -> None:
    it = buffers()
    decode = plan_of(row(1, 5, (50,), (7, 9), sampled_ids=(1,)))
    first = it.fill(decode, num_rows=2)
    it.fill(MIXED, {2: 77}.__getitem__)
    assert it.fill(plan_of(row(2, 8, (51,), (1, 2, 3), sampled_ids=(2,))), num_rows=2) is first
    assert it.fill(decode, num_rows=4) is not first
    fresh = buffers().fill(plan_of(row(2, 8, (51,), (1, 2, 3), sampled_ids=(2,))), num_rows=2)
    it.fill(plan_of(row(2, 8, (51,), (1, 2, 3), sampled_ids=(2,))), num_rows=2)
    assert numbers(first) == numbers(fresh)


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


def test_an_accelerator_gets_the_same_numbers_in_one_copy() -> None:
    """Pending tokens come from where the last step left them; what is not of the plan is greedy padding."""
    accelerator = FakeAccelerator()
    it = StepBuffers(16, 6, 5, SIZE, accelerator)
    it.chosen.copy_(torch.tensor([90, 91, 92, 93, 94, 95]))
    found = numbers(it.fill(MIXED, {2: 4}.__getitem__))
    assert found == numbers(buffers().fill(MIXED, {2: 94}.__getitem__))
    decode = plan_of(
        row(1, 5, (50,), (7, 9), sampled_ids=(1,)), row(2, 8, (PENDING_TOKEN,), (1, 2, 3), sampled_ids=(2,))
    )
    draws = {"temperature": np.array([0.5, 0.0], np.float32), "top_k": np.array([7, 97])}
    before = accelerator.num_copies
    inputs = it.fill(decode, {2: 1}.__getitem__, 4, width=3, draws=draws)
    assert accelerator.num_copies == before + 1
    assert inputs.input_ids.tolist() == [50, 91, 0, 0]
    assert inputs.attention_params.cache_tables[0].block_tables.tolist() == [[7, 9, 0], [1, 2, 3], [0] * 3, [0] * 3]
    assert inputs.draws is not None
    assert inputs.draws.temperature.tolist() == [0.5, 0, 0, 0]
    assert inputs.draws.top_k.tolist() == [7, 97, 0, 0]
    tensors = (inputs.position_ids, inputs.draws.top_p, inputs.attention_params.query_starts, inputs.draws.temperature)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def test_pinned_memory_is_written_again_only_once_it_was_read() -> None:
    """Three steps while the device stands still: the third must wait for the first one's copy."""
    accelerator = FakeAccelerator(runs_freely=False)
    it = StepBuffers(16, 6, 5, SIZE, accelerator)
    plans = [plan_of(row(i, 0, (50 + i,), (i,), sampled_ids=(i,))) for i in (1, 2, 3)]
    for plan in plans[:2]:
        it.fill(plan)
    assert accelerator.reached == 0
    accelerator.runs_freely = True
    it.fill(plans[2])
    assert accelerator.reached == 2  # the copy, and the event behind it
    accelerator.go()


def test_tables_of_many_sequences() -> None:
    """Those that come again have their tables still, or get them anew; nobody sees another one's."""
    tables, chooser = BlockTables(max_rows=4, max_blocks=6, num_windows=1), random.Random(0)
    blocks = {i: ((tuple(range(10 * i, 10 * i + 1 + i % 6))),) for i in range(30)}
    for _ in range(200):
        for i in chooser.sample(range(30), 3):
            if chooser.random() < 0.3:
                blocks[i] = (tuple(chooser.randrange(1, 500) for _ in range(chooser.randrange(1, 7))),)
        rows = [StepRow(i, 0, (1,), blocks[i], 1) for i in chooser.sample(range(30), chooser.randrange(1, 5))]
        places, counts = tables.places(rows)
        assert len(set(places.tolist())) == len(rows)
        for place, count, one in zip(places, counts, rows, strict=True):
            assert count == len(one.block_ids[0])
            assert tables.arrays[0][place].tolist() == [*one.block_ids[0], *[0] * (6 - count)]


def test_buckets_of_many_rows_grow_coarser_and_never_far_apart() -> None:
    buckets = bucket_sizes(1024)
    assert len(buckets) < 64
    for rows in range(1, 1025):
        bucket = bucket_for(rows, buckets)
        assert bucket is not None
        assert bucket - rows < max(8, rows / 7)


@pytest.mark.parametrize("max_blocks", [1, 16, 63, 64, 65, 256, 300, 8192])
def test_widths_of_tables(max_blocks: int) -> None:
    widths = table_widths(max_blocks, 16)
    assert widths[-1] == max_blocks
    assert all(4 * small >= large > small for small, large in itertools.pairwise(widths))
    assert widths[0] == min(64, max_blocks)
