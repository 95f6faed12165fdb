"""Connection: uvicorn's HTTP/1.1 protocol, that here waits for no request forever, and streams with less work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# Seconds that a request's head may take, from the connection's beginning or its first byte. uvicorn's own timer is for
# connections on which nothing comes: a byte now and then would keep one open, and with it a file descriptor.
HEAD_TIMEOUT: Final = 30.0
# The extension of a request's scope that takes pieces of a body of unknown length, once the answer has begun.
WRITE_CHUNK: Final = "puna.write_chunk"
WriteChunk = Callable[[bytes], Awaitable[None]]


class Connection(H11Protocol):
    """Also ends a connection on which the rest of a refused body keeps coming."""

    head_timeout = HEAD_TIMEOUT
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

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

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _chunk_writer(cycle: RequestResponseCycle) -> WriteChunk:
    """Past h11, which keeps no count of what is sent in chunks, but whose objects for each one take longer than all
    else that is done for a token. The answer's begin and end go through it."""

    async def write(data: bytes) -> None:
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    return write
