"""The server's life: it listens at once, loads the model, serves, and drains at SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import uvicorn

from puna.engine.engine import Engine
from puna.engine.outputs import RequestDelta
from puna.scheduling.sampling_params import SamplingParams
from puna.serving.app import make_app
from puna.serving.state import ServerSettings, ServerState

_log = logging.getLogger(__name__)
_GRACE: Final = 5.0  # seconds between the engine's end and the connections'
# Gets a function to tell its current step with.
Loader = Callable[[Callable[[str], None]], Engine]


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """`shutdown_timeout`: seconds that running requests get after SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    shutdown_timeout: float = 30.0


class _Server(uvicorn.Server):
    """Signals are this module's: uvicorn would raise them again at its end, and the exit code would not be 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: ServerSettings, listen: ListenSettings, load: Loader, say: Callable[[str], None]) -> int:
    """Runs until a signal or a failure; returns the exit code. `say` gets the lines that a person wants to see.

    Raises what `load` raises, once the server has ended.
    """
    return asyncio.run(ServerLife(settings, listen, load, say).run())


class ServerLife:
    """One run of the server; `serve` is the way to it."""

    def __init__(
        self, settings: ServerSettings, listen: ListenSettings, load: Loader, say: Callable[[str], None]
    ) -> None:
        self.state = ServerState(settings)
        self._listen = listen
        self._load = load
        self._say = say
        self._stop = asyncio.Event()
        self._port = listen.port
        self._times: list[tuple[str, float]] = []

    async def run(self) -> int:
        config = uvicorn.Config(
            make_app(self.state),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=int(self._listen.shutdown_timeout + _GRACE),
        )
        server = _Server(config)
        family = socket.AF_INET6 if ":" in self._listen.host else socket.AF_INET
        # Bound here: uvicorn would end the process where the port is taken.
        listener = socket.create_server((self._listen.host, self._listen.port), family=family, backlog=2048)
        self._port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loading = loop.create_future()
        # A daemon: a signal that comes while weights are read ends the process without waiting for them.
        threading.Thread(target=self._load_engine, args=(loop, loading), name="puna-load", daemon=True).start()
        http = asyncio.create_task(server.serve([listener]))
        stopping = asyncio.create_task(self._stop.wait())
        failing = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({http, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            error = loading.exception() if loading.done() else None
            if error is None and loading.done():
                self.state.become_ready(loading.result())
                self._tell()
                await asyncio.wait({http, stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
            failed = error is not None or self.state.phase == "failed"
            self.state.phase = "failed" if failed else "draining"
            server.should_exit = True
            if not failed:
                await asyncio.wait({http}, timeout=self._listen.shutdown_timeout)
            if self.state.engine is not None:
                # What still runs ends with an error that its clients are told.
                await asyncio.to_thread(self.state.engine.shutdown)
            await http
        finally:
            for task in (stopping, failing):
                task.cancel()
        if error is not None:
            raise error
        return 1 if failed else 0

    def _load_engine(self, loop: asyncio.AbstractEventLoop, loading: asyncio.Future[Engine]) -> None:
        """In a thread of its own: meanwhile /health answers."""
        try:
            engine = self._load(self._begin)
            self._begin("first token")
            _first_token(engine)
            self._begin("ready")
        except BaseException as error:
            _call(loop, loading.set_exception, error)
        else:
            _call(loop, loading.set_result, engine)

    def _tell(self) -> None:
        for (name, start), (_, end) in zip(self._times, self._times[1:], strict=False):
            self._say(f"{name:<16} {end - start:7.2f} s")
        host = f"[{self._listen.host}]" if ":" in self._listen.host else self._listen.host
        self._say(f"ready on http://{host}:{self._port}/v1 as {self.state.settings.model_name!r}")

    def _begin(self, step: str) -> None:
        self.state.step = step
        self._times.append((step, time.perf_counter()))

    async def _watch(self) -> None:
        """Ends when the engine has failed."""
        while True:
            await asyncio.sleep(0.2)
            engine = self.state.engine
            if engine is not None and engine.failure is not None:
                _log.error("the engine has stopped: %s", engine.failure)
                self.state.phase, self.state.failure = "failed", engine.failure
                return


def _call(loop: asyncio.AbstractEventLoop, set_it: Callable[[Any], None], value: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended before its model was loaded
        loop.call_soon_threadsafe(set_it, value)


def _first_token(engine: Engine) -> None:
    """So that the first client does not wait for what happens only once. Raises RuntimeError where it fails."""
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([0], SamplingParams(max_tokens=1, temperature=0), deltas.put)
    while not (delta := deltas.get()).finished:
        pass
    if delta.error is not None:
        raise RuntimeError(f"the first token failed: {delta.error}")
