"""HttpClient: as little HTTP/1.1 as a load generator needs, so that measuring takes little of what it measures."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

# Far more than any head; what comes in one piece is rarely more than a few events.
_LARGEST_HEAD: Final = 1 << 16
_READ_SIZE: Final = 1 << 16

OnData = Callable[[bytes], None]


@dataclass(frozen=True)
class Address:
    """Where a server is. `path` is what stands before every path, without a slash at its end."""

    host: str
    port: int
    is_https: bool
    path: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Also takes URLs with OpenAI's /v1 at their end. Raises ValueError for what is no http or https URL."""
        text = url if "://" in url else f"http://{url}"
        parts = urlsplit(text)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is no address of a server: give one such as http://127.0.0.1:8000")
        is_https = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_https else 80), is_https, path)


class HttpClient:
    """Requests with JSON bodies to one server; connections are kept and used again.

    No redirects, cookies, proxies or compression: a benchmark should not have them on its way.
    """

    def __init__(self, address: Address, api_key: str | None = None) -> None:
        self._address = address
        self._idle: list[_Connection] = []
        self._context = ssl.create_default_context() if address.is_https else None
        host = f"[{address.host}]" if ":" in address.host else address.host
        key = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._headers = f"Host: {host}:{address.port}\r\nUser-Agent: puna-bench\r\nAccept: */*\r\n{key}"

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body."""
        pieces: list[bytes] = []
        status = await self.stream(method, path, body, pieces.append)
        return status, b"".join(pieces)

    async def stream(self, method: str, path: str, body: Any, on_data: OnData) -> int:
        """The status, once the answer is complete; `on_data` gets pieces of its body as they come, of any status.

        Raises OSError where there is no connection or it breaks, ValueError for an answer that is no HTTP.
        """
        content = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        head = f"{method} {self._address.path}{path} HTTP/1.1\r\n{self._headers}{kind}\r\n"
        message = head.encode("latin-1") + content
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                try:
                    return await self._exchange(connection, message, on_data)
                except _ClosedWhileIdleError:  # the server ended it just now: ask on another one
                    continue
        return await self._exchange(await self._connect(), message, on_data)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> _Connection:
        address = self._address
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, address.host, address.port, ssl=self._context)
        except OSError as error:
            raise ConnectionError(f"no connection to {address.host}:{address.port}: {error}") from error
        return connection

    async def _exchange(self, connection: _Connection, message: bytes, on_data: OnData) -> int:
        try:
            status = await connection.exchange(message, on_data)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return status


class _ClosedWhileIdleError(ConnectionError):
    """The server closed a connection before a word of its answer."""


class _Connection(asyncio.BufferedProtocol):
    """One connection; one exchange at a time. Answers are parsed as they come, without a task's being woken."""

    def __init__(self) -> None:
        # Read into one buffer: a plain Protocol gets a new object of the largest size for every read.
        self._space = bytearray(_READ_SIZE)
        self._view = memoryview(self._space)
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[int] | None = None
        self._on_data: OnData | None = None
        self._rest = b""  # what came and could not be parsed yet
        self._exchanges = 0
        self._status = 0  # 0 before the head
        self._is_chunked = False
        self._left: int | None = 0  # bytes of the body, or of the chunk with its line break; None: until the end
        self._keeps = True

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def exchange(self, message: bytes, on_data: OnData) -> int:
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._on_data = on_data
        self._status, self._rest, self._keeps = 0, b"", True
        self._exchanges += 1
        self._transport.write(message)
        return await self._done

    # ---- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._view[:nbytes])
        if self._rest:
            data, self._rest = self._rest + data, b""
        try:
            self._parse(data)
        except Exception as error:
            self._fail(ValueError(f"the answer is no HTTP: {error}"))

    def eof_received(self) -> bool:
        if self._status and self._left is None and not self._is_chunked:
            self._finish()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exchanges > 1 and not self._status and not self._rest:
            self._fail(_ClosedWhileIdleError("the server closed the connection"))
        else:
            self._fail(ConnectionError(f"the connection broke: {exc or 'closed by the server'}"))

    # ---- one answer

    def _parse(self, data: bytes) -> None:
        assert self._on_data is not None
        start = 0
        if not self._status:
            start = self._parse_head(data)
            if not start:
                return
        while self._done is not None and (start < len(data) or self._left == 0):
            if not self._is_chunked:
                piece = data[start:] if self._left is None else data[start : start + self._left]
                start += len(piece)
                if piece:
                    self._on_data(piece)
                if self._left is not None:
                    self._left -= len(piece)
                    if not self._left:
                        self._finish()
                continue
            end = data.find(b"\r\n", start)
            if end < 0:
                break
            size = int(data[start:end].partition(b";")[0], 16)
            # Whole chunks only; they are small. The last one is empty; trailers are taken for its line break.
            stop = end + 2 + size
            if len(data) < stop + 2:
                break
            if not size:
                self._finish()
                return
            self._on_data(data[end + 2 : stop])
            start = stop + 2
        self._rest = data[start:]

    def _parse_head(self, data: bytes) -> int:
        """Where the body begins; 0 while the head is not complete."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _LARGEST_HEAD:
                raise ValueError("its head has no end")
            self._rest = data
            return 0
        first, *lines = data[:end].split(b"\r\n")
        version, _, rest = first.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            raise ValueError(f"it begins with {first[:40]!r}")
        pairs = (line.partition(b":") for line in lines)
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in pairs}
        self._status = int(rest[:3])
        self._is_chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        length = headers.get(b"content-length")
        self._left = int(length) if length is not None and not self._is_chunked else None
        self._keeps = version == b"HTTP/1.1" and headers.get(b"connection") != b"close"
        return end + 4

    def _finish(self) -> None:
        done, self._done = self._done, None
        if not self._keeps or (self._left is None and not self._is_chunked):
            self.close()
        if done is not None and not done.done():
            done.set_result(self._status)

    def _fail(self, error: Exception) -> None:
        done, self._done = self._done, None
        self.close()
        if done is not None and not done.done():
            done.set_exception(error)
