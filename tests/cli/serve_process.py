"""`puna serve` as a process of its own, for tests of how it begins and ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest


class Serving:
    """A process that listens. `lines` has what it wrote to standard error, and grows."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            found = re.search(r"(http://[\d.]+:\d+)/v1", line)
            if found and not self.url:
                self.url = found[1]
                self._is_ready.set()
        self._is_ready.set()

    def wait_until_ready(self) -> None:
        assert self._is_ready.wait(60)
        assert self.url, self.text

    def exit_code(self, patience: float = 30) -> int:
        code = self.process.wait(patience)
        self._reader.join(10)
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def objects(self) -> list[dict[str, Any]]:
        """The lines as JSON objects, each of which must be one."""
        found = [json.loads(line) for line in self.lines]
        assert all(isinstance(one, dict) for one in found)
        return found


@contextmanager
def serving(
    *flags: str, before: Sequence[str] = ("-m", "puna"), model: str = "demo", **environment: str
) -> Iterator[Serving]:
    """The process once it is ready. `before`: what Python runs instead of puna's own command line."""
    command = [sys.executable, *before, "serve", "--model", model, "--port", "0", "--threads", "1", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    it = Serving(process)
    try:
        it.wait_until_ready()
        yield it
    finally:
        process.kill()
        process.wait()
        it._reader.join(10)
        assert process.stderr is not None
        process.stderr.close()


def fails_to_start(*flags: str, model: str = "demo") -> tuple[int, str]:
    """The exit code and standard error of a server that must not come up; it gets a minute."""
    command = [sys.executable, "-m", "puna", "serve", "--port", "0", "--model", model, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 0:
        pytest.fail(done.stderr)
    return done.returncode, done.stderr
