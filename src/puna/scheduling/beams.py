"""Beam search as bookkeeping: which beams go on, which are finished, and when no better one can come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """Beam search with the rules of transformers. Raises ValueError for values out of range.

    A finished beam's score is its log-probability divided by (generated tokens) ** length_penalty. early_stopping: True
    ends when `width` beams are finished, False when a better one is unlikely, "never" when it is impossible.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"beam_width is {self.width}: it must be at least 1")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}: it must be True, False or 'never'")


class FinishedBeam(NamedTuple):
    """`token_ids` are the generated ones, the end-of-sequence token included."""

    token_ids: tuple[int, ...]
    cum_logprob: float
    score: float


class Continuation(NamedTuple):
    """A beam that goes on: the place of its parent among the running ones, its next token and its log-probability."""

    parent: int
    token_id: int
    cum_logprob: float


class BeamSearch:
    """The state of one prompt's search. `advance` is called once a step with the candidates of every running beam."""

    def __init__(self, params: BeamParams, eos_token_ids: frozenset[int], max_tokens: int) -> None:
        self.params = params
        self._eos_token_ids = eos_token_ids
        self._max_tokens = max_tokens
        self._running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        self.finished: list[FinishedBeam] = []

    @property
    def num_candidates(self) -> int:
        """How many of its likeliest next tokens each beam must bring: enough though every other one may end in eos."""
        return max(2, 1 + len(self._eos_token_ids)) * self.params.width

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[Continuation]:
        """The beams that go on, best first; an empty list ends the search, whose results are in `finished`.

        candidates: for each running beam, (token, log-probability) of its likeliest next tokens, best first.
        """
        length = len(self._running[0][0]) + 1
        ranked = [
            Continuation(parent, token, cum_logprob + logprob)
            for parent, ((_, cum_logprob), tokens) in enumerate(zip(self._running, candidates, strict=True))
            for token, logprob in tokens
        ]
        # Python's sort is stable: equals stay in the order of their beams, as in a flat top-k over all of them.
        ranked.sort(key=lambda continuation: -continuation.cum_logprob)
        ranked = ranked[: self.num_candidates]
        is_last = length >= self._max_tokens
        going_on: list[Continuation] = []
        for rank, continuation in enumerate(ranked):
            if not is_last and continuation.token_id not in self._eos_token_ids:
                going_on.append(continuation)
            elif rank < self.params.width:  # the others are there only to go on in the place of finished ones
                tokens = (*self._running[continuation.parent][0], continuation.token_id)
                score = continuation.cum_logprob / length**self.params.length_penalty
                self.finished.append(FinishedBeam(tokens, continuation.cum_logprob, score))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.params.width]
        going_on = going_on[: self.params.width]
        if not going_on or self._is_done(going_on[0].cum_logprob, length):
            return []
        self._running = [
            ((*self._running[continuation.parent][0], continuation.token_id), continuation.cum_logprob)
            for continuation in going_on
        ]
        return going_on

    def _is_done(self, best_running: float, length: int) -> bool:
        """Whether no running beam can, or is likely to, take the place of a finished one."""
        if len(self.finished) < self.params.width:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self._max_tokens
        return bool(best_running / length**self.params.length_penalty <= self.finished[-1].score)
