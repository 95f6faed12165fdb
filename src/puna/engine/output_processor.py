"""OutputProcessor: the scheduler's events of one request as text, with stop strings and log-probabilities."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from puna.engine.detokenizer import Detokenizer
from puna.engine.outputs import BeamSequence, CompletionDelta, Logprob, PositionLogprobs, RequestDelta, RequestStart
from puna.engine.stop_strings import StopStrings
from puna.engine.tokenizer import Tokenizer
from puna.scheduling.events import BeamEvent, Event, PromptEvent, SequenceEvent
from puna.scheduling.sequence import FinishReason, Request
from puna.scheduling.step_plan import TokenLogprobs


class _Completion:
    """One sequence's way from tokens to text."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.detokenizer = Detokenizer(tokenizer, request.params.skip_special_tokens)
        for token_id in request.prompt_token_ids[-8:]:
            # What a token's text is depends on the tokens before it: a space, or a character's first bytes.
            self.detokenizer.push(token_id)
        self.stops = StopStrings(tuple(request.params.stop), request.params.include_stop_str_in_output)
        self.num_tokens = 0
        self.finished = False


class OutputProcessor:
    """Takes the events of one request; `stop_sequence` is called to end a sequence at a stop string."""

    def __init__(self, request: Request, tokenizer: Tokenizer, stop_sequence: Callable[[int], None]) -> None:
        self.request = request
        self._tokenizer = tokenizer
        self._stop_sequence = stop_sequence
        count = 0 if request.beams is not None else request.params.n
        self._completions = [_Completion(request, tokenizer) for _ in range(count)]
        self.start: RequestStart | None = None
        self._prompt_logprobs: list[PositionLogprobs | None] = [None] * len(request.prompt_token_ids)
        self._owes_prompt = request.params.prompt_logprobs is not None

    def process(self, events: list[Event]) -> RequestDelta:
        """One delta for what one step brought the request."""
        completions: list[CompletionDelta] = []
        beams: tuple[BeamSequence, ...] | None = None
        embedding: array[float] | None = None
        error: str | None = None
        finished = False
        for event in events:
            if isinstance(event, SequenceEvent):
                if self.start is None and event.sequence.started_at is not None:
                    self.start = RequestStart(event.sequence.started_at, event.sequence.num_cached)
                error = error or event.error
                embedding = event.embedding
                if not self._completions[event.sequence.index].finished:
                    completions.append(self._completion(event))
            elif isinstance(event, PromptEvent):
                first = event.logprobs.first_position
                for offset, position in enumerate(event.logprobs.tokens):
                    self._prompt_logprobs[first + offset] = self._position(position)
            elif isinstance(event, BeamEvent):
                finished = True
                error = error or event.error
                if error is None and event.finish_reason != "stop":
                    error = f"the beam search ended before it was done: {event.finish_reason}"
                beams = tuple(
                    BeamSequence(list(b.token_ids), b.cum_logprob, b.score, self._text(b.token_ids))
                    for b in event.beams
                )
        if self.request.beams is None:
            finished = error is not None or all(completion.finished for completion in self._completions)
        # The prompt's come once, as soon as all of them are known; nothing predicts its first token.
        tells_prompt = self._owes_prompt and (finished or all(self._prompt_logprobs[1:]))
        self._owes_prompt = self._owes_prompt and not tells_prompt
        return RequestDelta(
            self.request.request_id,
            tuple(completions),
            tuple(self._prompt_logprobs) if tells_prompt else None,
            beams,
            finished,
            error,
            self.start,
            embedding,
        )

    def _completion(self, event: SequenceEvent) -> CompletionDelta:
        completion = self._completions[event.sequence.index]
        reason: FinishReason | None = event.finish_reason
        stop_reason: str | int | None = None
        text = ""
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[PositionLogprobs, ...] = ()
        if event.token_id is not None:
            token_ids = (event.token_id,)
            completion.num_tokens += 1
            logprobs = () if event.logprobs is None else (self._position(event.logprobs),)
            if reason == "stop":
                if event.token_id not in self.request.eos_token_ids:
                    stop_reason = event.token_id
            else:
                text = self._push(completion, completion.detokenizer.push(event.token_id))
        if reason is not None and not completion.stops.found:
            text += self._push(completion, completion.detokenizer.flush())
            if not completion.stops.found:
                text += completion.stops.flush()
        if completion.stops.found:
            reason, stop_reason = "stop", completion.stops.found_string
            self._stop_sequence(event.sequence.sequence_id)
        completion.finished = reason is not None
        return CompletionDelta(event.sequence.index, text, token_ids, logprobs, reason, stop_reason)

    def _push(self, completion: _Completion, text: str) -> str:
        if completion.num_tokens <= self.request.params.min_tokens:
            return completion.stops.skip(text)
        return completion.stops.push(text)

    def _position(self, position: TokenLogprobs) -> PositionLogprobs:
        found = {token: Logprob(value, i + 1, self._text((token,))) for i, (token, value) in enumerate(position.top)}
        # The chosen token comes first, and has its true rank even where it ties with others.
        chosen = Logprob(position.logprob, position.rank, self._text((position.token_id,)))
        return {position.token_id: chosen} | {t: v for t, v in found.items() if t != position.token_id}

    def _text(self, token_ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self.request.params.skip_special_tokens)
