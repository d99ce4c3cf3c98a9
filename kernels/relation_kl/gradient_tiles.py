"""relation_kl's backward kernels: gradients as M_ij e_j, from row statistics and the log-sums that forward left.

The relations and weights R and U are those of ``tiles``.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.log_sums import LN2, LOG2E, shift_and_ratio
from gkd_fast.kernels.common.tile import (
    COUNTS,
    add_product,
    column_range,
    convert,
    divide_walk,
    edge_tile,
    inner_tile,
    load_columns,
    load_rows,
    load_tile,
    load_vector,
    number,
    place_among,
    product,
    store_rows,
    store_tile,
    store_vector,
)  # fmt: skip
from gkd_fast.kernels.relation_kl.tiles import relations, stage_rows


@triton.jit(do_not_specialize=COUNTS)
def relation_factors(
    upstream, losses, student_log_sums, teacher_log_sums, factors, power, row_count, upstream_row_stride,
    upstream_stride, outer: tl.float64, slope: tl.float64, S: tl.constexpr, T: tl.constexpr, WANTED: tl.constexpr,
    OWN_SHIFT: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The row statistics of the backward, times slope = 1/(σ²τ), of one side.

    α_s = Σ_t g_st/Z^s, β_ts = g_st/Z^t, η_t = Σ_s β_ts (ℓ_st + log Z^t − log Z^s); Z in units of the weights U, with
    OWN_SHIFT what log2 Z, the shift, was rounded by.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    place = (i + row).to(tl.int64) * upstream_row_stride
    inside = row < row_count - i
    unit = number(slope, SUM)
    if SCALED:
        unit = unit * tl.load(power)
    log_sums = ()
    inverse = ()
    for q in tl.static_range(S + T):
        if q < S:
            log_z = load_vector(student_log_sums + q * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)
        else:
            log_z = load_vector(teacher_log_sums + (q - S) * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)
        log_sums = log_sums + (log_z,)
        if OWN_SHIFT:
            shift, ratio = shift_and_ratio(log_z, SUM)
            out = factors + (S + T * S + T + q) * number(row_count, tl.int64)
            store_vector(out, shift, i, row_count, BLOCK_ROWS)
        else:
            ratio = tl.exp2((number(outer, SUM) - log_z * LOG2E).to(SUM))
        inverse = inverse + (ratio,)
    for s in tl.static_range(S):
        total = tl.zeros([BLOCK_ROWS], SUM)
        for t in tl.static_range(T):
            total += tl.load(upstream + place + (s * upstream_stride + t), mask=inside, other=0)
        store_vector(factors + s * number(row_count, tl.int64), total * inverse[s] * unit, i, row_count, BLOCK_ROWS)
    for t in tl.static_range(T):
        eta = tl.zeros([BLOCK_ROWS], SUM)
        for s in tl.static_range(S):
            g = tl.load(upstream + place + (s * upstream_stride + t), mask=inside, other=0)
            beta = g * inverse[S + t] * unit
            out = factors + (S + t * S + s) * number(row_count, tl.int64)
            store_vector(out, beta, i, row_count, BLOCK_ROWS)
            if WANTED >> S:
                loss = tl.load(losses + place + (s * upstream_stride + t), mask=inside, other=0)
                eta += beta * (loss + (log_sums[S + t] - log_sums[s]).to(SUM))
        store_vector(factors + (S + T * S + t) * number(row_count, tl.int64), eta, i, row_count, BLOCK_ROWS)


@triton.constexpr_function
def num_factors(S, T):
    """Row statistics of the backward: α [S], β [T, S], η [T] and the shifts [S + T]."""
    return S + T * S + T + S + T


@triton.constexpr_function
def is_read(k, S, T, wanted, own_shift):
    """Whether factor k enters a gradient whose stage's bit of ``wanted`` is set."""
    if k < S:
        return bool(wanted >> k & 1)
    k -= S
    if k < T * S:
        return bool((wanted >> k % S | wanted >> S + k // S) & 1)
    k -= T * S
    if k < T:
        return bool(wanted >> S + k & 1)
    return own_shift


@triton.jit
def both_sides(weights, mirrored, row_factor, column_factor, OWN_SHIFT: tl.constexpr):
    """U_ij·f_i + U_ji·f_j."""
    if OWN_SHIFT:
        return weights * row_factor + mirrored * column_factor
    else:
        return weights * (row_factor + column_factor)


@triton.jit
def load_row_factors(
    factors, i, count, BLOCK: tl.constexpr, S: tl.constexpr, T: tl.constexpr, WANTED: tl.constexpr,
    OWN_SHIFT: tl.constexpr,
):  # fmt: skip
    """α [S], β [T, S], η [T] and, with OWN_SHIFT, the shifts [S + T] of a block of rows; 0 where not read."""
    loaded = ()
    for k in tl.static_range(num_factors(S, T)):
        if is_read(k, S, T, WANTED, OWN_SHIFT):
            loaded = loaded + (load_vector(factors + k * number(count, tl.int64), i, count, BLOCK)[:, None],)
        else:
            loaded = loaded + (0.0,)
    return loaded


@triton.jit
def column_factor(factors, k: tl.constexpr, j, count, BLOCK: tl.constexpr):
    """Factor k of a tile's columns; loaded where it is used, so that its registers are not held during a product."""
    return load_vector(factors + k * number(count, tl.int64), j, count, BLOCK)[None, :]


@triton.jit
def stage_weights(
    own, columns, dims, q: tl.constexpr, i, j, row_count, column_count, offset, mine, column_factors, inner, outer,
    S: tl.constexpr, T: tl.constexpr, OWN_SHIFT: tl.constexpr, EDGE: tl.constexpr, STRIP: tl.constexpr,
    ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """R, U_ij, U_ji (the same unless OWN_SHIFT) and the columns of stage q's tile."""
    if STRIP:
        other = load_tile(columns[q], i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        c = other
    else:
        other = load_columns(columns[q], j, column_count, dims[q], BLOCK_COLUMNS, WIDTH, TYPE, ALIGNED)
        c = product(own[q], tl.trans(other), PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    r = relations(c, i, j, offset, column_count, inner, 0.0, BLOCK_ROWS, BLOCK_COLUMNS, POLYNOMIALS, EDGE)
    k: tl.constexpr = S + T * S + T + q
    weights, mirrored = relation_weights(
        r, mine[k], column_factors, k, j, column_count, outer, OWN_SHIFT, BLOCK_COLUMNS
    )
    return r, weights, mirrored, other


@triton.jit
def relation_weights(
    r, row_shift, column_factors, k: tl.constexpr, j, column_count, outer, OWN_SHIFT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """U_ij and U_ji, the same unless OWN_SHIFT; factor k is the columns' shift."""
    if OWN_SHIFT:
        shift = column_factor(column_factors, k, j, column_count, BLOCK_COLUMNS)
        return tl.exp2(r * outer - row_shift), tl.exp2(r * outer - shift)
    else:
        weights = tl.exp2(r * outer - outer)
        return weights, weights


@triton.jit
def add_gradients(
    total, own, columns, dims, gradients, mine, column_factors, i, j, row_count, column_count, offset, inner, outer,
    S: tl.constexpr, T: tl.constexpr, WANTED: tl.constexpr, OWN_SHIFT: tl.constexpr, EDGE: tl.constexpr,
    STRIP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """The wanted stages' gradients with M_ij e_j of the tile at (i, j) added; with STRIP the tile of M is stored."""
    # Teachers first: students need of them only crossed_s = Σ_t U^t (β_it + β_jt).
    crossed = ()
    teachers = ()
    for t in tl.static_range(T):
        stage = stage_weights(
            own, columns, dims, S + t, i, j, row_count, column_count, offset, mine, column_factors, inner, outer, S, T,
            OWN_SHIFT, EDGE, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION, POLYNOMIALS,
        )  # fmt: skip
        new = ()
        for s in tl.static_range(S):
            if (WANTED >> s) & 1:
                beta = column_factor(column_factors, S + t * S + s, j, column_count, BLOCK_COLUMNS)
                term = both_sides(stage[1], stage[2], mine[S + t * S + s], beta, OWN_SHIFT)
                if t > 0:
                    term += crossed[len(new)]
                new = new + (term,)
        crossed = new
        if WANTED >> S:
            teachers = teachers + (stage,)
    students = ()
    new = ()
    for s in tl.static_range(S):
        if (WANTED >> S) | ((WANTED >> s) & 1):
            stage = stage_weights(
                own, columns, dims, s, i, j, row_count, column_count, offset, mine, column_factors, inner, outer, S, T,
                OWN_SHIFT, EDGE, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION, POLYNOMIALS,
            )  # fmt: skip
            if (WANTED >> s) & 1:
                alpha = column_factor(column_factors, s, j, column_count, BLOCK_COLUMNS)
                m = both_sides(stage[1], stage[2], mine[s], alpha, OWN_SHIFT) - crossed[place_among(WANTED, s)]
                m = convert(stage[0] * m, TYPE)
                if STRIP:
                    store_tile(gradients[place_among(WANTED, s)], m, i, j, row_count, column_count, BLOCK_ROWS,
                               BLOCK_COLUMNS)  # fmt: skip
                else:
                    new = new + (add_product(m, stage[3], total[len(new)], PRECISION),)
            if WANTED >> S:
                students = students + (stage[0],)
    for t in tl.static_range(T):
        if (WANTED >> (S + t)) & 1:
            stage = teachers[t]
            eta = column_factor(column_factors, S + T * S + t, j, column_count, BLOCK_COLUMNS)
            m = -both_sides(stage[1], stage[2], mine[S + T * S + t], eta, OWN_SHIFT)
            for s in tl.static_range(S):
                beta = column_factor(column_factors, S + t * S + s, j, column_count, BLOCK_COLUMNS)
                difference = (stage[0] - students[s]) * (outer * LN2)
                m += difference * both_sides(stage[1], stage[2], mine[S + t * S + s], beta, OWN_SHIFT)
            m = convert(stage[0] * m, TYPE)
            if STRIP:
                store_tile(gradients[place_among(WANTED, S + t)], m, i, j, row_count, column_count, BLOCK_ROWS,
                           BLOCK_COLUMNS)  # fmt: skip
            else:
                new = new + (add_product(m, stage[3], total[len(new)], PRECISION),)
    return new


@triton.jit(do_not_specialize=COUNTS)
def relation_gradients(
    rows, columns, dims, gradients, row_factors, column_factors, power, first_row, row_count, column_count, offset,
    parts, accumulate, inner: tl.float64, outer: tl.float64, S: tl.constexpr, T: tl.constexpr, WANTED: tl.constexpr,
    OWN_SHIFT: tl.constexpr, SCALED: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j over the part's columns, for the stages whose bit of WANTED is set.

    With the factors scaled by 1/(σ²τ): M^s = R^s [U^s (α_i + α_j) − Σ_t U^t (β_it + β_jt)] and
    M^t = R^t U^t [Σ_s (L^t − L^s)(β_is + β_js) − (η_i + η_j)]. The rows are those from ``first_row``. With STRIP the
    columns are strips of similarities and the gradients strips of M.
    """
    i = first_row + tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    inner, outer = number(inner, SUM), number(outer, SUM)
    own = stage_rows(rows, dims, i - first_row, row_count - first_row, S + T, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, TYPE)
    total = ()
    for q in tl.static_range(S + T):
        if (WANTED >> q) & 1 and not STRIP:
            total = total + (tl.zeros([BLOCK_ROWS, WIDTH], SUM),)
    mine = load_row_factors(row_factors, i, row_count, BLOCK_ROWS, S, T, WANTED, OWN_SHIFT)
    # A second loop for the edges would cost operands of 32 bits their registers.
    if TYPE.primitive_bitwidth > 16:
        for j in range(start, stop, BLOCK_COLUMNS):
            total = add_gradients(
                total, own, columns, dims, gradients, mine, column_factors, i, j, row_count, column_count, offset,
                inner, outer, S, T, WANTED, OWN_SHIFT, None, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                PRECISION, POLYNOMIALS,
            )  # fmt: skip
    else:
        whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
        for k in range(0, whole - crossed):
            j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
            total = add_gradients(
                total, own, columns, dims, gradients, mine, column_factors, i, j, row_count, column_count, offset,
                inner, outer, S, T, WANTED, OWN_SHIFT, False, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                PRECISION, POLYNOMIALS,
            )  # fmt: skip
        for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
            j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
            total = add_gradients(
                total, own, columns, dims, gradients, mine, column_factors, i, j, row_count, column_count, offset,
                inner, outer, S, T, WANTED, OWN_SHIFT, True, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                PRECISION, POLYNOMIALS,
            )  # fmt: skip
    if not STRIP:
        if SCALED:
            unscale = 1.0 / tl.load(power)
        for q in tl.static_range(S + T):
            if (WANTED >> q) & 1:
                out = gradients[place_among(WANTED, q)] + part * number(row_count, tl.int64) * dims[q]
                gradient = total[place_among(WANTED, q)]
                if SCALED:
                    gradient = gradient * unscale
                before = load_rows(out, i, row_count * accumulate, dims[q], BLOCK_ROWS, WIDTH, SUM)
                store_rows(out, before + gradient, i, row_count, dims[q], BLOCK_ROWS, WIDTH)
