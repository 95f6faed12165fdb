"""What the kernels' tests share: the compiled module, all of its instruction levels, and its settings put back."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

try:
    from puna import _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

CHILD: Final = Path(__file__).resolve().parent / "fuzz_child.py"
CHILD_TIMEOUT_SECONDS: Final = 120
LEVELS: Final = [] if _kernels is None else _kernels.supported_levels()


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """The compiled module; its level and its number of threads are put back after the test."""
    module = pytest.importorskip("puna._kernels", reason="the compiled module is not built here")
    level, threads = module.level(), module.threads()
    yield module
    module.set_level(level)
    module.set_threads(threads)


@pytest.fixture(params=LEVELS or ["none"])
def level(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    """Each instruction level of this processor in turn, chosen."""
    kernels.set_level(request.param)
    name: str = request.param
    return name


class Child:
    """The process of fuzz_child.py, which makes calls that may crash; a new one after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def outcome(self, call: dict[str, Any]) -> str:
        """What came of a call: "ok", the name of an exception, or what is wrong."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(call) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], CHILD_TIMEOUT_SECONDS)[0]:
            self.close()
            return "no answer"
        answer = process.stdout.readline().strip()
        if not answer:
            code = process.wait()
            self._process = None
            return f"the process ended with {code}"
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    started = Child()
    yield started
    started.close()
