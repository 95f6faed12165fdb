"""What an engine gives back: deltas as they come, and outputs that add them up, under vLLM's names."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from puna.scheduling.sequence import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability in the model's own distribution; `rank` 1 is the likeliest."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# For one position: the chosen (or given) token and the likeliest ones, by id.
PositionLogprobs = dict[int, Logprob]


# Not frozen, nor is RequestDelta: there is one for each token, and to make a frozen one takes four times as long.
@dataclass(slots=True)
class CompletionDelta:
    """What one step added to one of a request's sequences.

    `text` may be empty while a character is incomplete, or may yet become a stop string. `stop_reason`: the stop string
    or stop token that ended it; None for the end of sequence.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class BeamSequence:
    """`token_ids` are the generated ones. `score` is `cum_logprob` / (number of tokens) ** length_penalty."""

    token_ids: list[int]
    cum_logprob: float
    score: float
    text: str


@dataclass(frozen=True, slots=True)
class RequestStart:
    """When a request was first planned, as a time of `time.monotonic`, and how much of its prompt was cached then."""

    time: float
    num_cached_tokens: int


@dataclass(slots=True)
class RequestDelta:
    """What one step brought a request. `error` is why it failed; `finished`: nothing more will come.

    `start` is there from the first delta on, but for beams and where the request ended before it was planned.
    `embedding`, float32 [E], is that of a prompt that was to be pooled.
    """

    request_id: str
    completions: tuple[CompletionDelta, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    beams: tuple[BeamSequence, ...] | None = None
    finished: bool = False
    error: str | None = None
    start: RequestStart | None = None
    embedding: array[float] | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the n continuations of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request with all that came so far. `prompt_logprobs` has None for the first token, which nothing predicts."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
    embedding: array[float] | None = None

    def add(self, delta: RequestDelta) -> None:
        """Takes a delta in. Raises RuntimeError where it says that the request failed."""
        if delta.error is not None:
            raise RuntimeError(f"request {self.request_id}: {delta.error}")
        for part in delta.completions:
            output = self.outputs[part.index]
            output.text += part.text
            output.token_ids += part.token_ids
            output.finish_reason, output.stop_reason = part.finish_reason, part.stop_reason
            for token_id, position in zip(part.token_ids, part.logprobs, strict=False):
                output.logprobs = [] if output.logprobs is None else output.logprobs
                output.logprobs.append(position)
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + position[token_id].logprob
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        if delta.embedding is not None:
            self.embedding = delta.embedding
        self.finished = delta.finished


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSequence]
