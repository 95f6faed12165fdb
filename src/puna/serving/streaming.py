"""EventStream, server-sent events that end when the client does; and work that a client's leaving cancels."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from puna.serving.errors import ApiError, dumps
from puna.serving.generation import engine_error

T = TypeVar("T")
_log = logging.getLogger(__name__)
_DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": keep-alive\n\n"


class EventStream(Response):
    """Sends each object of `chunks` as an event (None as a comment, which only keeps the connection open), and [DONE].

    A failure on the way is an event `{"error": ...}`, after which the stream ends. Starlette's own response would
    notice a client that left only when it next sends something; this one closes `chunks` at once.
    """

    def __init__(self, chunks: AsyncIterator[dict[str, Any] | None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        # Neither a length nor a body is known.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_gone(self._send_all(send), receive)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                data = _COMMENT if chunk is None else b"data: " + dumps(chunk) + b"\n\n"
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            await _send_error(send, error)
        except Exception:
            _log.exception("a stream failed")
            await _send_error(send, engine_error())
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})


async def _send_error(send: Send, error: ApiError) -> None:
    await send({"type": "http.response.body", "body": b"data: " + dumps(error.body()) + b"\n\n", "more_body": True})


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
