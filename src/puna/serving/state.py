"""ServerState: what the server knows of itself: settings, the engine once it has loaded, and how it is doing."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import secrets
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from puna.engine.engine import Engine
from puna.engine.handover import Handover
from puna.serving.errors import ApiError
from puna.serving.metrics import Metrics

Phase = Literal["loading", "ready", "draining", "failed"]
# Requests that ended within so many seconds tell when there will be room in the queue.
_RATE_WINDOW: Final = 30.0
_LONGEST_RETRY: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """`keep_alive`: seconds without a token after which a stream gets a comment. No `api_keys`: everyone may ask.

    `splits_reasoning`: what the model's template marks as reasoning goes into a field of its own.
    `trusts_request_template`: requests may bring chat templates.
    `allowed_hosts`: names, in lower case, that requests may be sent to, besides IP addresses and localhost; None: all.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 1024 * 1024
    keep_alive: float = 10.0
    splits_reasoning: bool = True
    trusts_request_template: bool = False
    allowed_hosts: frozenset[str] | None = None
    body_timeout: float = 120.0  # seconds that a request's body may take to come


@dataclass
class ServerState:
    """Lives as long as the server; read and changed in its event loop only, except for `step` and `progress`.

    `progress`: the part of the weights that is loaded, from 0 to 1.
    """

    settings: ServerSettings
    engine: Engine | None = None
    phase: Phase = "loading"
    step: str = "starting"
    progress: float = 0.0
    started: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(init=False)
    _ended: deque[float] = field(default_factory=deque)
    _handover: Handover | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.settings.model_name)
        if self.engine is not None:
            self.metrics.watch(self.engine)

    def become_ready(self, engine: Engine) -> None:
        self.engine, self.phase, self.step, self.progress = engine, "ready", "ready", 1.0
        self.metrics.watch(engine)

    def has_failed(self) -> bool:
        """Whether the engine has stopped after an error, of which nobody need have told yet."""
        if self.engine is not None and self.engine.failure is not None:
            self.phase = "failed"
        return self.phase == "failed"

    @property
    def handover(self) -> Handover:
        """From the engine's thread into the server's event loop, which this must be read in."""
        if self._handover is None:
            self._handover = Handover(asyncio.get_running_loop())
        return self._handover

    def ready_engine(self) -> Engine:
        """Raises ApiError, status 503, where there is none."""
        if self.has_failed() or self.engine is None or self.phase != "ready":
            messages = {
                "loading": f"the model is loading ({self.step}, {self.progress:.0%}); try again soon",
                "draining": "the server is shutting down",
            }
            message = messages.get(self.phase, "the engine has stopped after an error")
            raise ApiError(503, message, kind="service_unavailable", code=f"engine_{self.phase}", retry_after=5)
        return self.engine

    def health(self) -> dict[str, str | float]:
        """How far loading is, or what came of it; for probes, without insides."""
        self.has_failed()
        seconds = round(time.monotonic() - self.started, 1)
        return {"status": self.phase, "step": self.step, "progress": round(self.progress, 4), "seconds": seconds}

    def check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def count_ended(self) -> None:
        now = time.monotonic()
        self._ended.append(now)
        while self._ended and self._ended[0] < now - _RATE_WINDOW:
            self._ended.popleft()

    def seconds_to_room(self) -> float:
        """An estimate of when a full queue has room again: the time between the ends of two recent requests."""
        now = time.monotonic()
        recent = sum(ended > now - _RATE_WINDOW for ended in self._ended)
        return min(_LONGEST_RETRY, _RATE_WINDOW / recent) if recent else 5.0


def is_authorized(authorization: bytes, x_api_key: bytes, api_keys: Sequence[str]) -> bool:
    """Whether `Authorization: Bearer KEY`, or else `x-api-key: KEY`, has one of the keys.

    The time that this takes tells neither how much of a key is right nor which one it is: each one is compared, by
    digests of one length.
    """
    if not api_keys:
        return True
    scheme, _, given = authorization.partition(b" ")
    if not authorization:
        scheme, given = b"bearer", x_api_key
    digest = hashlib.sha256(given.strip()).digest()
    matches = [secrets.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in api_keys]
    return sum(matches) > 0 and scheme.lower() == b"bearer"


def host_name(header: bytes) -> str:
    """The name or address in a Host header, without its port."""
    host = header.decode("latin-1").strip().lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.removesuffix(".")


def is_local_name(name: str, allowed: Collection[str]) -> bool:
    """Whether nobody else can have had this name point to this machine.

    A browser takes a server's answers to a page only if the page came from the same name. So whoever owns a name could
    serve a page under it, let the name then point to 127.0.0.1, and have the page use a server that listens there.
    """
    if name in allowed or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
