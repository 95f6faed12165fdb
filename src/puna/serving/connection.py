"""Connection: uvicorn's HTTP/1.1 protocol, that here waits for no request forever, streams with less work, and refuses
as the rest of the server does."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from puna.serving.errors import ApiError
from puna.serving.record import request_id

_log = logging.getLogger(__name__)
# Seconds that a request's head may take, from the connection's beginning or its first byte. uvicorn's own timer is for
# connections on which nothing comes: a byte now and then would keep one open, and with it a file descriptor.
HEAD_TIMEOUT: Final = 30.0
MAX_HEAD_BYTES: Final = 32 * 1024  # of a request's line and headers
# The extension of a request's scope that takes pieces of a body of unknown length, once the answer has begun.
WRITE_CHUNK: Final = "puna.write_chunk"
WriteChunk = Callable[[bytes], Awaitable[None]]
# The entry in the state of a request's scope on a connection that is one too many.
CROWDED: Final = "puna.crowded"


class Connection(H11Protocol):
    """Also ends a connection on which the rest of a refused body keeps coming."""

    head_timeout = HEAD_TIMEOUT
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _send_at_once(transport)
        self._start_timer()
        # uvicorn would answer by itself, in words of its own, and also those that were there before.
        limit, self.limit_concurrency = self.limit_concurrency, None
        if limit is not None and len(self.connections) > limit:
            self.app_state = {**self.app_state, CROWDED: True}

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and self.scope["http_version"] == "1.1" and self.scope["method"] != "HEAD":
            # In time: the task that answers begins after this. uvicorn's types know no extensions of others.
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
            scope.setdefault("extensions", {})[WRITE_CHUNK] = _chunk_writer(self.cycle)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()  # a request runs: the application has its own limits
        elif self._timer is None:
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP. `msg` is the same for all of it; h11's error, which is being handled, says more."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun: there is no second one
            self.transport.close()
            return
        cause = sys.exc_info()[1]
        if isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431:
            error = ApiError(431, f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes: shorten them")
        else:
            error = ApiError(400, f"this is no valid HTTP/1.1: {cause or msg}")
        in_body = self.cycle is not None and not self.cycle.response_complete
        name = request_id(dict(self.headers) if in_body else {})
        _log.warning("request %s refused with %d: it is no valid HTTP/1.1", name, error.status_code)  # may have a key
        answer = error.response()
        headers = [*answer.raw_headers, (b"x-request-id", name.encode()), (b"connection", b"close")]
        reason = HTTPStatus(error.status_code).phrase.encode()
        events = (
            h11.Response(status_code=error.status_code, headers=headers, reason=reason),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _send_at_once(transport: asyncio.Transport) -> None:
    """asyncio does so only for sockets made with their protocol's number. Without it the first token waits for
    the client to acknowledge the answer's head, which on a connection that was used before takes 40 milliseconds."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _chunk_writer(cycle: RequestResponseCycle) -> WriteChunk:
    """Past h11, which keeps no count of what is sent in chunks, but whose objects for each one take longer than all
    else that is done for a token. The answer's begin and end go through it."""

    async def write(data: bytes) -> None:
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    return write
