"""Arithmetic of launchers. Triton's own, which kernels may call too, takes 6 us a call: a fifth of launching a step."""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """How many pieces of `size` it takes to cover `count`."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The lowest power of two that is not below: the sizes that a kernel's arrays may have."""
    return 1 << max(0, count - 1).bit_length()
