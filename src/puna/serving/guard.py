"""Guard: what comes before and after every route. Keys, request ids, limits of bodies, and the line in the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.serving.connection import CROWDED
from puna.serving.errors import ApiError
from puna.serving.generation import engine_error
from puna.serving.record import RequestRecord, request_id
from puna.serving.state import ServerState, host_name, is_authorized, is_local_name

_log = logging.getLogger(__name__)
GONE: Final = 499  # nginx's status for a client that left; nobody sees it but the log


class Guard:
    """The outermost application. An error inside is logged with its traceback; the client gets none of it.

    `open_paths` need no key.
    """

    def __init__(self, app: ASGIApp, state: ServerState, open_paths: Collection[str]) -> None:
        self._app = app
        self._state = state
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        record = RequestRecord(request_id=request_id(headers))
        scope.setdefault("state", {})["record"] = record
        status, inner = 0, scope

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            if (
                scope["method"] == "HEAD"
            ):  # FastAPI's routes don't know it; whoever sends the answer leaves out the body
                inner = {**scope, "method": "GET"}
            await self._app(inner, self._limited(receive), answer)
        except ApiError as error:
            record.error = error.code
            if status == 0:
                await error.response()(scope, receive, answer)
        except Exception:
            _log.exception("request %s failed", record.request_id)
            record.error = "server_error"
            if status == 0:
                await engine_error().response()(scope, receive, answer)
        finally:
            self._tell(scope, inner.get("route"), status or GONE, record)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if CROWDED in scope["state"]:
            crowded = ApiError(503, "too many connections are open", code="too_many_connections", retry_after=1)
            crowded.headers = {"connection": "close"}
            raise crowded
        allowed = self._state.settings.allowed_hosts
        if allowed is not None and b"host" in headers:  # a browser's request has one
            name = host_name(headers[b"host"])
            if not is_local_name(name, allowed):
                message = f"this server does not go by {name[:100]!r}: start it with --allowed-host, or with API keys"
                raise ApiError(403, message, kind="permission_error", code="host_not_allowed")
        keys = self._state.settings.api_keys
        header = headers.get(b"authorization", b"")
        other = headers.get(b"x-api-key", b"")
        if scope["path"] not in self._open_paths and not is_authorized(header, other, keys):
            message = "the API key is wrong" if header or other else "this server needs an API key"
            message = f"{message}: send Authorization: Bearer KEY"
            raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:18]) > self._state.settings.max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """Bounds the body also where its length is not told before, and the time that it takes to come."""
        settings = self._state.settings
        received, is_whole = 0, False
        end = time.monotonic() + settings.body_timeout

        async def limited() -> Message:
            nonlocal received, is_whole
            if is_whole:  # what can come now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                late = f"the body was not there after {settings.body_timeout:g} seconds"
                raise ApiError(408, late, code="request_timeout") from None
            if message["type"] == "http.disconnect":  # FastAPI would take it for a body that can't be read
                raise ApiError(GONE, "the client left before its request was whole", kind="client_left")
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > settings.max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._state.settings.max_body_bytes} bytes", code="too_large")

    def _tell(self, scope: Scope, route: Any, status: int, record: RequestRecord) -> None:
        """A line in the log for people, its parts for programs; and the metric of answers."""
        seconds = round(time.monotonic() - record.arrived, 4)
        head = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": seconds}
        rest = record.fields()
        words = "".join(f" {name}={value}" for name, value in rest.items() if value is not None)
        _log.info("%s %r %d %.3fs%s", *head.values(), words, extra={"fields": head | rest})
        self._state.metrics.answered("none" if route is None else route.path, scope["method"], status)
