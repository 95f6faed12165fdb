"""RequestRecord, what the log tells of one HTTP request; and RequestMeter, which fills it and the metrics."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from puna.engine.outputs import RequestDelta, RequestStart
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.sequence import FinishReason
from puna.scheduling.step_plan import Unsatisfiable
from puna.serving.metrics import FinishedRequest, Metrics

UNENFORCEABLE: Final = "unenforceable_constraint"  # the code of what can't be held to, found before or on the way
_REQUEST_ID: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's own, where it is one that a log can have, or a new one. Names are in lower case."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Lives as long as the HTTP request. `arrived` is a time of `time.monotonic`; counts are over all its prompts and
    continuations, times those of the prompt that came first. Never a text: it goes into the log.
    """

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    finish_reasons: list[FinishReason] = field(default_factory=list)
    error: str | None = None

    def fields(self) -> dict[str, Any]:
        """For the log; only what there is."""
        found: dict[str, Any] = {"request_id": self.request_id}
        if self.error is not None:
            found["error"] = self.error
        if self.model is not None:
            found |= {
                "model": self.model,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "generated_tokens": self.generated_tokens,
                "queue_seconds": _rounded(self.queue_seconds),
                "first_token_seconds": _rounded(self.first_token_seconds),
                "finish_reason": ",".join(dict.fromkeys(self.finish_reasons)) or None,
            }
        return found


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


@dataclass(slots=True)
class _Prompt:
    num_tokens: int
    num_running: int
    submitted: float
    start: RequestStart | None = None
    first: float | None = None
    # By continuation: when its last token came, and how many there were.
    last: dict[int, float] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)


class RequestMeter:
    """Of the prompts of one HTTP request that the engine has taken. Called in the event loop, with every delta as it
    comes: a client that reads slowly, or has left, changes nothing of what is counted."""

    def __init__(self, metrics: Metrics, record: RequestRecord, params: SamplingParams) -> None:
        self._metrics = metrics
        self._record = record
        self._params = params
        self._prompts: dict[int, _Prompt] = {}
        self._left: set[int] = set()

    def submitted(self, index: int, prompt: Sequence[int], at: float) -> None:
        """`at` is a time of `time.monotonic` from before the engine got the prompt: it may be planned at once."""
        self._prompts[index] = _Prompt(len(prompt), self._params.n, at)
        self._record.prompt_tokens += len(prompt)

    def left(self, index: int) -> None:
        """The client has gone, or another of its prompts has failed, while this one runs."""
        if self._prompts[index].num_running > 0:  # else it is over, and nobody has read its end
            self._left.add(index)
            self._record.finish_reasons.append("abort")

    def took(self, index: int, delta: RequestDelta, now: float) -> None:
        prompt, record = self._prompts[index], self._record
        if prompt.start is None and delta.start is not None:
            prompt.start = delta.start
            record.cached_tokens += delta.start.num_cached_tokens
            if record.queue_seconds is None:
                record.queue_seconds = delta.start.time - prompt.submitted
        for completion in delta.completions:
            if completion.token_ids:
                self._tokens(prompt, completion.index, len(completion.token_ids), now)
            if completion.finish_reason is not None:
                prompt.num_running -= 1
                self._metrics.ended(completion.finish_reason)
                if index not in self._left:
                    record.finish_reasons.append(completion.finish_reason)
        if delta.embedding is not None:  # what there is in place of a first token
            prompt.first = prompt.last[0] = now
            self._metrics.embedded(prompt.num_tokens)
        if delta.finished:
            self._finished(prompt, delta, now)

    def _tokens(self, prompt: _Prompt, index: int, count: int, now: float) -> None:
        record, before = self._record, prompt.last.get(index)
        if prompt.first is None:
            prompt.first = now
            self._metrics.first_token(now - record.arrived, prompt.num_tokens)
            if record.first_token_seconds is None:
                record.first_token_seconds = now - record.arrived
        self._metrics.tokens(count, None if before is None else now - before)
        prompt.last[index] = now
        prompt.generated[index] = prompt.generated.get(index, 0) + count
        record.generated_tokens += count

    def _finished(self, prompt: _Prompt, delta: RequestDelta, now: float) -> None:
        if delta.error is not None:
            self._record.error = UNENFORCEABLE if isinstance(delta.error, Unsatisfiable) else "engine_error"
            for _ in range(prompt.num_running):
                self._metrics.ended("error")
                self._record.finish_reasons.append("error")
            prompt.num_running = 0
            return
        if any(completion.finish_reason == "abort" for completion in delta.completions):
            return
        if prompt.start is None or prompt.first is None:  # out of time before it had a token
            return
        self._metrics.finished(
            FinishedRequest(
                prompt_tokens=prompt.num_tokens,
                generated=tuple(prompt.generated.get(index, 0) for index in range(self._params.n)),
                max_tokens=None if delta.embedding is not None else self._params.max_tokens,
                whole=now - self._record.arrived,
                queue=max(0.0, prompt.start.time - prompt.submitted),
                prefill=prompt.first - prompt.start.time,
                decode=max(prompt.last.values()) - prompt.first,
            )
        )
