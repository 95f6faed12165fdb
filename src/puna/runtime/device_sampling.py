"""Choosing tokens where the logits are, without the host: which sequences allow that, and what the device is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.runtime import sampling_ops as ops
from puna.runtime.sampler import Sampler, row_error
from puna.runtime.sequence_state import SequenceState
from puna.runtime.step_buffers import Draws
from puna.scheduling.step_plan import SampledToken, StepResult, StepRow

Columns = dict[str, npt.NDArray[Any]]

_TINY: Final = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class PlainRows:
    """Sequences whose next tokens follow from logits and numbers: nothing that the host knows of their texts counts.

    `columns` are those of Draws but `positions`; `places` says for each sequence which row of logits is its own.
    """

    sequence_ids: tuple[int, ...] = ()
    states: tuple[SequenceState, ...] = ()
    columns: Columns = field(default_factory=lambda: {"temperature": np.zeros(0, dtype=np.float32)})
    places: dict[int, int] = field(default_factory=dict)
    is_greedy: bool = True

    def draws(self, rows: Sequence[StepRow]) -> Columns:
        """The columns for this step of theirs."""
        if self.is_greedy:
            return {"temperature": self.columns["temperature"]}
        positions = [row.sequence_length - row.prompt_length for row in rows if row.sampled_ids]
        return self.columns | {"positions": np.array(positions, dtype=np.int64)}

    def take_over(self, tokens: list[int], highest: npt.NDArray[np.float32]) -> StepResult:
        """The step's result from what the device chose; the sequences' states get their tokens."""
        errors: dict[int, str] = {}
        if not np.isfinite(highest).all():
            for state, value in zip(self.states, highest.tolist(), strict=True):
                error = row_error(state.params, value, value)
                if error is not None:
                    errors[state.sequence_id] = error
        chosen = []
        for state, token_id in zip(self.states, tokens, strict=True):
            if state.sequence_id not in errors:
                state.append(token_id)
                chosen.append(SampledToken(state.sequence_id, token_id))
        return StepResult(tuple(chosen), {}, {}, errors)


class PlainBatches:
    """Tells which steps the device can choose for; what it says of a batch it keeps until another one comes."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._latest: PlainRows | None = PlainRows()
        self._latest_ids: tuple[int, ...] = ()

    def of(self, rows: Sequence[StepRow]) -> PlainRows | None:
        """None for steps with anything that the host has to do, or wants to know beside the tokens."""
        for row in rows:
            if len(row.sampled_ids) > 1 or row.num_candidates or row.logprob_targets or row.pooling is not None:
                return None
        ids = tuple(row.sampled_ids[0] for row in rows if row.sampled_ids)
        if ids != self._latest_ids:
            self._latest_ids = ids
            states = self._sampler.states(ids)
            self._latest = _plain_rows(ids, states, self._sampler.vocab_size) if all(map(_is_plain, states)) else None
        return self._latest


def _is_plain(state: SequenceState) -> bool:
    return (
        not state.is_edited
        and state.failure is None
        and state.params.logprobs is None
        and (state.params.typical_p == 1 or state.params.temperature == 0)
    )


def _plain_rows(ids: tuple[int, ...], states: tuple[SequenceState, ...], vocab_size: int) -> PlainRows:
    params = [state.params for state in states]
    # A temperature that is 0 as a float32 would make another row greedy.
    temperature = [max(p.temperature, _TINY) if p.temperature > 0 else 0 for p in params]
    columns: Columns = {
        "temperature": np.array(temperature, dtype=np.float32),
        "top_k": np.array([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params], dtype=np.int64),
        "top_p": np.array([p.top_p for p in params], dtype=np.float64),
        "min_p": np.array([p.min_p for p in params], dtype=np.float32),
        "seeds": np.array([state.seed for state in states], dtype=np.uint64).view(np.int64),
    }
    places = {sequence_id: place for place, sequence_id in enumerate(ids)}
    return PlainRows(ids, states, columns, places, all(p.temperature == 0 for p in params))


def choose(logits: Tensor, draws: Draws, is_greedy: bool) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [R, V], and the row's highest logit -> int64 [R], float32 [R].

    Rows of temperature 0 get their likeliest token; `is_greedy`: all are such, and nothing else in `draws` counts. The
    tokens are those that Sampler.sample chooses. On a GPU with triton nothing is waited for, which captures need.
    """
    if is_greedy:
        return ops.argmax(logits)
    if logits.is_cuda and ops.has_triton():
        from puna.ops import triton_sampling

        uniform = triton_sampling.uniforms(draws.seeds, draws.positions)
        return triton_sampling.draw(logits, draws.temperature, draws.top_k, draws.top_p, draws.min_p, uniform)
    likeliest, highest = ops.argmax(logits)
    is_drawn = draws.temperature > 0
    vocab_size = logits.shape[1]
    shaping = ops.Shaping(
        temperature=draws.temperature.masked_fill(~is_drawn, 1).unsqueeze(1),
        top_k=draws.top_k.clamp(1, vocab_size).unsqueeze(1),
        top_p=draws.top_p.unsqueeze(1),
        min_p=draws.min_p.unsqueeze(1),
        highest_top_k=vocab_size,
    )
    seeds, positions = (numbers.cpu().numpy().view(np.uint64) for numbers in (draws.seeds, draws.positions))
    drawn, _ = ops.draw(logits, shaping, torch.from_numpy(ops.uniforms(seeds, positions)).to(logits.device))
    return torch.where(is_drawn, drawn, likeliest), highest
