"""What every test shares: one thread per process, and the folder of shared data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before anything imports triton: without an NVIDIA driver its kernels run in its interpreter, on the CPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Programs that are started in the background by a script ignore Ctrl-C, and so would the ones that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports torch, so that tests without torch need not; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared/data` beside the repository: texts and a small model, which not every machine has."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
