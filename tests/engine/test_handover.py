"""Handover: every call arrives, in order, and the loop is woken once for many."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from puna.engine.handover import Handover


class Loop:
    """Counts how often it is woken; runs nothing until told to."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.woken = 0

    def call_soon_threadsafe(self, function: Any) -> None:
        self.woken += 1
        self.waiting.append(function)

    def run(self) -> None:
        waiting, self.waiting = self.waiting, []
        for function in waiting:
            function()


def test_one_wake_for_all_that_come_together() -> None:
    loop, seen = Loop(), []
    handover = Handover(loop)  # type: ignore[arg-type]
    for step in range(3):
        for stream in range(32):
            handover.call(lambda *it: seen.append(it), step, stream)
        loop.run()
    assert loop.woken == 3
    assert seen == [(step, stream) for step in range(3) for stream in range(32)]


def test_a_call_made_meanwhile_and_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    loop, seen = Loop(), []
    handover = Handover(loop)  # type: ignore[arg-type]
    handover.call(lambda: handover.call(seen.append, "inner"))
    handover.call(int, "no number")
    handover.call(seen.append, "last")
    loop.run()
    loop.run()
    assert seen == ["last", "inner"]
    assert "a call that was handed over failed" in caplog.text


def test_threads_lose_nothing() -> None:
    seen: list[tuple[int, int]] = []

    async def main() -> None:
        handover = Handover(asyncio.get_running_loop())

        def work(thread: int) -> None:
            for number in range(2000):
                handover.call(lambda *it: seen.append(it), thread, number)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for one in threads:
            one.start()
        for _ in range(10_000):
            if len(seen) == 8000:
                break
            await asyncio.sleep(0.001)
        for one in threads:
            one.join()

    asyncio.run(main())
    for thread in range(4):
        assert [number for one, number in seen if one == thread] == list(range(2000))


def test_a_closed_loop_is_told() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    handover = Handover(loop)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            handover.call(print)
