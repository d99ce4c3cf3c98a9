"""relation_kl's backward kernels: gradients as M_ij e_j, from row statistics and the log-sums that forward left.

The relations and weights R and U are those of ``tiles``. Every pair of stages is a program of its own; what pairs give
to one stage is added in their order.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.log_sums import LN2, LOG2E, shift_and_ratio
from gkd_fast.kernels.common.strips import store_strip
from gkd_fast.kernels.common.tile import (
    COUNTS,
    column_range,
    divide_walk,
    edge_tile,
    gather,
    inner_tile,
    is_split,
    load_numbers,
    load_vector,
    number,
    pick,
    store_rows,
    store_vector,
)  # fmt: skip
from gkd_fast.kernels.relation_kl.tiles import own_rows, walked_relations

# Row statistics of a pair.
ALPHA, BETA, ETA, STUDENT_SHIFT, TEACHER_SHIFT, FACTORS = (tl.constexpr(k) for k in range(6))


@triton.jit(do_not_specialize=COUNTS)
def relation_factors(
    upstream, losses, student_log_sums, teacher_log_sums, factors, power, row_count, stride, outer: tl.float64,
    slope: tl.float64, S: tl.constexpr, T: tl.constexpr, HAS_LOSSES: tl.constexpr, OWN_SHIFT: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """factors[pair, k, i], the row statistics of the backward, times slope = 1/(σ²τ), of one side.

    α = g/Z^s, β = g/Z^t, η = β (ℓ + log Z^t − log Z^s), 0 without HAS_LOSSES; Z in units of the weights U, with
    OWN_SHIFT what log2 Z, the shift, was rounded by.
    """
    i, pair = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    s, t = pair // T, pair % T
    row = i + tl.arange(0, BLOCK_ROWS)
    place = row.to(tl.int64) * (S * T) + pair
    unit = number(slope, SUM)
    if SCALED:
        unit = unit * tl.load(power)
    student_log_z = load_vector(student_log_sums + number(s, tl.int64) * stride, i, row_count, BLOCK_ROWS)
    teacher_log_z = load_vector(teacher_log_sums + number(t, tl.int64) * stride, i, row_count, BLOCK_ROWS)
    out = factors + number(pair, tl.int64) * row_count * FACTORS
    if OWN_SHIFT:
        shift, student_ratio = shift_and_ratio(student_log_z, SUM)
        store_vector(out + STUDENT_SHIFT * number(row_count, tl.int64), shift, i, row_count, BLOCK_ROWS)
        shift, ratio = shift_and_ratio(teacher_log_z, SUM)
        store_vector(out + TEACHER_SHIFT * number(row_count, tl.int64), shift, i, row_count, BLOCK_ROWS)
    else:
        student_ratio = tl.exp2((number(outer, SUM) - student_log_z * LOG2E).to(SUM))
        ratio = tl.exp2((number(outer, SUM) - teacher_log_z * LOG2E).to(SUM))
    g = tl.load(upstream + place, mask=row < row_count, other=0) * unit
    beta = g * ratio
    eta = beta * 0
    if HAS_LOSSES:
        loss = tl.load(losses + place, mask=row < row_count, other=0)
        eta = beta * (loss + (teacher_log_z - student_log_z).to(SUM))
    store_vector(out + ALPHA * number(row_count, tl.int64), g * student_ratio, i, row_count, BLOCK_ROWS)
    store_vector(out + BETA * number(row_count, tl.int64), beta, i, row_count, BLOCK_ROWS)
    store_vector(out + ETA * number(row_count, tl.int64), eta, i, row_count, BLOCK_ROWS)


@triton.constexpr_function
def num_factors(S, T):
    """Row statistics of the second order: α [S], β [T, S], η [T] and the shifts [S + T]."""
    return S + T * S + T + S + T


@triton.jit
def both_sides(weights, mirrored, row_factor, column_factor, OWN_SHIFT: tl.constexpr):
    """U_ij·f_i + U_ji·f_j."""
    if OWN_SHIFT:
        return weights * row_factor + mirrored * column_factor
    else:
        return weights * (row_factor + column_factor)


@triton.jit
def column_factor(factors, k: tl.constexpr, j, count, BLOCK: tl.constexpr):
    """Factor k of a tile's columns; loaded where it is used, so that its registers are not held during a product."""
    return load_vector(factors + k * number(count, tl.int64), j, count, BLOCK)[None, :]


@triton.jit
def row_factor(factors, k: tl.constexpr, i, count, BLOCK: tl.constexpr):
    """Factor k of a block of rows."""
    return load_vector(factors + k * number(count, tl.int64), i, count, BLOCK)[:, None]


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
    total, own, levels, columns, column_numbers, gradients, mine, column_factors, i, j, row_count, column_count, offset,
    inner, outer, WANTED: tl.constexpr, OWN_SHIFT: tl.constexpr, EDGE: tl.constexpr, STRIP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """Of the wanted sides Σ M_ij and Σ M_ij x̂_j with those of the tile at (i, j) added; with STRIP the tile of M is
    stored.
    """
    new = ()
    # The teacher first: the student needs of it only U^t (β_i + β_j).
    teacher, of_teacher = walked_relations(
        own[1], levels[1], columns[1], column_numbers[1], i, j, row_count, column_count, offset, inner, 0.0, EDGE,
        STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION, POLYNOMIALS,
    )  # fmt: skip
    weights, mirrored = relation_weights(teacher, mine[TEACHER_SHIFT], column_factors, TEACHER_SHIFT, j, column_count,
                                         outer, OWN_SHIFT, BLOCK_COLUMNS)  # fmt: skip
    beta = column_factor(column_factors, BETA, j, column_count, BLOCK_COLUMNS)
    crossed = both_sides(weights, mirrored, mine[BETA], beta, OWN_SHIFT)
    if WANTED & 2:
        eta = column_factor(column_factors, ETA, j, column_count, BLOCK_COLUMNS)
        settled = both_sides(weights, mirrored, mine[ETA], eta, OWN_SHIFT)
    student, of_student = walked_relations(
        own[0], levels[0], columns[0], column_numbers[0], i, j, row_count, column_count, offset, inner, 0.0, EDGE,
        STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION, POLYNOMIALS,
    )  # fmt: skip
    if WANTED & 1:
        weights, mirrored = relation_weights(student, mine[STUDENT_SHIFT], column_factors, STUDENT_SHIFT, j,
                                             column_count, outer, OWN_SHIFT, BLOCK_COLUMNS)  # fmt: skip
        alpha = column_factor(column_factors, ALPHA, j, column_count, BLOCK_COLUMNS)
        m = student * (both_sides(weights, mirrored, mine[ALPHA], alpha, OWN_SHIFT) - crossed)
        new = new + add_weighted_tile(total, 0, m, of_student, gradients, i, j, row_count, column_count, STRIP,
                                      BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION)  # fmt: skip
    if WANTED & 2:
        m = teacher * ((teacher - student) * (outer * LN2) * crossed - settled)
        new = new + add_weighted_tile(total, WANTED & 1, m, of_teacher, gradients, i, j, row_count, column_count, STRIP,
                                      BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION)  # fmt: skip
    return new


@triton.jit
def add_weighted_tile(
    total, place: tl.constexpr, m, columns, gradients, i, j, row_count, column_count, STRIP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums and gradient of the wanted side at ``place`` with those of a tile of M; with STRIP that is stored."""
    sums = total[2 * place] + tl.sum(m, 1)
    if STRIP:
        store_strip(gradients[place], m, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
        return (sums, total[2 * place + 1])
    else:
        return (sums, gather(total[2 * place + 1], m, columns, TYPE, PRECISION))


@triton.jit(do_not_specialize=COUNTS)
def relation_gradients(
    rows, row_numbers, columns, column_numbers, centres, dims, gradients, sums, row_factors, column_factors, power,
    first_row, count, row_count, column_count, offset, parts, wanted, inner: tl.float64, outer: tl.float64,
    S: tl.constexpr, T: tl.constexpr, WANTED: tl.constexpr, OWN_SHIFT: tl.constexpr, SCALED: tl.constexpr,
    STRIP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j over the part's columns for ``count`` rows from ``first_row``, of one pair's sides of WANTED
    (bit 0: student, 1: teacher) whose stage's bit of ``wanted`` is set.

    With the factors scaled by 1/(σ²τ): M^s = R^s [U^s (α_i + α_j) − U^t (β_i + β_j)] and
    M^t = R^t U^t [(L^t − L^s)(β_i + β_j) − (η_i + η_j)]. gradients: of every stage [partner, part, count, dim]. With
    STRIP the columns are strips of products of the only pair, the gradients strips of M of the wanted sides, and
    sums[part, side, i] those of M.
    """
    i = first_row + tl.program_id(0) * BLOCK_ROWS
    part, pair = tl.program_id(1), tl.program_id(2)
    places = (pair // T, S + pair % T)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    inner, outer = number(inner, SUM), number(outer, SUM)
    row_factors += number(pair, tl.int64) * row_count * FACTORS
    column_factors += number(pair, tl.int64) * column_count * FACTORS
    own = ()
    levels = ()
    others = ()
    other_numbers = ()
    total = ()
    for side in tl.static_range(2):
        own = own + (own_rows(pick(rows, places[side]), i, STRIP, BLOCK_ROWS, WIDTH, PRECISION),)
        levels = levels + (load_numbers(pick(row_numbers, places[side]), i, BLOCK_ROWS) * inner,)
        others = others + (pick(columns, places[side]),)
        other_numbers = other_numbers + (pick(column_numbers, places[side]),)
        if (WANTED >> side) & 1:
            total = total + (tl.zeros([BLOCK_ROWS], SUM), tl.zeros([BLOCK_ROWS, 16 if STRIP else WIDTH], SUM))
    mine = ()
    for k in tl.static_range(FACTORS):
        if is_read(k, WANTED, OWN_SHIFT):
            mine = mine + (row_factor(row_factors, k, i, row_count, BLOCK_ROWS),)
        else:
            mine = mine + (0.0,)
    # A second loop for the edges would cost operands of 32 bits their registers.
    if TYPE.primitive_bitwidth > 16:
        for j in range(start, stop, BLOCK_COLUMNS):
            total = add_gradients(
                total, own, levels, others, other_numbers, gradients, mine, column_factors, i, j, row_count,
                column_count, offset, inner, outer, WANTED, OWN_SHIFT, None, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS,
                TYPE, PRECISION, POLYNOMIALS,
            )  # fmt: skip
    else:
        whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
        for k in tl.range(0, whole - crossed, disable_licm=is_split(PRECISION)):
            j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
            total = add_gradients(
                total, own, levels, others, other_numbers, gradients, mine, column_factors, i, j, row_count,
                column_count, offset, inner, outer, WANTED, OWN_SHIFT, False, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS,
                TYPE, PRECISION, POLYNOMIALS,
            )  # fmt: skip
        for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
            j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
            total = add_gradients(
                total, own, levels, others, other_numbers, gradients, mine, column_factors, i, j, row_count,
                column_count, offset, inner, outer, WANTED, OWN_SHIFT, True, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS,
                TYPE, PRECISION, POLYNOMIALS,
            )  # fmt: skip
    for side in tl.static_range(2):
        if (WANTED >> side) & 1:
            weight = total[2 * (side & WANTED)]
            if STRIP:
                out = sums + (part * WANTED.bit_count() + (side & WANTED)) * number(row_count, tl.int64)
                store_vector(out, weight, i, row_count, BLOCK_ROWS)
            else:
                stage = places[side]
                gradient = total[2 * (side & WANTED) + 1]
                gradient += weight[:, None] * load_numbers(pick(centres, stage), 0, WIDTH)[None, :]
                if SCALED:
                    gradient = gradient * (1.0 / tl.load(power))
                partner = pair % T if side == 0 else pair // T
                dim = pick(dims, stage)
                out = pick(gradients, stage) + (partner * parts + part) * number(count, tl.int64) * dim
                here = tl.where((wanted >> stage) & 1 != 0, count, 0)
                store_rows(out, gradient, i - first_row, here, dim, BLOCK_ROWS, WIDTH)


@triton.constexpr_function
def is_read(k, wanted, own_shift):
    """Whether factor k enters the gradients of these sides."""
    is_shift = k >= int(STUDENT_SHIFT)
    of_student, of_teacher = k in (int(ALPHA), int(STUDENT_SHIFT)), k == int(ETA)
    return not (is_shift and not own_shift or of_student and not wanted & 1 or of_teacher and not wanted & 2)


@triton.jit(do_not_specialize=COUNTS)
def add_slots(slots, gradients, sizes, counts, BLOCK: tl.constexpr):
    """gradient = Σ slots [count, size] of every stage, in their order."""
    k, stage = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    source, size, count = pick(slots, stage), pick(sizes, stage), pick(counts, stage)
    mask = k < size
    total = tl.load(source + k, mask=mask, other=0)
    for slot in range(1, count):
        total += tl.load(source + number(slot, tl.int64) * size + k, mask=mask, other=0)
    tl.store(pick(gradients, stage) + k, total, mask=mask)
