"""ChromeTrace: valid files, whole events, a bound on what is kept, and no harm from a disk that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from puna.runtime.tracing import ChromeTrace


def events(path: Path) -> list[dict[str, Any]]:
    """Of a file that was ended; the ones that name tracks left out."""
    found = json.loads(path.read_text())
    assert [event["args"]["name"] for event in found[:5]] == [
        "puna",
        "engine: plans and results",
        "steps",
        "GPU",
        "results of a GPU's steps",
    ]
    assert {event["ph"] for event in found[:5]} == {"M"}
    return found[5:]


def test_events_have_what_the_format_asks_for(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "new" / "folder")
    trace.span("steps", "step", 1.5, 1.75, {"tokens": 3})
    trace.begin("id", "queued", 2.0)
    trace.end("id", "queued", 2.000001, {"why": None})
    trace.close()
    trace.span("steps", "late", 3.0, 4.0)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == f"trace-{os.getpid()}-0000.json"
    step, begin, end = events(path)
    pid = os.getpid()
    assert step == {
        "name": "step",
        "cat": "steps",
        "ph": "X",
        "ts": 1.5e6,
        "dur": 0.25e6,
        "pid": pid,
        "tid": 2,
        "args": {"tokens": 3},
    }
    head = {"name": "queued", "cat": "request", "id": "id", "pid": pid, "tid": 0}
    assert begin == head | {"ph": "b", "ts": 2e6, "args": {}}
    assert end == head | {"ph": "e", "ts": 2000001.0, "args": {"why": None}}


def test_files_are_bounded_and_each_is_whole(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path, max_file_bytes=4000, max_files=3)
    for number in range(500):
        trace.span("engine", f"span {number}", number, number + 0.5)
    trace.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert all(path.stat().st_size < 4400 for path in files)
    numbers = [int(event["name"].split()[1]) for path in files for event in events(path)]
    assert numbers == list(range(numbers[0], 500))


def test_threads_lose_nothing(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [trace.span("steps", f"{n} {i}", i, i) for i in range(2000)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    (path,) = tmp_path.iterdir()
    names = [event["name"] for event in events(path)]
    for n in range(4):
        assert [name for name in names if name.startswith(f"{n} ")] == [f"{n} {i}" for i in range(2000)]


def test_a_killed_process_leaves_whole_events(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from puna.runtime.tracing import ChromeTrace
trace = ChromeTrace(sys.argv[1])
(path,) = Path(sys.argv[1]).iterdir()
number = 0
while path.stat().st_size < 20000:
    trace.span("steps", f"span {number}", number, number + 1)
    number += 1
    time.sleep(0.001)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -9
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert not text.rstrip().endswith("]")
    found = json.loads(text + "]")
    assert [event["name"] for event in found[5:]] == [f"span {number}" for number in range(len(found) - 5)]
    assert len(found) > 100


def test_a_disk_that_fails_ends_the_trace_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    trace = ChromeTrace(tmp_path)
    trace._file = Full()  # type: ignore[assignment]
    trace.span("steps", "step", 1, 2)
    trace._thread.join(10)
    assert not trace._thread.is_alive()
    trace.span("steps", "step", 1, 2)
    assert not trace._events
    trace.close()
    assert "No space left" in caplog.text


def test_a_folder_that_cannot_be_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ChromeTrace(tmp_path / "file")
