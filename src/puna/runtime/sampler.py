"""Sampler: a next token for each sequence of a batch, each by its own SamplingParams, in one pass over the logits.

The order is transformers' where it has a step, and vLLM's elsewhere: logit_bias, repetition_penalty, then frequency
and presence penalties, allowed_token_ids, bans (bad_words, no_repeat_ngram_size, min_tokens), logits_processors,
the grammar; and for rows that are not greedy temperature, top_k, top_p, min_p, typical_p, and the draw. The grammar
comes after the processors, so that no processor can lead out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.ops import cpu
from puna.runtime import sampling_ops as ops
from puna.runtime.logit_edits import Entries, edit, entries
from puna.runtime.logprobs import candidates, token_logprobs
from puna.runtime.sequence_state import GrammarSource, Matcher, SequenceState
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.step_plan import NewSequence, SampledToken, TokenLogprobs, Unsatisfiable

__all__ = [
    "GrammarSource",
    "Matcher",
    "SampleOutput",
    "Sampler",
    "candidates",
    "row_error",
    "token_logprobs",
    "validate",
]

# Logits that are worked on at a time. Where torch does that on the CPU, two rows of 128k, or eight of 32k: 1 MiB, so
# that each step finds in the cache what the one before wrote. Measured: 2**19 and more take up to twice as long for
# top-p, 2**17 no less. The compiled kernels go over one row after another anyway.
CHUNK_ELEMENTS_ON_CPU: Final = 1 << 18
CHUNK_ELEMENTS_ELSEWHERE: Final = 1 << 25


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """The chosen tokens, in the order of the rows. Sequences that got none are in `errors`, with the reason."""

    tokens: tuple[SampledToken, ...]
    errors: dict[int, str]


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError for token ids outside of the vocabulary, and for logits processors that can't be called."""
    given = (
        ("logit_bias", tuple(params.logit_bias)),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("stop_token_ids", params.stop_token_ids),
    )
    for name, token_ids in given:
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise ValueError(f"{name} has the token id {token_id!r}: the model's are 0 to {vocab_size - 1}")
    for processor in params.logits_processors:
        if not callable(processor):
            raise ValueError(f"logits_processors has {processor!r}: each must be a function (token ids, logits)")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of a batch that are worked on together, with what stays the same while the batch does.

    `rows` index the logits. `states` belong to them, in order. `shaping` is None for greedy rows. `is_edited`: some
    logits are changed before the choice; `bias` and `allowed` say how.
    """

    rows: slice | Tensor
    states: tuple[SequenceState, ...]
    is_edited: bool
    shaping: ops.Shaping | None
    seeds: NDArray[np.uint64]
    bias: Entries | None
    allowed: Entries | None


class Sampler:
    """Keeps the tokens of each sequence, and appends what it chooses.

    A draw depends on the sequence's seed, its number of output tokens, its params and its row of logits alone: not on
    the other rows, their order, or earlier draws.
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", grammars: GrammarSource | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._grammars = grammars
        self._states: dict[int, SequenceState] = {}
        self._batch_ids: tuple[int, ...] = ()
        self._chunks: tuple[_Chunk, ...] = ()

    def add(self, new: NewSequence) -> None:
        """A sequence begins. If its grammar can't be had, that is its error when it is sampled."""
        state = SequenceState(new, self.vocab_size)
        if new.params.guided is not None:
            try:
                if self._grammars is None:
                    raise ValueError("this engine has no grammars")
                state.matcher = self._grammars.matcher(new.params.guided)
            except ValueError as error:
                state.failure = f"guided decoding can't start: {error}"
        self._states[new.sequence_id] = state
        self._forget_batch()

    def remove(self, sequence_id: int) -> None:
        """A sequence has ended. Without effect for one that is not here."""
        if self._states.pop(sequence_id, None) is not None:
            self._forget_batch()

    def states(self, sequence_ids: Sequence[int]) -> tuple[SequenceState, ...]:
        """What is known of these sequences."""
        return tuple(self._states[sequence_id] for sequence_id in sequence_ids)

    def last_tokens(self, sequence_ids: Sequence[int]) -> list[int]:
        """The token that each sequence ends with now."""
        return [self._states[sequence_id].token_ids[-1] for sequence_id in sequence_ids]

    @torch.no_grad()
    def sample(self, logits: Tensor, sequence_ids: Sequence[int]) -> SampleOutput:
        """Chooses the next token of each of R different sequences from logits [R, V], which stay as they are.

        A sequence is in `errors` instead if its logits are NaN or infinite, everything is ruled out, or its logits
        processor or grammar fails; the others go on.
        """
        if logits.shape != (len(sequence_ids), self.vocab_size):
            raise ValueError(
                f"logits are {tuple(logits.shape)} for {len(sequence_ids)} sequences of {self.vocab_size} tokens"
            )
        logits = logits.float()
        if tuple(sequence_ids) != self._batch_ids:
            self._batch_ids = tuple(sequence_ids)
            self._chunks = self._split([self._states[sequence_id] for sequence_id in sequence_ids])
        chosen = torch.empty(len(sequence_ids), dtype=torch.int64, device=logits.device)
        # The highest logit of each row: of the model, and after the edits.
        highest = torch.empty(2, len(sequence_ids), device=logits.device)
        errors: dict[int, str] = {}
        for chunk in self._chunks:
            x = logits[chunk.rows]
            if chunk.is_edited:
                highest[0, chunk.rows] = x.amax(dim=1)
                # A slice is the caller's own memory.
                x = x.clone() if isinstance(chunk.rows, slice) else x
                errors.update(edit(x, chunk.states, chunk.bias, chunk.allowed))
            if chunk.shaping is None:
                tokens, best = ops.argmax(x)
            else:
                positions = np.array([state.num_output_tokens for state in chunk.states], dtype=np.uint64)
                uniform = torch.from_numpy(ops.uniforms(chunk.seeds, positions)).to(x.device)
                tokens, best = ops.draw(x, chunk.shaping, uniform)
            chosen[chunk.rows], highest[1, chunk.rows] = tokens, best
            if not chunk.is_edited:
                highest[0, chunk.rows] = best
        return self._take_over(logits, chosen, highest, errors)

    def _take_over(self, logits: Tensor, chosen: Tensor, highest: Tensor, errors: dict[int, str]) -> SampleOutput:
        """Appends the tokens of the rows in which all went well, and adds their log-probabilities."""
        states = [self._states[sequence_id] for sequence_id in self._batch_ids]
        token_ids: list[int] = chosen.tolist()
        of_model, after_edits = highest.tolist()
        good: list[int] = []
        for row, state in enumerate(states):
            error = state.failure or errors.get(state.sequence_id)
            error = error or row_error(state.params, of_model[row], after_edits[row])
            if error is None and state.matcher is not None:
                try:
                    state.matcher.advance(token_ids[row])
                except ValueError as reason:
                    error = f"guided decoding can't go on: {reason}"
            if error is None:
                state.append(token_ids[row])
                good.append(row)
            else:
                errors[state.sequence_id] = error
        logprobs: dict[int, TokenLogprobs] = {}
        reported = [row for row in good if states[row].params.logprobs is not None]
        if reported:
            rows = torch.tensor(reported, device=logits.device)
            most = max(states[row].params.logprobs or 0 for row in reported)
            for row, found in zip(reported, token_logprobs(logits[rows], chosen[rows], most), strict=True):
                logprobs[row] = found._replace(top=found.top[: states[row].params.logprobs])
        tokens = (SampledToken(states[row].sequence_id, token_ids[row], logprobs.get(row)) for row in good)
        return SampleOutput(tuple(tokens), errors)

    def _forget_batch(self) -> None:
        self._batch_ids, self._chunks = (), ()

    def _split(self, states: list[SequenceState]) -> tuple[_Chunk, ...]:
        """Like rows beside each other, in chunks of a size; rows that differ in kind never share a chunk."""
        kinds = [_kind(state, self.vocab_size) for state in states]
        order = sorted(range(len(states)), key=lambda row: (kinds[row], _steps(states[row].params)))
        chunks: list[_Chunk] = []
        rows: list[int] = []
        for row in order:
            if rows and (kinds[row] != kinds[rows[0]] or len(rows) == self._chunk_rows(kinds[row])):
                chunks.append(self._chunk(rows, states))
                rows = []
            rows.append(row)
        if rows:
            chunks.append(self._chunk(rows, states))
        return tuple(chunks)

    def _chunk_rows(self, kind: _Kind) -> int:
        is_small = self.device.type == "cpu" and not (cpu.compiled() and kind.is_kernels)
        elements = CHUNK_ELEMENTS_ON_CPU if is_small else CHUNK_ELEMENTS_ELSEWHERE
        return max(1, elements // self.vocab_size)

    def _chunk(self, rows: list[int], states: list[SequenceState]) -> _Chunk:
        own = tuple(states[row] for row in rows)
        is_range = rows == list(range(rows[0], rows[0] + len(rows)))
        params = [state.params for state in own]
        return _Chunk(
            rows=slice(rows[0], rows[-1] + 1) if is_range else torch.tensor(rows, device=self.device),
            states=own,
            is_edited=own[0].is_edited,
            shaping=None if params[0].temperature == 0 else _shaping(params, self.vocab_size, self.device),
            seeds=np.array([state.seed for state in own], dtype=np.uint64),
            bias=entries([p.logit_bias for p in params], self.device),
            allowed=entries([dict.fromkeys(p.allowed_token_ids or (), 0.0) for p in params], self.device),
        )


class _Kind(NamedTuple):
    """Rows of different kinds take different paths."""

    is_edited: bool
    is_drawn: bool
    is_narrow: bool
    is_typical: bool

    @property
    def is_kernels(self) -> bool:
        """Whether nothing but the compiled kernels goes over a row."""
        return not (self.is_edited or self.is_typical)


def _kind(state: SequenceState, vocab_size: int) -> _Kind:
    params = state.params
    if params.temperature == 0:
        return _Kind(state.is_edited, False, False, False)
    is_narrow = ops.is_narrow_top_k(params.top_k, vocab_size)
    return _Kind(state.is_edited, True, is_narrow, params.typical_p < 1)


def _steps(params: SamplingParams) -> tuple[bool, ...]:
    """The steps that a row wants: rows that want the same should share chunks, so that others skip them."""
    return (params.top_k > 0, params.top_p < 1, params.min_p > 0)


def _shaping(params: list[SamplingParams], vocab_size: int, device: torch.device) -> ops.Shaping:
    def column(values: list[float], dtype: torch.dtype, neutral: float) -> Tensor | None:
        if all(value == neutral for value in values):
            return None
        return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device).unsqueeze(1)
    return ops.Shaping(
        # A temperature that is 0 as a float32 would make 0 / 0 of the highest logit.
        temperature=temperature.clamp_(min=torch.finfo(torch.float32).tiny),
        top_k=column([float(k) for k in top_k], torch.int64, vocab_size),
        top_p=column([p.top_p for p in params], torch.float64, 1),
        min_p=column([p.min_p for p in params], torch.float32, 0),
        typical_p=column([p.typical_p for p in params], torch.float64, 1),
        highest_top_k=max((k for k in top_k if k < vocab_size), default=0),
        is_narrow=all(ops.is_narrow_top_k(k, vocab_size) for k in top_k),
    )


def row_error(params: SamplingParams, of_model: float, after_edits: float) -> str | None:
    """What is wrong with a row, told by its highest logit before and after the edits."""
    if not of_model < float("inf"):
        return "the model's logits are NaN or infinite"
    if of_model == -float("inf"):
        return "the model's logits are all -inf"
    if not after_edits < float("inf"):
        return "the logits processors returned logits that are NaN or infinite"
    if after_edits > -float("inf"):
        return None
    names = ("allowed_token_ids", "bad_words", "no_repeat_ngram_size", "min_tokens", "logits_processors", "guided")
    given = ", ".join(name for name in names if getattr(params, name))
    return Unsatisfiable(f"every token is ruled out by {given}: loosen them")
