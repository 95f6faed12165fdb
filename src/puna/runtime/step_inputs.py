"""StepInputs: a StepPlan as the tensors that the packed model takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.layers.params import AttentionParams
from puna.scheduling.step_plan import StepPlan


@dataclass(frozen=True)
class StepInputs:
    """input_ids and position_ids int64 [T], last_token_ids int64 [B] (each sequence's last row), attention_params."""

    input_ids: Tensor
    position_ids: Tensor
    last_token_ids: Tensor
    attention_params: AttentionParams

    @classmethod
    def from_plan(cls, plan: StepPlan, block_size: int, device: torch.device | str = "cpu") -> StepInputs:
        """Raises ValueError for an empty plan, and for a row whose blocks have no room for its tokens."""
        if plan.num_tokens == 0:
            raise ValueError("the plan has no tokens: there is nothing to run")
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rotary_lengths: list[int] = []
        query_starts = [0]
        for row in plan.rows:
            if row.sequence_length > len(row.block_ids) * block_size:
                raise ValueError(
                    f"sequence {row.sequence_id} has {row.sequence_length} tokens, but its {len(row.block_ids)} blocks "
                    f"hold {len(row.block_ids) * block_size}"
                )
            tokens += row.token_ids
            for position in range(row.first_position, row.sequence_length):
                positions.append(position)
                slots.append(row.block_ids[position // block_size] * block_size + position % block_size)
                rotary_lengths.append(max(row.prompt_length, position + 1))
            query_starts.append(len(tokens))
        widest = max(len(row.block_ids) for row in plan.rows)
        tables = [[*row.block_ids, *[0] * (widest - len(row.block_ids))] for row in plan.rows]

        def tensor(values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            input_ids=tensor(tokens, torch.int64),
            position_ids=tensor(positions, torch.int64),
            last_token_ids=tensor([start - 1 for start in query_starts[1:]], torch.int64),
            attention_params=AttentionParams(
                query_starts=tensor(query_starts, torch.int32),
                sequence_lengths=tensor([row.sequence_length for row in plan.rows], torch.int32),
                block_tables=tensor(tables, torch.int32),
                slot_mapping=tensor(slots, torch.int64),
                rotary_lengths=tensor(rotary_lengths, torch.int64),
            ),
        )
