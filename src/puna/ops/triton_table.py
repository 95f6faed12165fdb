"""Which ops the Triton kernels have, for which devices and sizes; the choice that TritonBackend passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from puna.ops import OpSpec


def function(op: str, spec: OpSpec) -> Callable[..., Any] | str:
    """The launcher of an op, or the reason why there is none for this spec."""
    return f"there is no kernel for {op}"
