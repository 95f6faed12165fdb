"""Real use: clients that leave, full queues, deadlines, waiting, loading, and an engine that dies."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from puna.engine.engine import Engine
from puna.scheduling.step_plan import StepPlan, StepResult
from puna.serving.server import ListenSettings, Loading, Ready, ServerLife
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import Running, Serve, listening

LONG: dict[str, Any] = {"model": "small", "prompt": "hi", "max_tokens": 200, "ignore_eos": True}


class Gate:
    """Lets an engine's steps through, or holds them; counts those that compute something.

    `hold_after`: the gate closes by itself behind so many of them.
    """

    def __init__(self, engine: Engine) -> None:
        self.open = threading.Event()
        self.open.set()
        self.steps = 0
        self.hold_after: int | None = None
        self.error: Exception | None = None
        self._submit = engine.parts.executor.submit

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.open.wait()
        if self.error is not None:
            raise self.error
        self.steps += bool(plan.rows)  # one without rows only tells of sequences that have ended
        if self.steps == self.hold_after:
            self.open.clear()
        return self._submit(plan)


@pytest.fixture
def gated(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, Gate]]:
    with serve({"max_num_seqs": 1, "max_waiting": 1}, keep_alive=0.02) as running:
        assert running.state.engine is not None
        gate = Gate(running.state.engine)
        monkeypatch.setattr(running.state.engine.parts.executor, "submit", gate.submit)
        yield running, gate
        gate.open.set()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited ten seconds"
        time.sleep(0.005)


def test_a_stream_whose_client_leaves_frees_its_blocks(gated: tuple[Running, Gate]) -> None:
    running, gate = gated
    assert running.state.engine is not None
    scheduler = running.state.engine.parts.scheduler
    gate.hold_after = 3
    with running.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()  # kept: without a reference it would close the stream
        next(lines)
        assert scheduler.num_running == 1
    wait_for(lambda: scheduler.num_running == 0)
    gate.hold_after = None
    gate.open.set()
    running.wait_until_idle()
    assert gate.steps <= 4  # three, and the one that was planned before the client left
    assert running.client.completions.create(model="small", prompt="hi", max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_leaves_before_its_whole_answer_frees_its_blocks(gated: tuple[Running, Gate]) -> None:
    running, gate = gated
    assert running.state.engine is not None
    scheduler = running.state.engine.parts.scheduler
    gate.open.clear()
    body = json.dumps(LONG).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: scheduler.has_work)
    wait_for(lambda: not scheduler.num_running)
    gate.open.set()
    running.wait_until_idle()
    assert gate.steps <= 1


def test_a_full_queue_answers_at_once_and_waiting_streams_get_comments(gated: tuple[Running, Gate]) -> None:
    running, gate = gated
    assert running.state.engine is not None
    scheduler = running.state.engine.parts.scheduler
    gate.open.clear()
    url = f"{running.url}/v1/completions"
    with httpx.stream("POST", url, json=LONG | {"stream": True}) as first:
        wait_for(lambda: scheduler.num_running == 1 and scheduler.num_waiting == 0)
        with httpx.stream("POST", url, json=LONG | {"stream": True, "max_tokens": 3}) as second:
            assert scheduler.num_waiting == 1
            for stream in (False, True):
                refused = running.http.post("/v1/completions", json=LONG | {"stream": stream})
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
            with pytest.raises(openai.RateLimitError):
                running.client.completions.create(model="small", prompt="x")
            lines = second.iter_lines()
            assert next(lines) == ": keep-alive"
            gate.open.set()
            rest = [line for line in lines if line.startswith("data: ")]
            assert rest[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in rest[-2]
        assert [line for line in first.iter_lines() if line][-1] == "data: [DONE]"
    running.wait_until_idle()


def test_several_prompts_of_which_one_finds_no_room_leave_nothing(gated: tuple[Running, Gate]) -> None:
    running, gate = gated
    gate.open.clear()
    answer = running.http.post("/v1/completions", json=LONG | {"prompt": ["a", "b", "c", "d"]})
    assert answer.status_code == 429
    gate.open.set()
    running.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_cuts_off(gated: tuple[Running, Gate], stream: bool) -> None:
    running, gate = gated
    gate.open.clear()
    threading.Timer(0.15, gate.open.set).start()
    answer = running.http.post("/v1/completions", json=LONG | {"deadline": 0.1, "stream": stream})
    assert answer.status_code == 200
    found = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
    (choice,) = found["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    running.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_is_an_error_without_insides(gated: tuple[Running, Gate], stream: bool) -> None:
    running, gate = gated
    gate.open.clear()
    with (
        httpx.stream("POST", f"{running.url}/v1/completions", json=LONG | {"stream": stream})
        if stream
        else (httpx.Client(base_url=running.url)) as it
    ):
        gate.error = RuntimeError("secret insides")
        gate.open.set()
        answer = it if stream else it.post("/v1/completions", json=LONG)
        answer.read()
        assert answer.status_code == (200 if stream else 500)
        assert "secret" not in answer.text
        assert '"code":"engine_error"' in answer.text
    assert running.state.engine is not None
    assert "secret insides" in (running.state.engine.failure or "")
    for refused in (running.http.post("/v1/completions", json=LONG), running.http.get("/ready")):
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_failed"
    health = running.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_health_answers_while_the_model_loads(folder: Path) -> None:
    state = ServerState(ServerSettings(model_name="small"))
    told: list[tuple[str, float]] = []
    with listening(state) as running:
        loading = Loading(state)

        def progress(done: int, total: int) -> None:
            loading.progress(done, total)
            health = running.http.get("/health")
            assert health.status_code == 200
            assert health.json()["status"] == "loading"
            told.append((health.json()["step"], health.json()["progress"]))

        loading.begin("load weights")
        engine = Engine.from_pretrained(str(folder), progress=progress)
        assert {step for step, _ in told} == {"load weights"}
        fractions = [fraction for _, fraction in told]
        assert fractions == sorted(set(fractions))
        assert len(fractions) > 5
        assert 0 < fractions[0] < 0.5
        assert fractions[-1] == 1
        assert running.http.get("/v1/models").status_code == 200
        for answer in (running.http.get("/ready"), running.http.post("/v1/completions", json=LONG)):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "engine_loading"
        state.become_ready(engine)
        assert running.http.get("/ready").status_code == 200
        engine.shutdown()


def run_life(load: Callable[[Loading], Engine], told: list[Ready]) -> int:
    """A whole server's life in a thread of asyncio's making, where signals can't be handled."""
    life = ServerLife(ServerSettings(model_name="small"), ListenSettings(port=0), load, told.append)

    async def run() -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler = lambda *_: None  # type: ignore[method-assign]
        return await life.run()

    return asyncio.run(run())


def test_a_dead_engine_ends_the_server_with_a_code(folder: Path) -> None:
    told: list[Ready] = []
    engine = Engine.from_pretrained(str(folder))
    gate = Gate(engine)

    def load(loading: Loading) -> Engine:
        loading.begin("load weights")
        return engine

    def kill() -> None:
        wait_for(lambda: told)
        gate.error = RuntimeError("out of luck")
        assert httpx.post(f"{told[0].url}/v1/completions", json=LONG).status_code == 500

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.executor, "submit", gate.submit)
        killer = threading.Thread(target=kill)
        killer.start()
        assert run_life(load, told) == 1
        killer.join()
    assert list(told[0].seconds) == ["load weights", "record steps", "first token"]


def test_a_model_that_does_not_load_ends_the_server_with_its_error() -> None:
    def load(loading: Loading) -> Engine:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        run_life(load, [])


def test_a_taken_port_is_an_error() -> None:
    def load(loading: Loading) -> Engine:
        raise AssertionError("the port comes first")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = ListenSettings(port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            asyncio.run(ServerLife(ServerSettings(model_name="small"), listen, load, print).run())
