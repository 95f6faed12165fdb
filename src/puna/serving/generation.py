"""Generation: the engine's requests behind one HTTP request, as parts that come one after the other."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from puna.engine.engine import Engine, Listener, PromptTooLongError
from puna.engine.outputs import CompletionDelta, CompletionOutput, RequestDelta, RequestOutput
from puna.runtime.guided import UnenforceableError
from puna.scheduling.pooling_params import PoolingParams
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import QueueFullError
from puna.scheduling.step_plan import Unsatisfiable
from puna.serving.errors import ApiError, bad_request
from puna.serving.protocol import EngineRequest, SamplingRequest
from puna.serving.record import UNENFORCEABLE, RequestMeter, RequestRecord
from puna.serving.state import ServerState

if TYPE_CHECKING:
    from typing_extensions import Self


# Which prompt's, and what.
_Arrival = tuple[int, RequestDelta]


@dataclass(slots=True)  # not frozen: see CompletionDelta
class Part:
    """What came for one continuation of one prompt. Deltas that had come meanwhile are joined into one."""

    prompt_index: int
    completion: CompletionDelta


class Generation:
    """Submits one engine request for each prompt; leaving `async with` cancels what still runs.

    Not AsyncEngine.generate: a server must know that a request was taken before it sends the head of its answer, and
    must be able to say something while a long prompt is computed.
    """

    def __init__(
        self,
        state: ServerState,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        request: EngineRequest,
        record: RequestRecord,
        pooling: PoolingParams | None = None,
    ) -> None:
        self._state = state
        self._engine = state.ready_engine()
        self._params = params
        self._request = request
        self._pooling = pooling
        self._arrivals: list[_Arrival] = []
        # What `parts` waits for: True says that something has arrived, False that nothing has for too long.
        self._waiter: asyncio.Future[bool] | None = None
        self._keep_alive: asyncio.TimerHandle | None = None
        self._waits_since = 0.0
        self._wants_end_only = False
        self._record = record
        self._meter = RequestMeter(state.metrics, record, params)
        record.model = state.settings.model_name
        self._names: dict[int, str] = {}  # those that run
        self.outputs = [
            RequestOutput("", None, list(prompt), [CompletionOutput(index) for index in range(params.n)])
            for prompt in prompts
        ]

    async def start(self) -> Self:
        """Submits. Raises ApiError for what the engine refuses, and then leaves nothing behind."""
        request, engine = self._request, self._engine
        stem = f"{self._record.request_id}-{uuid.uuid4().hex[:8]}"  # clients may give one id to several requests
        try:
            await self._compile()
            for index, output in enumerate(self.outputs):
                self._meter.submitted(index, output.prompt_token_ids, time.monotonic())
                output.request_id = engine.submit(
                    output.prompt_token_ids,
                    self._params,
                    self._listener(index),
                    request_id=f"{stem}-{index}",
                    priority=request.priority or 0,
                    timeout=request.deadline,
                    cache_salt=request.cache_salt or "",
                    pooling=self._pooling,
                )
                self._names[index] = output.request_id
        except QueueFullError as error:
            self.cancel()
            raise ApiError(
                429,
                str(error),
                kind="rate_limit_error",
                code="queue_full",
                retry_after=self._state.seconds_to_room(),
            ) from None
        except PromptTooLongError:
            self.cancel()
            count, remedy = len(output.prompt_token_ids), "shorten it, so that there is room for an answer"
            raise too_long("the prompt", count, engine.max_model_len, self._prompt_field, remedy) from None
        except ValueError as error:
            self.cancel()
            refused = refusal(error)
            if refused.message.startswith("the prompt "):
                refused.param = self._prompt_field
            raise refused from None
        except RuntimeError:
            self.cancel()
            raise engine_error() from None
        return self

    @property
    def _prompt_field(self) -> str:
        return "messages" if "messages" in type(self._request).model_fields else "prompt"

    @property
    def _constraint(self) -> str:
        """The field that constrains the output, where one does."""
        return next(iter(self._request.constraints), "tools")

    async def _compile(self) -> None:
        """Kept by the compiler, so that submit only looks it up."""
        if self._params.guided is None:
            return
        field = self._constraint
        try:
            await asyncio.to_thread(self._engine.parts.grammars.compile, self._params.guided)
        except UnenforceableError as error:
            raise ApiError(422, str(error), param=field, code=UNENFORCEABLE) from None
        except ValueError as error:
            raise bad_request(str(error), field) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends what still runs; its blocks are free before the next step."""
        for index, name in self._names.items():
            self._meter.left(index)
            self._engine.cancel(name)
        self._names.clear()
        if self._keep_alive is not None:
            self._keep_alive.cancel()

    async def parts(self, keep_alive: float | None = None) -> AsyncIterator[Part | None]:
        """What comes, until all is there; None after each `keep_alive` seconds of nothing. Raises ApiError."""
        if keep_alive is not None:
            self._watch(keep_alive)
        while self._names:
            if not self._arrivals and not await self._arrival():
                yield None
                continue
            batch, self._arrivals = self._arrivals, []  # a slow reader gets all that came at once
            for part in _joined(self._take(batch)):
                yield part

    async def finish(self) -> list[RequestOutput]:
        """The whole outputs."""
        self._wants_end_only = True
        async for _ in self.parts():
            pass
        return self.outputs

    def _take(self, batch: list[_Arrival]) -> list[Part]:
        parts: list[Part] = []
        for index, delta in batch:
            if isinstance(delta.error, Unsatisfiable):
                param = None if self._params.guided is None else self._constraint
                raise ApiError(422, str(delta.error), param=param, code=UNENFORCEABLE)
            try:
                self.outputs[index].add(delta)
            except RuntimeError:
                raise engine_error() from None
            if delta.finished:
                self._names.pop(index, None)
                self._state.count_ended()
            for completion in delta.completions:
                if completion.finish_reason in ("abort", "error"):
                    raise ApiError(
                        503, "the server is shutting down", kind="service_unavailable", code="engine_stopped"
                    )
                parts.append(Part(index, completion))
        return parts

    def _listener(self, index: int) -> Listener:
        call = self._state.handover.call

        def arrived(delta: RequestDelta, now: float) -> None:
            self._meter.took(index, delta, now)
            self._arrivals.append((index, delta))
            if delta.finished or not self._wants_end_only:
                self._wake(True)

        def listen(delta: RequestDelta) -> None:
            call(arrived, delta, time.monotonic())

        return listen

    async def _arrival(self) -> bool:
        """Waits; False where nothing came for as long as `_watch` was told. A timer for each token would cost more
        than the rest of its way."""
        loop = asyncio.get_running_loop()
        self._waits_since = loop.time()
        self._waiter = loop.create_future()
        return await self._waiter

    def _wake(self, arrived: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(arrived)

    def _watch(self, seconds: float) -> None:
        """Looks now and then whether `parts` has been waiting for so long, until this is cancelled."""
        loop = asyncio.get_running_loop()
        left = self._waits_since + seconds - loop.time() if self._waits_since else seconds
        if left <= 0:
            self._wake(False)
            left = seconds
        self._keep_alive = loop.call_later(left, self._watch, seconds)


def _joined(parts: list[Part]) -> list[Part]:
    if len(parts) < 2:
        return parts
    found: dict[tuple[int, int], Part] = {}
    for part in parts:
        key = part.prompt_index, part.completion.index
        before = found.get(key)
        if before is not None:
            a, b = before.completion, part.completion
            joined = CompletionDelta(
                a.index, a.text + b.text, a.token_ids + b.token_ids, a.logprobs + b.logprobs, b.finish_reason,
                b.stop_reason,
            )  # fmt: skip
            part = Part(part.prompt_index, joined)
        found[key] = part
    return list(found.values())


def refusal(error: ValueError) -> ApiError:
    """The engine's own words, with the field where they begin with its name."""
    message = str(error)
    word = message.partition(" ")[0]
    fields = SamplingRequest.model_fields
    return bad_request(message, word if word in fields else None)


def too_long(what: str, count: int, limit: int, param: str, remedy: str) -> ApiError:
    """With OpenAI's code and in the words by which litellm and LangChain know that the context is too short."""
    message = f"{what} is too long: this model's maximum context length is {limit} tokens, and it has {count}: {remedy}"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def engine_error() -> ApiError:
    """What went wrong is in the log; clients get no insides."""
    return ApiError(500, "the engine failed on this request", kind="server_error", code="engine_error")


async def encoded(engine: Engine, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    try:
        return await asyncio.to_thread(engine.parts.tokenizer.encode, prompt, add_special_tokens)
    except ValueError as error:
        raise bad_request(str(error), "prompt") from None
