# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Weights of tokens as whole numbers, from which tokens are drawn on GPUs; the same as in csrc/kernels/draw.h.

A weight is exp(scaled logit) in units of 2**-35, by the same polynomial with the same fused multiplications; kernels
that call these are launched with enable_fp_fusion=False. Sums of whole numbers do not depend on their order, so a row
may be cut among as many programs as there are multiprocessors without a change in any bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

_WEIGHT_UNITS = tl.constexpr(34359738368.0)  # 2**35
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def exp(x):
    """exp of what is 0 or below, as csrc/vec.h computes it, to the bit."""
    x = tl.maximum(x, -87.3)
    # Adding 1.5 * 2**23 rounds to a whole number. The compiler must not fuse the product into it: enable_fp_fusion.
    n = (x * 1.44269504088896341 + 12582912.0) - 12582912.0
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440e-4, r)
    p = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    p = tl.fma(p, r, 1.0 / 120)
    p = tl.fma(p, r, 1.0 / 24)
    p = tl.fma(p, r, 1.0 / 6)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p, r, 1.0)
    p = tl.fma(p, r, 1.0)
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale(value, peak, heat):
    """What is left of a logit below the highest one, over the temperature; exact division takes a dozen instructions,
    of sixty for a token, which the usual temperature need not pay."""
    scaled = value - peak
    if heat != 1.0:
        scaled = tl.div_rn(scaled, heat)
    return scaled


@triton.jit
def weight_of(relative):
    return (relative * _WEIGHT_UNITS).to(tl.int64)


@triton.jit
def is_drawn(highest, temperature):
    return (tl.abs(highest) < _INFINITY) & (temperature > 0) & (temperature < _INFINITY)
