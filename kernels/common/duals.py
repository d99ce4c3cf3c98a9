"""Numbers of a tile with their tangents: (v, v˙), or (v,) of what stands still, which costs nothing.

One formula in them gives a loss, its slopes and the tangents of both.
"""

import triton
import triton.language as tl


@triton.jit
def negative(a):
    if len(a) == 1:
        return (-a[0],)
    else:
        return (-a[0], -a[1])


@triton.jit
def plus(a, b):
    if len(a) == 1 and len(b) == 1:
        return (a[0] + b[0],)
    elif len(a) == 1:
        return (a[0] + b[0], b[1])
    elif len(b) == 1:
        return (a[0] + b[0], a[1])
    else:
        return (a[0] + b[0], a[1] + b[1])


@triton.jit
def minus(a, b):
    return plus(a, negative(b))


@triton.jit
def times(a, b):
    if len(a) == 1 and len(b) == 1:
        return (a[0] * b[0],)
    elif len(a) == 1:
        return (a[0] * b[0], a[0] * b[1])
    elif len(b) == 1:
        return (a[0] * b[0], a[1] * b[0])
    else:
        return (a[0] * b[0], a[0] * b[1] + a[1] * b[0])


@triton.jit
def inverse(a):
    if len(a) == 1:
        return (1.0 / a[0],)
    else:
        return (1.0 / a[0], -a[1] / (a[0] * a[0]))


@triton.jit
def over(a, b):
    return times(a, inverse(b))


@triton.jit
def root(a):
    v = tl.sqrt(a[0])
    if len(a) == 1:
        return (v,)
    else:
        return (v, a[1] / (2.0 * v))


@triton.jit
def log_ratio(a, b):
    """log(a/b) of positive numbers; near 1 it is 2 artanh((a − b)/(a + b))."""
    v = tl.log(a[0] / b[0])
    if v.dtype != tl.float64:
        x = (a[0] - b[0]) / (a[0] + b[0])
        square = x * x
        near = 2 * x * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7))))
        v = tl.where(tl.abs(x) < 1 / 8, near, v)
    if len(a) == 1 and len(b) == 1:
        return (v,)
    elif len(a) == 1:
        return (v, -b[1] / b[0])
    elif len(b) == 1:
        return (v, a[1] / a[0])
    else:
        return (v, a[1] / a[0] - b[1] / b[0])


@triton.jit
def select(condition, a, b):
    """a where the condition holds, else b."""
    v = tl.where(condition, a[0], b[0])
    if len(a) == 1 and len(b) == 1:
        return (v,)
    elif len(a) == 1:
        return (v, tl.where(condition, 0.0, b[1]))
    elif len(b) == 1:
        return (v, tl.where(condition, a[1], 0.0))
    else:
        return (v, tl.where(condition, a[1], b[1]))


@triton.jit
def tangent(a):
    """v˙, 0 of what stands still."""
    if len(a) == 1:
        return a[0] * 0.0
    else:
        return a[1]
