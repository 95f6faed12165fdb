"""AsyncEngine: an engine for asyncio programs, with an async iterator for each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from puna.engine.engine import Engine
from puna.engine.outputs import CompletionOutput, RequestDelta, RequestOutput
from puna.scheduling.pooling_params import Pooling
from puna.scheduling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class AsyncEngine:
    """Wraps an engine that runs in threads of its own; leaving `async with` shuts it down."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's output each time that it has grown; it is the same object, added to.

        Closing the iterator, or cancelling the task that awaits it, cancels the request at once. Raises what
        `Engine.submit` raises, and RuntimeError when the request fails on its way.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[RequestDelta] = asyncio.Queue()

        def listener(delta: RequestDelta) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        # Both may take a while, and neither leaves anything behind if this task is cancelled meanwhile.
        parts = self.engine.parts
        encoded = await asyncio.to_thread(parts.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
        token_ids = list(encoded)
        if params.guided is not None:
            await asyncio.to_thread(parts.grammars.compile, params.guided)  # kept, so that submit only looks it up
        name = self.engine.submit(
            token_ids,
            params,
            listener,
            request_id=request_id,
            priority=priority,
            timeout=timeout,
            cache_salt=cache_salt,
        )
        output = RequestOutput(
            name,
            prompt if isinstance(prompt, str) else None,
            token_ids,
            [CompletionOutput(index) for index in range(params.n)],
        )
        try:
            while not output.finished:
                output.add(await deltas.get())
                while not deltas.empty():  # a slow reader gets all that came at once
                    output.add(deltas.get_nowait())
                yield output
        finally:
            if not output.finished:  # else the name may be another request's by now
                self.engine.cancel(name)

    async def embed(
        self,
        prompt: str | Sequence[int],
        pooling: Pooling | None = None,
        normalize: bool = True,
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> Tensor:
        """The prompt's embedding, float32 [E]; see `LLM.embed`.

        Cancelling the task that awaits it cancels the request at once. Raises what `Engine.submit` raises, TimeoutError
        where the request ran out of time, and RuntimeError when it fails on its way.
        """
        loop = asyncio.get_running_loop()
        last: asyncio.Future[RequestDelta] = loop.create_future()

        def finish(delta: RequestDelta) -> None:
            if not last.done():
                last.set_result(delta)

        def listener(delta: RequestDelta) -> None:
            loop.call_soon_threadsafe(finish, delta)

        encode = self.engine.parts.tokenizer.encode
        name = self.engine.submit(
            await asyncio.to_thread(encode, prompt) if isinstance(prompt, str) else prompt,
            SamplingParams(),
            listener,
            priority=priority,
            timeout=timeout,
            cache_salt=cache_salt,
            pooling=self.engine.pooling_params(pooling, normalize),
        )
        try:
            delta = await last
        except asyncio.CancelledError:
            self.engine.cancel(name)
            raise
        if delta.embedding is not None:
            return torch.frombuffer(delta.embedding, dtype=torch.float32)
        reason = delta.error or delta.completions[0].finish_reason
        if reason == "deadline":
            raise TimeoutError(f"request {name} ran out of time")
        raise RuntimeError(f"request {name}: {reason}")

    async def shutdown(self) -> None:
        """Cancels what runs and ends the engine's threads."""
        await asyncio.to_thread(self.engine.shutdown)
