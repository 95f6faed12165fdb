"""The progress bar: on a terminal, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[..., Any]
COMMAND = "import sys; from puna.models import load_model; load_model(sys.argv[1]); print('loaded')"


def on_a_terminal(folder: Path) -> str:
    """What a process whose standard error is a terminal writes there."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    child = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(folder)], stdout=subprocess.PIPE, stderr=slave, env=environment
    )
    os.close(slave)
    output = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the terminal's other side was closed
            break
        if not part:
            break
        output += part
    stdout, _ = child.communicate(timeout=60)
    os.close(master)
    assert (child.returncode, stdout) == (0, b"loaded\n"), output
    return output.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_bar_on_a_terminal(make: Make) -> None:
    written = on_a_terminal(make().path)
    assert "loading weights" in written
    assert "kB" in written
    assert written.rstrip("\r\n").endswith("\x1b[2K")  # the line is cleared when the loading is done


def test_no_bar_elsewhere(make: Make) -> None:
    child = subprocess.run(
        [sys.executable, "-c", COMMAND, str(make().path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert (child.stdout, child.stderr) == ("loaded\n", "")
