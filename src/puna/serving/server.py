"""The server's life: it listens at once, loads the model, serves, and drains at SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import uvicorn

from puna.engine.engine import Engine
from puna.engine.outputs import RequestDelta
from puna.scheduling.sampling_params import SamplingParams
from puna.serving.app import make_app
from puna.serving.connection import MAX_HEAD_BYTES, Connection
from puna.serving.state import ServerSettings, ServerState

_log = logging.getLogger(__name__)
_GRACE: Final = 5.0  # seconds between the engine's end and the connections'
_IDLE_TIMEOUT: Final = 75  # seconds; more than the 60 that proxies keep a connection for, or they would find it closed
_SPARE_FILES: Final = 64  # descriptors that are not connections
_WARM_UP_PROMPT: Final = 8  # tokens: too few to fill a block, so that nothing of it stays in the cache


class Loading:
    """What a loader tells while it works, in a thread of its own: /health shows it."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._times: list[tuple[str, float]] = []

    def begin(self, step: str) -> None:
        self._state.step = step
        self._times.append((step, time.perf_counter()))

    def progress(self, done: int, total: int) -> None:
        """Bytes of weights."""
        self._state.progress = done / total if total else 1.0

    def seconds(self) -> dict[str, float]:
        """Of each step but the last one, which has not ended."""
        pairs = zip(self._times, self._times[1:], strict=False)
        return {name: end - start for (name, start), (_, end) in pairs}


Loader = Callable[[Loading], Engine]


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """`shutdown_timeout`: seconds that running requests get after SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    shutdown_timeout: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Where the server now answers, and the seconds that each step of its start took, in order."""

    url: str
    model_name: str
    seconds: Mapping[str, float]


class _Server(uvicorn.Server):
    """Signals are this module's: uvicorn would raise them again at its end, and the exit code would not be 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: ServerSettings, listen: ListenSettings, load: Loader, on_ready: Callable[[Ready], None]) -> int:
    """Runs until a signal or a failure; returns the exit code.

    Raises what `load` raises, once the server has ended.
    """
    return asyncio.run(ServerLife(settings, listen, load, on_ready).run())


class ServerLife:
    """One run of the server; `serve` is the way to it."""

    def __init__(
        self, settings: ServerSettings, listen: ListenSettings, load: Loader, on_ready: Callable[[Ready], None]
    ) -> None:
        self.state = ServerState(settings)
        self._listen = listen
        self._load = load
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._loading = Loading(self.state)

    async def run(self) -> int:
        # Bound here: uvicorn would end the process where the port is taken.
        family = socket.AF_INET6 if ":" in self._listen.host else socket.AF_INET
        listener = socket.create_server((self._listen.host, self._listen.port), family=family, backlog=2048)
        server = _Server(self._config())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loading = loop.create_future()
        # A daemon: a signal that comes while weights are read ends the process without waiting for them.
        threading.Thread(target=self._load_engine, args=(loop, loading), name="puna-load", daemon=True).start()
        http = asyncio.create_task(server.serve([listener]))
        stopping = asyncio.create_task(self._stop.wait())
        failing = asyncio.create_task(self._wait_for_failure())
        try:
            await asyncio.wait({http, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            error = loading.exception() if loading.done() else None
            if error is None and loading.done():
                self.state.become_ready(loading.result())
                self._on_ready(self._ready(listener.getsockname()[1]))
                await asyncio.wait({http, stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
            failed = error is not None or self.state.has_failed()
            self.state.phase = "failed" if failed else "draining"
            if failed:  # its requests have had their errors: what is left is to send them
                server.config.timeout_graceful_shutdown = int(2 * _GRACE)
            server.should_exit = True
            if not failed:
                await asyncio.wait({http}, timeout=self._listen.shutdown_timeout)
            if self.state.engine is not None:
                # What still runs ends with an error that its clients are told.
                await asyncio.to_thread(self.state.engine.shutdown)
            await asyncio.wait({http}, timeout=_GRACE)
            for connection in list(server.server_state.connections):  # of clients that do not read what they get
                connection.transport.abort()
            await http
        finally:
            for task in (stopping, failing):
                task.cancel()
        if error is not None:
            raise error
        return 1 if failed else 0

    def _config(self) -> uvicorn.Config:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return uvicorn.Config(
            make_app(self.state),
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_IDLE_TIMEOUT,
            # A last resort, which would log a traceback for every connection: `run` ends them before.
            timeout_graceful_shutdown=int(self._listen.shutdown_timeout + 2 * _GRACE),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            # Connections above it are answered with 503: without descriptors left they could not even be taken.
            limit_concurrency=None if files == resource.RLIM_INFINITY else max(1, files - _SPARE_FILES),
        )

    def _on_signal(self, number: int) -> None:
        """The first one ends the server in order, the second one at once."""
        if self._stop.is_set():
            _log.warning("a second signal: ending at once")
            logging.shutdown()
            os._exit(128 + number)
        _log.info("%s: ending", signal.Signals(number).name)
        self._stop.set()

    def _load_engine(self, loop: asyncio.AbstractEventLoop, loading: asyncio.Future[Engine]) -> None:
        """In a thread of its own: meanwhile /health answers."""
        try:
            engine = self._load(self._loading)
            self._loading.begin("record steps")
            _generate(engine, 2)  # the first tokens take what happens only once
            self._loading.begin("first token")
            _generate(engine, 1)
            self._loading.begin("ready")
        except BaseException as error:
            _call(loop, loading.set_exception, error)
        else:
            _call(loop, loading.set_result, engine)

    def _ready(self, port: int) -> Ready:
        host = f"[{self._listen.host}]" if ":" in self._listen.host else self._listen.host
        name = self.state.settings.model_name
        return Ready(url=f"http://{host}:{port}", model_name=name, seconds=self._loading.seconds())

    async def _wait_for_failure(self) -> None:
        while not self.state.has_failed():
            await asyncio.sleep(0.2)


def _call(loop: asyncio.AbstractEventLoop, set_it: Callable[[Any], None], value: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended before its model was loaded
        loop.call_soon_threadsafe(set_it, value)


def _generate(engine: Engine, count: int) -> None:
    """So many tokens, for nobody. Raises RuntimeError where it fails."""
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    prompt = [0] * max(1, min(_WARM_UP_PROMPT, engine.max_model_len - count))
    engine.submit(prompt, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True), deltas.put)
    while not (delta := deltas.get()).finished:
        pass
    if delta.error is not None:
        raise RuntimeError(f"the first token failed: {delta.error}")
