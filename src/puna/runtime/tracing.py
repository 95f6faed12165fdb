"""Tracer, to which steps and requests tell their times; ChromeTrace writes them for Perfetto and chrome://tracing."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

Args = Mapping[str, object]
Track = Literal["engine", "steps", "gpu", "results"]
_NO_ARGS: Final[Args] = MappingProxyType({})
_TRACKS: Final[Mapping[str, tuple[int, str]]] = MappingProxyType(
    {
        "engine": (1, "engine: plans and results"),
        "steps": (2, "steps"),
        "gpu": (3, "GPU"),
        "results": (4, "results of a GPU's steps"),
    }
)
_FLUSH_SECONDS: Final = 0.5
_log = logging.getLogger(__name__)


class Tracer(Protocol):
    """Takes times of `time.monotonic`, in seconds, from any thread, and returns at once. `args` become JSON."""

    def span(self, track: Track, name: str, start: float, end: float, args: Args = _NO_ARGS) -> None:
        """Something that one thread did. Two of a track lie apart, or one within the other."""
        ...

    def begin(self, request_id: str, name: str, at: float, args: Args = _NO_ARGS) -> None:
        """A state of a request begins, within those of it that have not ended."""
        ...

    def end(self, request_id: str, name: str, at: float, args: Args = _NO_ARGS) -> None: ...

    def close(self) -> None:
        """Writes what is left; what comes later is dropped."""
        ...


class ChromeTrace:
    """Writes `trace-PID-NUMBER.json` files in the Trace Event Format (JSON array) into a folder.

    Twice a second whole events are appended: a file that a killed process leaves lacks only the closing bracket, which
    the viewers do without. The next file is begun at `max_file_bytes`, and the last `max_files` of this process are
    kept, so that a server may be traced for as long as it runs. An error of the disk ends the trace, and nothing else.

    Raises OSError where the folder can't be written to.
    """

    def __init__(self, folder: str | Path, max_file_bytes: int = 64 << 20, max_files: int = 8) -> None:
        self._folder = Path(folder)
        self._max_file_bytes = max_file_bytes
        self._max_files = max_files
        self._pid = os.getpid()
        self._events: deque[dict[str, Any]] = deque()
        self._num_files = 0
        self._closing = threading.Event()
        self._is_over = False
        self._folder.mkdir(parents=True, exist_ok=True)
        self._begin_file()
        self._thread = threading.Thread(target=self._run, name="puna-trace", daemon=True)
        self._thread.start()

    def span(self, track: Track, name: str, start: float, end: float, args: Args = _NO_ARGS) -> None:
        begin = _nanoseconds(start)
        duration = max(0, _nanoseconds(end) - begin)
        self._add("X", name, track, begin, args, tid=_TRACKS[track][0], dur=duration / 1000)

    def begin(self, request_id: str, name: str, at: float, args: Args = _NO_ARGS) -> None:
        self._add("b", name, "request", _nanoseconds(at), args, tid=0, id=request_id)

    def end(self, request_id: str, name: str, at: float, args: Args = _NO_ARGS) -> None:
        self._add("e", name, "request", _nanoseconds(at), args, tid=0, id=request_id)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _add(self, phase: str, name: str, category: str, nanoseconds: int, args: Args, **fields: Any) -> None:
        if not self._is_over:
            head = {"name": name, "cat": category, "ph": phase, "ts": nanoseconds / 1000, "pid": self._pid}
            self._events.append(head | fields | {"args": dict(args)})

    # ---- the writing thread

    def _run(self) -> None:
        try:
            is_last = False
            while not is_last:
                is_last = self._closing.wait(_FLUSH_SECONDS)
                while self._events:
                    self._write(self._events.popleft())
                    if self._file.tell() >= self._max_file_bytes:
                        self._end_file()
                        self._begin_file()
                self._file.flush()
            self._end_file()
        except OSError as error:
            _log.warning("the trace in %s ends here: %s", self._folder, error)
        finally:
            self._is_over = True
            self._events.clear()

    def _begin_file(self) -> None:
        self._file = self._path(self._num_files).open("wb")
        self._num_files += 1
        if self._num_files > self._max_files:
            self._path(self._num_files - 1 - self._max_files).unlink(missing_ok=True)
        # Names of the process and of its tracks: viewers read each file by itself.
        self._file.write(b"[\n" + _line(self._name("process_name", 0, "puna")))
        for tid, title in _TRACKS.values():
            self._write(self._name("thread_name", tid, title))
        self._file.flush()

    def _end_file(self) -> None:
        self._file.write(b"\n]\n")
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(b",\n" + _line(event))

    def _name(self, kind: str, tid: int, name: str) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": self._pid, "tid": tid, "args": {"name": name}}

    def _path(self, number: int) -> Path:
        return self._folder / f"trace-{self._pid}-{number:04}.json"


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


def _nanoseconds(seconds: float) -> int:
    """Whole ones: spans that lie within each other still do so after rounding."""
    return round(seconds * 1e9)
