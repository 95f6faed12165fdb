"""Events: what the scheduler tells of, step by step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from puna.scheduling.beams import FinishedBeam
from puna.scheduling.sequence import FinishReason, Request, Sequence
from puna.scheduling.step_plan import PromptLogprobs, TokenLogprobs


@dataclass(slots=True)  # not frozen: there is one for each token, and to make a frozen one takes four times as long
class SequenceEvent:
    """What a step brought one sequence: a token, or an end without one. `error` says why, for finish_reason "error".

    `embedding`, float32 [E], is of a prompt that was to be pooled, whose end it is.
    """

    sequence: Sequence
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    embedding: array[float] | None = None

    @property
    def request(self) -> Request:
        return self.sequence.request


@dataclass(frozen=True, slots=True)
class BeamEvent:
    """The end of a beam search: the finished beams, best first; all of them where the reason is "stop"."""

    request: Request
    beams: tuple[FinishedBeam, ...]
    finish_reason: FinishReason = "stop"
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log-probabilities of a part of a prompt."""

    request: Request
    logprobs: PromptLogprobs


Event = SequenceEvent | BeamEvent | PromptEvent
