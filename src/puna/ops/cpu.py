"""Thin calls into the compiled kernels, and whether they are there at all."""

from __future__ import annotations

try:
    from puna import _kernels
except ImportError:  # a source tree that nothing was built in: everything runs on the reference ops
    _kernels = None  # type: ignore[assignment]


def compiled() -> bool:
    """Whether the compiled kernels are installed."""
    return _kernels is not None


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this processor that kernels can use, such as "avx2"; empty without compiled kernels."""
    return () if _kernels is None else tuple(_kernels.cpu_features())
