"""RequestTrace: a listener's deltas as states of its request in a trace: queued, prefill, decode."""

from __future__ import annotations

import time
from collections.abc import Callable

from puna.engine.outputs import RequestDelta
from puna.runtime.tracing import Tracer
from puna.scheduling.sequence import Request

_QUEUED, _PREFILL, _DECODE = "queued", "prefill", "decode"


class RequestTrace:
    """Stands before a request's listener. The request's own span has its states within it, one after another."""

    def __init__(self, tracer: Tracer, request: Request, listener: Callable[[RequestDelta], None]) -> None:
        self._tracer = tracer
        self._id = request.request_id
        self._listener = listener
        self._state = _QUEUED
        self._since = time.monotonic()
        self._num_generated = 0
        self._name = f"request {self._id}"
        tracer.begin(self._id, self._name, self._since, {"prompt_tokens": len(request.prompt_token_ids)})
        tracer.begin(self._id, _QUEUED, self._since)

    def __call__(self, delta: RequestDelta) -> None:
        if delta.start is not None and self._state == _QUEUED:
            self._change(_PREFILL, delta.start.time, {"cached_tokens": delta.start.num_cached_tokens})
        count = sum(len(completion.token_ids) for completion in delta.completions)
        if count > 0 and self._state == _PREFILL:
            self._change(_DECODE, time.monotonic())
        self._num_generated += count
        if delta.finished:
            now = time.monotonic()
            reasons = dict.fromkeys(one.finish_reason for one in delta.completions if one.finish_reason is not None)
            ending = {"generated_tokens": self._num_generated, "finish_reason": ",".join(reasons) or None}
            self._tracer.end(self._id, self._state, now)
            self._tracer.end(self._id, self._name, now, ending)
        self._listener(delta)

    def _change(self, state: str, at: float, args: dict[str, object] | None = None) -> None:
        # The plan that took it may have been begun a moment before the request was told to be there.
        at = max(at, self._since)
        self._tracer.end(self._id, self._state, at)
        self._tracer.begin(self._id, state, at, args or {})
        self._state, self._since = state, at
