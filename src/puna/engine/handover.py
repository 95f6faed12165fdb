"""Handover: calls from the engine's thread into an event loop, which is woken once for all that come together."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)


class Handover:
    """Functions called through it run in the loop, in order. May be used from any thread.

    A step brings every stream a token. `call_soon_threadsafe` for each of them writes to a socket that wakes the loop,
    each time; here only the first does, and the others are found when the loop gets there.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_woken = False

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Raises RuntimeError where the loop is closed."""
        self._calls.append((function, arguments))
        if self._is_woken:
            return
        self._is_woken = True
        try:
            self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            self._is_woken = False
            raise

    def _run(self) -> None:
        # Before the calls: one that is added meanwhile is found below, or wakes the loop again.
        self._is_woken = False
        while self._calls:
            function, arguments = self._calls.popleft()
            try:
                function(*arguments)
            except Exception:  # no reason to forget the others
                _log.exception("a call that was handed over failed")
