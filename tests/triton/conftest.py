"""What the tests of Triton kernels share: the device, and reports of kernels that are compiled for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def _count_in_interpreter() -> None:
    """Triton 3.6's interpreter keeps numbers as arrays of one element, which numpy 2.4 no longer takes for the bounds
    of a loop: kernels whose loops end where a tensor says would fail."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1":
    _count_in_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; else the CPU, on which the kernels run in triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def compiled_for_hopper() -> Callable[[str], list[dict[str, Any]]]:
    """Given the name of a function in a module of this folder that calls launchers with CPU tensors: the kernels that
    these compiled for Hopper, as sm90.py describes them."""

    def compile_them(function: str) -> list[dict[str, Any]]:
        paths = os.pathsep.join([str(HERE), *sys.path])
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(HERE / "sm90.py"), function]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return compile_them
