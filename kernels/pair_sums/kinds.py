"""The losses that pair_sums knows, by their formulas in ``duals``.

x and y are the products s_i·s_j and t_i·t_j, A the terms of row i and B those of row j, c constants. ``sums_of``: what
a pair adds to the sums of row i. ``slopes_of``: the derivatives by x, y and A of Σ_i g_i sum_i, both rows' sums in it.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.duals import inverse, log_ratio, minus, negative, over, plus, root, select, times

# Sides, terms per row and sums per row.
KINDS = {
    "absolute_sums": (1, 0, 1),
    "distances": (1, 1, 1),
    "rkd_distance": (2, 2, 3),
    "polynomial": (2, 0, 1),
    "pkt": (2, 2, 1),
}


@triton.jit
def distance(x, n_i, n_j, is_own):
    """d = √(n_i + n_j − 2x) and 1/d; d is 1e-6 at least, 0 of a row and itself, and 1/d is 0 where d does not depend on
    the rows. Of rows that are alike but for roundings nothing is left of the difference either."""
    squares = plus(n_i, n_j)
    square = minus(squares, plus(x, x))
    if square[0].dtype == tl.float64:
        rounding = squares[0] * 4e-15
    else:
        rounding = squares[0] * 2e-6
    known = (square[0] > rounding) & (square[0] > 1e-12) & (is_own == 0)
    # A NaN stays one.
    known = known | (square[0] != square[0])
    d = root(select(known, square, (tl.full(square[0].shape, 1e-12, square[0].dtype),)))
    none = (tl.zeros(square[0].shape, square[0].dtype),)
    least = (tl.where(is_own, 0.0, 1e-6).to(square[0].dtype),)
    return select(known, d, least), select(known, inverse(d), none)


@triton.jit
def huber_slope(z):
    """ρ' of Huber's function ρ(z) = ρ'(z − ρ'/2): z within [−1, 1]."""
    one = (tl.full(z[0].shape, 1.0, z[0].dtype),)
    return select(z[0] > 1, one, select(z[0] < -1, negative(one), z))


@triton.jit
def polynomial(x, c, COUNT: tl.constexpr):
    """K(x) = Σ_p c_p x^p and K'."""
    k = (tl.zeros(x[0].shape, x[0].dtype) + c[COUNT - 1][0],)
    slope = (tl.zeros(x[0].shape, x[0].dtype),)
    for p in tl.static_range(COUNT - 1):
        slope = plus(times(slope, x), k)
        k = plus(times(k, x), (c[COUNT - 2 - p][0],))
    return k, slope


@triton.jit
def shifted(x):
    """1 + x, not below 0 where rounded rows are longer than 1."""
    u = plus(x, (1.0,))
    return select(u[0] < 0, (tl.zeros(u[0].shape, u[0].dtype),), u)


@triton.jit
def sums_of(x, y, A, B, c, is_own, KIND: tl.constexpr, COUNT: tl.constexpr):
    """What the pairs of a tile add to the sums of its rows."""
    if KIND == "absolute_sums":
        # 0 has no tangent, as it has no slope.
        none = times((0.0,), x)
        return (select(x[0] < 0, negative(x), select(x[0] == 0, none, x)),)
    elif KIND == "distances":
        return (distance(x, A[0], B[0], is_own)[0],)
    elif KIND == "rkd_distance":
        s = distance(x, A[0], B[0], is_own)[0]
        t = distance(y, A[1], B[1], is_own)[0]
        z = minus(times(c[0], s), times(c[1], t))
        rho = huber_slope(z)
        return times(rho, minus(z, times(rho, (0.5,)))), times(rho, s), negative(times(rho, t))
    elif KIND == "polynomial":
        difference = minus(polynomial(x, c, COUNT)[0], polynomial(y, c, COUNT)[0])
        return (times(difference, difference),)
    else:
        p, q = times(A[0], shifted(x)), times(A[1], shifted(y))
        return (times(q, log_ratio(plus(q, (c[0][0],)), plus(p, (c[0][0],)))),)


@triton.jit
def slopes_of(x, y, A, B, c, g, h, is_own, KIND: tl.constexpr, COUNT: tl.constexpr, TEACHER: tl.constexpr):
    """The slopes by x, y (with TEACHER) and the row's terms; g and h: the upstream of the rows and of the columns."""
    if KIND == "absolute_sums":
        none = (tl.zeros(x[0].shape, x[0].dtype),)
        sign = select(x[0] < 0, (none[0] - 1,), select(x[0] > 0, (none[0] + 1,), none))
        # |x| is linear on either side of 0, where a tangent's part of x is none.
        return (times(sign, (g + h,)),), ()
    elif KIND == "distances":
        w = times((0.5 * (g + h),), distance(x, A[0], B[0], is_own)[1])
        return (times((-2.0,), w),), (w,)
    elif KIND == "rkd_distance":
        s = distance(x, A[0], B[0], is_own)
        t = distance(y, A[1], B[1], is_own)
        rho = times(huber_slope(minus(times(c[0], s[0]), times(c[1], t[0]))), (0.5 * (g + h),))
        w = times(plus(times(c[0], rho), c[2]), s[1])
        if TEACHER:
            u = times(minus(c[3], times(c[1], rho)), t[1])
            return (times((-2.0,), w), times((-2.0,), u)), (w, u)
        else:
            return (times((-2.0,), w),), (w,)
    elif KIND == "polynomial":
        k, slope = polynomial(x, c, COUNT)
        other, other_slope = polynomial(y, c, COUNT)
        twice = times((2.0 * (g + h),), minus(k, other))
        if TEACHER:
            return (times(twice, slope), negative(times(twice, other_slope))), ()
        else:
            return (times(twice, slope),), ()
    else:
        u, v = shifted(x), shifted(y)
        own = pkt_slopes(u, v, A, c, g, TEACHER)
        mirrored = pkt_slopes(u, v, B, c, h, TEACHER)
        student = plus(times(own[0], A[0]), times(mirrored[0], B[0]))
        if TEACHER:
            teacher = plus(times(own[1], A[1]), times(mirrored[1], B[1]))
            return (student, teacher), (times(own[0], u), times(own[1], v))
        else:
            return (student,), (times(own[0], u),)


@triton.jit
def pkt_slopes(u, v, A, c, g, TEACHER: tl.constexpr):
    """The derivatives of g q log((q + ε)/(p + ε)) by p = A_0 u and q = A_1 v."""
    p, q = times(A[0], u), times(A[1], v)
    p_eps, q_eps = plus(p, (c[0][0],)), plus(q, (c[0][0],))
    by_p = negative(times((g,), over(q, p_eps)))
    if TEACHER:
        return by_p, times((g,), plus(log_ratio(q_eps, p_eps), over(q, q_eps)))
    else:
        return (by_p,)
