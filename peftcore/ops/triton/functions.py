"""Functions of fp32 values for kernels, with errors below 1e-6 of the result.

Triton's `exp`, `log` and `/` compile to approximate instructions: its `exp` is off by up to 6e-6 at -88.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits of ln 2: multiplied by an integer below 2^15, it is exact in fp32
_LN2_LOW = tl.constexpr(-2.121944400546905827679e-4)


@triton.jit
def exp(x):
    """Return e^x for x up to 88: 2^n e^r, with r = x - n ln 2 between ±0.35 (Cody and Waite 1980, chapter 6)."""
    x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)  # where e^x is 0 in fp32
    n = tl.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    return tl.exp2(n) * tl.exp(r)


@triton.jit
def log(x):
    """Return the natural logarithm, computed in float64, which is exact next to 1 as well."""
    return tl.log(x.to(tl.float64)).to(tl.float32)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent.

    Up to 1/4 it is the Maclaurin series, and beyond ±(1 - e^-2|x|) / (1 + e^-2|x|), which would cancel next to 0.
    """
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    magnitude = tl.abs(x)
    e = exp(-2 * magnitude)
    beyond = (1 - e) / (1 + e)
    return tl.where(magnitude < 0.25, series, tl.where(x < 0, -beyond, beyond))
