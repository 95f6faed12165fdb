"""A server on a small model, over a real socket, and OpenAI's client for it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm.conftest import dense, folder, make_folder  # noqa: F401  the small models

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from puna.config import EngineConfig  # noqa: E402
from puna.engine.engine import Engine  # noqa: E402
from puna.serving.app import make_app  # noqa: E402
from puna.serving.connection import Connection  # noqa: E402
from puna.serving.state import ServerSettings, ServerState  # noqa: E402

Serve = Callable[..., AbstractContextManager["Running"]]


class Running:
    """A server that listens; `state` is its own."""

    def __init__(self, state: ServerState, port: int) -> None:
        self.state = state
        self.url = f"http://127.0.0.1:{port}"
        key = state.settings.api_keys[0] if state.settings.api_keys else "none"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)
        self.http = httpx.Client(base_url=self.url, timeout=30, headers={"authorization": f"Bearer {key}"})

    def wait_until_idle(self) -> None:
        """Until nothing runs or waits; fails after ten seconds."""
        assert self.state.engine is not None
        scheduler = self.state.engine.parts.scheduler
        end = time.monotonic() + 10
        while scheduler.has_work or scheduler.blocks.utilization.in_use:
            assert time.monotonic() < end, "blocks are still in use"
            time.sleep(0.01)


@contextmanager
def listening(state: ServerState) -> Iterator[Running]:
    server = uvicorn.Server(uvicorn.Config(make_app(state), http=Connection, log_config=None, lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    running = Running(state, listener.getsockname()[1])
    try:
        yield running
    finally:
        running.client.close()
        running.http.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve(folder: Path) -> Serve:  # noqa: F811
    """Starts a server: `engine` are EngineConfig's options, the others ServerSettings's."""

    @contextmanager
    def start(engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
        it = Engine.from_pretrained(str(folder), engine_config=EngineConfig(**(engine or {})))
        try:
            with listening(ServerState(ServerSettings(model_name="small", **settings), it, "ready")) as running:
                yield running
        finally:
            it.shutdown()

    return start


@pytest.fixture(scope="module")
def server(serve: Serve) -> Iterator[Running]:
    with serve() as running:
        yield running
