"""relation_kl's second order. Along directions of the stages, with υ = ċ/σ² and ρ = R υ/τ, relations move at R˙ = R υ
and weights at U˙ = U ρ. The factors of U in the backward, α, β and η, move too: what M = R X (``relation_gradients``)
becomes is M˙ = υ M + R X˙.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.log_sums import LN2
from gkd_fast.kernels.common.strips import store_strip
from gkd_fast.kernels.common.tangents import HARDWARE_ONLY, both_sides_numbers, similarities
from gkd_fast.kernels.common.tile import COUNTS, NOWHERE, load_vector, number, place_among, store_vector
from gkd_fast.kernels.relation_kl.gradient_tiles import both_sides, column_factor, num_factors, relation_weights
from gkd_fast.kernels.relation_kl.tiles import relations


@triton.jit
def stage_similarities(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
    q: tl.constexpr, i, j, row_count, column_count, MOVING: tl.constexpr, APART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """c − 1 and ċ of stage q's tile; numbers are distances, and of tangents products with the stage's centre."""
    near = both_sides_numbers(numbers[q], column_numbers[q], i, j, BLOCK_ROWS, BLOCK_COLUMNS)
    if (MOVING >> q) & 1:
        place: tl.constexpr = place_among(MOVING, q)
        c, moving = similarities(
            rows[q], row_tangents[place], columns[q], column_tangents[place], i, j, row_count, column_count, dims[q],
            True, True, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
        )  # fmt: skip
        along = both_sides_numbers(row_along[place], column_along[place], i, j, BLOCK_ROWS, BLOCK_COLUMNS)
        return c - near, moving + along
    else:
        c, moving = similarities(
            rows[q], rows[q], columns[q], columns[q], i, j, row_count, column_count, dims[q], False, False, APART,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
        )  # fmt: skip
        return c - near, moving


@triton.jit(do_not_specialize=COUNTS)
def relation_tangent_sums(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
    sums, shifts, levels, row_count, column_count, offset,
    inner: tl.float64, outer: tl.float64, S: tl.constexpr, T: tl.constexpr, MOVING: tl.constexpr,
    OWN_SHIFT: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH:
    tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[column block, k, i]: of every stage Σ_j U and Σ_j U ρ; after those of a teacher, of its pairs
    Σ_j U^t [(Δ − h) ρ^t − ρ^s], Δ = (R^t − R^s)/τ. Both sums of a stage have the same roundings, so that their quotient
    loses least where tangents cancel.

    shifts: log2 Z [S + T, row_count], read with OWN_SHIFT.  levels: h [T, S, row_count].  MOVING: the stages that move.
    """
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    inner, outer = number(inner, SUM), number(outer, SUM)
    out = sums + number(tl.program_id(0), tl.int64) * row_count * (2 * (S + T) + S * T)
    students = ()
    for q in tl.static_range(S + T):
        c, moving = stage_similarities(
            rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
            q, i, j, row_count, column_count, MOVING, APART,
            BLOCK_ROWS,
            BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
        )  # fmt: skip
        r = relations(c * inner, i, j, offset, column_count, NOWHERE, BLOCK_ROWS, BLOCK_COLUMNS, HARDWARE_ONLY,
                      None)  # fmt: skip
        if OWN_SHIFT:
            shift = load_vector(shifts + q * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)[:, None]
            weights = tl.exp2(r * outer - shift)
        else:
            weights = tl.exp2(r * outer - outer)
        rate = r * moving * (inner * outer * (LN2 * LN2))
        store_vector(out, tl.sum(weights, 1), i, row_count, BLOCK_ROWS)
        store_vector(out + row_count, tl.sum(weights * rate, 1), i, row_count, BLOCK_ROWS)
        out += 2 * number(row_count, tl.int64)
        if q < S:
            students = students + ((r, rate),)
        else:
            for s in tl.static_range(S):
                level = levels + ((q - S) * S + s) * number(row_count, tl.int64)
                h = load_vector(level, i, row_count, BLOCK_ROWS)[:, None]
                difference = (r - students[s][0]) * (outer * LN2) - h
                term = tl.sum(weights * (difference * rate - students[s][1]), 1)
                store_vector(out, term, i, row_count, BLOCK_ROWS)
                out += number(row_count, tl.int64)


@triton.jit
def stage_tangents(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
    q: tl.constexpr, i, j, row_count, column_count, offset,
    row_factors, column_factors, inner, outer, S: tl.constexpr, T: tl.constexpr, MOVING: tl.constexpr, OWN_SHIFT:
    tl.constexpr,
    APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM:
    tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """R, U_ij, U_ji and υ of stage q's tile."""
    c, moving = stage_similarities(
        rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
        q, i, j, row_count, column_count, MOVING, APART, BLOCK_ROWS,
        BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
    )  # fmt: skip
    r = relations(c * inner, i, j, offset, column_count, 0.0, BLOCK_ROWS, BLOCK_COLUMNS, HARDWARE_ONLY, None)
    shift = 0.0
    if OWN_SHIFT:
        shift = row_factor(row_factors, S + T * S + T + q, i, row_count, BLOCK_ROWS)
    weights, mirrored = relation_weights(
        r, shift, column_factors, S + T * S + T + q, j, column_count, outer, OWN_SHIFT, BLOCK_COLUMNS
    )
    return r, weights, mirrored, moving * (inner * LN2)


@triton.jit
def row_factor(factors, k: tl.constexpr, i, count, BLOCK: tl.constexpr):
    """Factor k of a tile's rows."""
    return load_vector(factors + k * number(count, tl.int64), i, count, BLOCK)[:, None]


@triton.jit
def moving_factor(
    stage, k: tl.constexpr, row_factors, column_factors, i, j, row_count, column_count, outer, FACTORS: tl.constexpr,
    MOVES: tl.constexpr, OWN_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """U_ij f_i + U_ji f_j of factor k, and its tangent. Factors are loaded where they are used, to hold no
    registers."""
    mine = row_factor(row_factors, k, i, row_count, BLOCK_ROWS)
    other = column_factor(column_factors, k, j, column_count, BLOCK_COLUMNS)
    still = both_sides(stage[1], stage[2], mine, other, OWN_SHIFT)
    mine = row_factor(row_factors, FACTORS + k, i, row_count, BLOCK_ROWS)
    other = column_factor(column_factors, FACTORS + k, j, column_count, BLOCK_COLUMNS)
    moving = both_sides(stage[1], stage[2], mine, other, OWN_SHIFT)
    if MOVES:
        moving += still * (stage[0] * stage[3] * (outer * LN2))
    return still, moving


@triton.jit(do_not_specialize=COUNTS)
def relation_double_gradients(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
    moving, still, sums, row_factors, column_factors, row_count,
    column_count, offset, inner: tl.float64, outer: tl.float64, S: tl.constexpr, T: tl.constexpr, WANTED: tl.constexpr,
    MOVING: tl.constexpr, OWN_SHIFT: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS:
    tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strips of M˙ (``moving``) of the stages whose bit of WANTED is set, and of M (``still``) where they move;
    sums[column block, wanted stage, i]: of M˙.

    The factors are those of ``relation_gradients`` and after them the tangents of α, β and η. Of students
    X˙ = [α]˙ − Σ_t [β]˙, where [f] = U_ij f_i + U_ji f_j and [f]˙ = [ḟ] + ρ [f]; of teachers, with Δ = (R^t − R^s)/τ,
    X˙ = Σ_s (Δ [β]˙ + (ρ^t − ρ^s) [β]) − [η]˙.
    """
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    inner, outer = number(inner, SUM), number(outer, SUM)
    FACTORS: tl.constexpr = num_factors(S, T)
    # Teachers first: students need of them only Σ_t [β] and its tangent.
    crossed = ()
    teachers = ()
    for t in tl.static_range(T):
        stage = stage_tangents(
            rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
            S + t, i, j, row_count, column_count, offset,
            row_factors,
            column_factors, inner, outer, S, T, MOVING, OWN_SHIFT, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
            PRECISION,
        )  # fmt: skip
        new = ()
        for s in tl.static_range(S):
            if (WANTED >> s) & 1:
                beta = moving_factor(
                    stage, S + t * S + s, row_factors, column_factors, i, j, row_count, column_count, outer, FACTORS,
                    (MOVING >> (S + t)) & 1, OWN_SHIFT, BLOCK_ROWS, BLOCK_COLUMNS,
                )  # fmt: skip
                if t > 0:
                    beta = (crossed[len(new)][0] + beta[0], crossed[len(new)][1] + beta[1])
                new = new + (beta,)
        crossed = new
        if WANTED >> S:
            teachers = teachers + (stage,)
    students = ()
    for s in tl.static_range(S):
        if (WANTED >> S) | ((WANTED >> s) & 1):
            stage = stage_tangents(
                rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, dims,
                s, i, j, row_count, column_count, offset,
                row_factors,
                column_factors, inner, outer, S, T, MOVING, OWN_SHIFT, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                SUM,
                PRECISION,
            )  # fmt: skip
            if (WANTED >> s) & 1:
                x = moving_factor(
                    stage, s, row_factors, column_factors, i, j, row_count, column_count, outer, FACTORS,
                    (MOVING >> s) & 1, OWN_SHIFT, BLOCK_ROWS, BLOCK_COLUMNS,
                )  # fmt: skip
                behind = crossed[place_among(WANTED, s)]
                store_weights(stage, x[0] - behind[0], x[1] - behind[1], moving, still, sums,
                              i, j, row_count, column_count,
                              s, WANTED, MOVING, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)  # fmt: skip
            if WANTED >> S:
                students = students + (stage,)
    for t in tl.static_range(T):
        if (WANTED >> (S + t)) & 1:
            stage = teachers[t]
            eta = moving_factor(
                stage, S + T * S + t, row_factors, column_factors, i, j, row_count, column_count, outer, FACTORS,
                (MOVING >> (S + t)) & 1, OWN_SHIFT, BLOCK_ROWS, BLOCK_COLUMNS,
            )  # fmt: skip
            x = -eta[0]
            x_tangent = -eta[1]
            for s in tl.static_range(S):
                beta = moving_factor(
                    stage, S + t * S + s, row_factors, column_factors, i, j, row_count, column_count, outer, FACTORS,
                    (MOVING >> (S + t)) & 1, OWN_SHIFT, BLOCK_ROWS, BLOCK_COLUMNS,
                )  # fmt: skip
                difference = (stage[0] - students[s][0]) * (outer * LN2)
                x += difference * beta[0]
                x_tangent += difference * beta[1]
                # (ρ^t − ρ^s) [β]
                if (MOVING >> (S + t)) & 1:
                    x_tangent += stage[0] * stage[3] * (outer * LN2) * beta[0]
                if (MOVING >> s) & 1:
                    x_tangent -= students[s][0] * students[s][3] * (outer * LN2) * beta[0]
            store_weights(stage, x, x_tangent, moving, still, sums,
                          i, j, row_count, column_count, S + t, WANTED, MOVING,
                          BLOCK_ROWS, BLOCK_COLUMNS, TYPE)  # fmt: skip


@triton.jit
def store_weights(
    stage, x, x_tangent, moving, still, sums, i, j, row_count, column_count, q: tl.constexpr, WANTED: tl.constexpr,
    MOVING: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """M˙ = υ M + R X˙, its sums, and where the stage moves M = R X of stage q's tile."""
    tangent = stage[0] * x_tangent
    if (MOVING >> q) & 1:
        m = stage[0] * x
        tangent += stage[3] * m
        out = still[place_among(WANTED & MOVING, q)]
        store_strip(out, m, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    place: tl.constexpr = place_among(WANTED, q)
    of_rows = sums + (number(tl.program_id(0), tl.int64) * place_among(WANTED, 64) + place) * row_count
    store_vector(of_rows, tl.sum(tangent, 1), i, row_count, BLOCK_ROWS)
    out = moving[place]
    store_strip(out, tangent, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
