"""What the kernels' tests share: the compiled module, all of its instruction levels, and its settings put back."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Final

import pytest

try:
    from puna import _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

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
