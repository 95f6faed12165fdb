"""What the tests of Triton kernels share: the device, and reports of kernels that are compiled for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

HERE = Path(__file__).parent
# Whole engines: where kernels fail, what these say tells more.
LAST: Final = ("test_fp8_model.py", "test_gpu_engine.py", "test_demo_on_gpu.py")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.path.name in LAST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """After an error such as an illegal access to memory a process gets nothing from its GPU any more, and each of its
    tests would fail. Where pytest-xdist has several, this one ends, and another one takes what is left."""
    result = yield
    if "PYTEST_XDIST_WORKER" in os.environ and not _device_answers():
        os._exit(1)
    return result


def _device_answers() -> bool:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; else the CPU, on which the kernels run in triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _errors_come_in_the_test_that_made_them(device: torch.device) -> Iterator[None]:
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def compiled_for_hopper() -> Callable[..., list[dict[str, Any]]]:
    """Given the names of functions in modules of this folder that call launchers with CPU tensors: the kernels that
    these compiled for Hopper, as sm90.py describes them."""
    if torch.cuda.is_available():
        pytest.skip("kernels run here: none has to be compiled for a GPU that is not there")

    def compile_them(*functions: str) -> list[dict[str, Any]]:
        paths = os.pathsep.join([str(HERE), *sys.path])
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(HERE / "sm90.py"), *functions]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return compile_them
