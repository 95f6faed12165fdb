"""DeviceClock: when work on a device began and ended, as times of the host's clock."""

from __future__ import annotations

import time
from typing import Final

from puna.runtime.accelerator import Accelerator, Event

# Events count in float32 milliseconds: after this many seconds, half a microsecond each.
_ANCHOR_SECONDS: Final = 4.0


class DeviceClock:
    """Times of events, as `time.monotonic` would have told them there, to about ten microseconds."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._anchor: Event | None = None
        self._at = 0.0

    def mark(self) -> Event:
        """An event behind all that is queued. The first one waits for it."""
        if self._anchor is None:
            self._anchor = self._accelerator.record(timed=True)
            self._anchor.synchronize()
            self._at = time.monotonic()
        return self._accelerator.record(timed=True)

    def times(self, began: Event, ended: Event) -> tuple[float, float]:
        """Of two events that have been reached, the latter one the latest so far."""
        assert self._anchor is not None
        start = self._at + began.seconds_since(self._anchor)
        end = start + ended.seconds_since(began)
        if end - self._at > _ANCHOR_SECONDS:
            self._anchor, self._at = ended, end
        return start, end
