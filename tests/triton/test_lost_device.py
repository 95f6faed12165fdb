"""Where an error of the device makes a process of no use, only the test that made it fails: see conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import importlib.util
import sys
import types

broken = []


def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


cuda = types.SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
spec = importlib.util.spec_from_file_location("gpu_tests", {path!r})
gpu_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_tests)
pytest_runtest_protocol = gpu_tests.pytest_runtest_protocol
"""
TESTS = """
import os
import sys

conftest = sys.modules["conftest"]


def test_before(): ...


def test_that_breaks_it():
    conftest.broken.append(True)
    assert "the kernel" == "is wrong"


def test_behind():
    assert not conftest.broken
"""


def test_tests_behind_a_lost_device_run_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(path=str(Path(__file__).with_name("conftest.py"))))
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = ["-p", "xdist", "-n", "1", "-vv", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "PASSED test_some.py::test_before" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_some.py::test_that_breaks_it" in done.stdout
    assert "assert 'the kernel' == 'is wrong'" in done.stdout
    assert "crashed while running" in done.stdout
    assert "PASSED test_some.py::test_behind" in done.stdout
