"""StepPlan: what one step computes, as ids and counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """The newest tokens of one sequence: a chunk of its prompt, or the one token that was chosen last.

    `first_position` is the position of the first of `token_ids`; everything before it is in the cache. `block_ids` are
    the cache blocks of the whole sequence, in order, with room for these tokens. `prompt_length` is the prompt's.
    """

    sequence_id: int
    first_position: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    prompt_length: int

    @property
    def sequence_length(self) -> int:
        """Tokens of the sequence once this step has run."""
        return self.first_position + len(self.token_ids)


@dataclass(frozen=True)
class StepPlan:
    """The rows of a step. Chunks of prompts and single tokens mix freely; there is no phase."""

    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)
