"""EventStream, server-sent events that end when the client does; and work that a client's leaving cancels."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from puna.serving.connection import WRITE_CHUNK, WriteChunk
from puna.serving.errors import ApiError, dumps
from puna.serving.generation import engine_error

T = TypeVar("T")
Chunk = dict[str, Any] | bytes
_log = logging.getLogger(__name__)
_DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": keep-alive\n\n"


class TextChunks:
    """The JSON of chunks that bring a choice a text and nothing else, as most do: what is the same in all of them is
    written once. `make` makes the chunk of a choice's index and a text."""

    def __init__(self, make: Callable[[int, str], dict[str, Any]]) -> None:
        self._make = make
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def write(self, index: int, text: str) -> bytes:
        around = self._around.get(index)
        if around is None:
            mark = uuid.uuid4().hex  # which nothing else in the chunk can be
            before, after = dumps(self._make(index, mark)).split(dumps(mark))
            around = self._around[index] = before, after
        return around[0] + dumps(text) + around[1]


class EventStream(Response):
    """Sends each object of `chunks`, or its JSON, as an event, and [DONE]; None as a comment, which only keeps the
    connection open.

    A failure on the way is an event `{"error": ...}`, after which the stream ends. Starlette's own response would
    notice a client that left only when it next sends something; this one closes `chunks` at once, and calls `end`:
    chunks that nobody has begun to read, since the client left before, close nothing.
    """

    def __init__(self, chunks: AsyncIterator[Chunk | None], end: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        # Neither a length nor a body is known.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._chunks = chunks
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write: WriteChunk | None = scope.get("extensions", {}).get(WRITE_CHUNK)

        async def send_body(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await until_gone(self._send_all(send, write or send_body), receive)
        finally:
            self._end()

    async def _send_all(self, send: Send, write: WriteChunk) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await write(_event(chunk))
        except ApiError as error:
            await write(_event(error.body()))
        except Exception:
            _log.exception("a stream failed")
            await write(_event(engine_error().body()))
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})


def _event(chunk: Chunk | None) -> bytes:
    if chunk is None:
        return _COMMENT
    return b"data: %b\n\n" % (chunk if isinstance(chunk, bytes) else dumps(chunk))


async def until_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """The work's result; None where the client left before, and then the work is cancelled and has cleaned up."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for one in (task, watch):
            one.cancel()
        with contextlib.suppress(BaseException):
            await watch
        if not task.done():
            with contextlib.suppress(BaseException):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
