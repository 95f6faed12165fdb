"""benchmarks/server_soak.py for two minutes: a server under 32 clients that leave and are killed, and then at rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("httpx")
SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "server_soak.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the server's memory from /proc")
def test_two_minutes(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--minutes", "2", "--concurrency", "32", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert file.exists(), done.stderr
    report = json.loads(file.read_text())
    assert report["wrong"] == [], done.stderr
    assert report["left_over"] == {}, done.stderr
    assert report["tracebacks"] == 0
    assert report["exit_code"] == 0
    assert report["is_good"], report["memory_growth"]
    assert done.returncode == 0
    # Not that nothing happened.
    assert {"the same", "answered", "left", "cut off", "refused"} <= report["ends"].keys()
    assert report["ends"]["the same"] > 20
    assert report["kills"] > 5
    assert report["preemptions"] > 0
    assert len(report["samples"]) > 4
