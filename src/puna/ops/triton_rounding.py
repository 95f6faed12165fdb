"""Rounding inside of Triton kernels: the same bits as torch's, on GPUs and in triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels are interpreted, which triton decides when it is imported. The interpreter rounds half up to bfloat16
# and FP8, and loses carries into the exponent; what is representable it converts right.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to `dtype`, to the nearest, ties to even. For FP8, which has no infinity, first clamp to 448."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            value = tl.where(value == value, up.to(tl.float32, bitcast=True), value)
        elif dtype == tl.float8e4nv:
            # Three bits behind the leading one, and no finer than the subnormal numbers, 2^-9. It makes NaN of 480.
            bits = value.to(tl.int32, bitcast=True)
            shift = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), 2.0**-6) * (1.5 * 2**20)
            nearest = ((value + shift) - shift).to(tl.int32, bitcast=True) | (bits & -0x80000000)  # the sign of -0 too
            value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), 480.0)
    return value.to(dtype)


@triton.jit
def highest(value, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The highest absolute value of float32 numbers along an axis, NaN if there is one: its bits are the highest."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def nearest_integer(value):  # type: ignore[no-untyped-def]
    """float32 below 2^22 to the nearest integer, ties to even. Launch with enable_fp_fusion=False where a product comes
    before it: fused, that product would not be rounded."""
    return (value + 12582912.0) - 12582912.0
