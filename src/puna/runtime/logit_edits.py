"""Changes to logits that come before temperature: bias, penalties, bans, logits processors and grammars.

Most touch a few tokens of some rows: those are collected over all rows, and written at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.runtime.sequence_state import SequenceState
from puna.scheduling.step_plan import Unsatisfiable


class Entries(NamedTuple):
    """Values for some tokens of some rows; each tensor is [N], and no (row, token) is there twice."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


def entries(given: Sequence[Mapping[int, float]], device: torch.device) -> Entries | None:
    """What is given for tokens of each row; None where nothing is."""
    found = [(row, token, value) for row, values in enumerate(given) for token, value in values.items()]
    if not found:
        return None
    rows, tokens, values = zip(*found, strict=True)
    return Entries(
        torch.tensor(rows, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )


def edit(x: Tensor, states: Sequence[SequenceState], bias: Entries | None, allowed: Entries | None) -> dict[int, str]:
    """All steps in order, on logits x [R, V] in place; each is skipped where no row needs it.

    `bias` is added to its entries; the rows that have entries in `allowed` (whose values don't count) lose all others.
    Returns what went wrong, by sequence: a logits processor or a grammar that failed.
    """
    errors: dict[int, str] = {}
    if bias is not None:
        x[bias.rows, bias.tokens] += bias.values
    _penalize(x, states)
    if allowed is not None:
        kept = x[allowed.rows, allowed.tokens]
        x[[row for row, state in enumerate(states) if state.params.allowed_token_ids is not None]] = -torch.inf
        x[allowed.rows, allowed.tokens] = kept
    banned = [(row, token) for row, state in enumerate(states) if state.can_ban for token in state.banned()]
    if banned:
        pairs = torch.tensor(banned, device=x.device)
        x[pairs[:, 0], pairs[:, 1]] = -torch.inf
    for row, state in enumerate(states):
        for processor in state.params.logits_processors:
            try:
                found = processor(list(state.token_ids), x[row].clone())
                if not isinstance(found, Tensor) or found.shape != x[row].shape:
                    raise TypeError(f"it returned {found if found is None else type(found).__name__}, not logits [V]")
                x[row] = found
            except Exception as error:  # a caller's code: whatever it raises ends its own sequence alone
                errors[state.sequence_id] = f"logits processor {processor!r} failed: {type(error).__name__}: {error}"
                break
    _constrain(x, states, errors)
    return errors


def _penalize(x: Tensor, states: Sequence[SequenceState]) -> None:
    """Repetition (Keskar et al., 2019), frequency and presence penalties, on the logits of tokens seen so far."""
    penalized = [(row, state.seen, state.params) for row, state in enumerate(states) if state.seen is not None]
    if not penalized:
        return

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(x.device)

    lengths = [len(seen.token_ids) for _, seen, _ in penalized]
    rows = torch.from_numpy(np.repeat(np.array([row for row, _, _ in penalized]), lengths)).to(x.device)
    tokens = torch.from_numpy(np.concatenate([seen.token_ids for _, seen, _ in penalized])).to(x.device)
    values = x[rows, tokens]
    if any(params.repetition_penalty != 1 for _, _, params in penalized):
        penalty = spread([params.repetition_penalty for _, _, params in penalized])
        values = torch.where(values < 0, values * penalty, values / penalty)
    if any(params.frequency_penalty or params.presence_penalty for _, _, params in penalized):
        counts = torch.from_numpy(np.concatenate([seen.counts for _, seen, _ in penalized])).to(x.device)
        values -= counts * spread([params.frequency_penalty for _, _, params in penalized])
        values -= (counts > 0) * spread([params.presence_penalty for _, _, params in penalized])
    x[rows, tokens] = values


def _constrain(x: Tensor, states: Sequence[SequenceState], errors: dict[int, str]) -> None:
    """-inf for what the grammars of those rows that have one do not allow."""
    guided = [(row, state.matcher, state.sequence_id) for row, state in enumerate(states) if state.matcher is not None]
    if not guided:
        return
    bits = torch.full((len(guided), -(-x.shape[1] // 32)), -1, dtype=torch.int32)
    for place, (_, matcher, sequence_id) in enumerate(guided):
        try:
            matcher.fill_bitmask(bits[place])
        except ValueError as error:
            errors[sequence_id] = Unsatisfiable(f"guided decoding can't go on: {error}")
    shifts = torch.arange(32, dtype=torch.int32, device=x.device)
    is_out = (bits.to(x.device).unsqueeze(2) >> shifts).bitwise_and_(1).flatten(1)[:, : x.shape[1]] == 0
    rows = torch.tensor([row for row, _, _ in guided], device=x.device)
    x[rows] = x[rows].masked_fill_(is_out, -torch.inf)
