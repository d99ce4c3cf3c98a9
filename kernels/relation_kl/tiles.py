"""relation_kl's kernels: every program owns a block of rows, walks the columns and keeps its stages' sums.

In base 2, with l = R·outer − shift, R = 2^((c − 1)·inner) off the diagonal and 0 on it, and U = 2^l:
Z = Σ_j U, Q = Σ_j U^t (l^t − l^s), ℓ = ln2·(Q/Z^t + log2(Z^s/Z^t)). The shift is the bound ``outer`` of all logits,
or each row's largest logit where sums under the bound could underflow. The rows are ``operands``, whose numbers h give
c − 1 = x̂_i·x̂_j − h_i − h_j.

Where stages are alike the two terms of ℓ nearly cancel. So with d = ln2·(l^s − l^t) there is also the sum of what is
never negative, D = Σ_j U^t (e^d − 1 − d), and that of differences, V = Z^s − Z^t: of y = V/Z^t that is not large

    ℓ = D/Z^t − (y − log(1 + y)).
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.log_sums import LN2, log_sum
from gkd_fast.kernels.common.strips import strip_stride
from gkd_fast.kernels.common.tile import (
    COUNTS,
    NOWHERE,
    bounded_exp2,
    column_range,
    divide_walk,
    edge_tile,
    inner_products,
    inner_tile,
    load_block,
    load_numbers,
    load_tile,
    load_vector,
    number,
    pick,
    replace_edges,
    store_vector,
)  # fmt: skip

# Below these the series of e^d − 1 − d and of y − log(1 + y) take the place of differences.
SMALL_LOGIT = tl.constexpr(0.35)
SMALL_RATIO = tl.constexpr(0.125)
MODERATE_RATIO = tl.constexpr(0.5)


@triton.jit
def relations(
    exponents, i, j, offset, column_count, MISSING: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, POLYNOMIALS: tl.constexpr, EDGE: tl.constexpr = True,
):  # fmt: skip
    """R of a tile of exponents (c − 1)·inner: at an EDGE 0 on the diagonal, MISSING in missing columns.

    EDGE None: found out when the kernel runs.
    """
    r = bounded_exp2(exponents, POLYNOMIALS)
    return replace_edges(r, i, j, offset, column_count, 0.0, MISSING, True, EDGE, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def walked_relations(
    own, level, columns, column_numbers, i, j, row_count, column_count, offset, inner, MISSING: tl.constexpr,
    EDGE: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """R of a stage's tile at (i, j), and its block of columns; ``level`` is the rows' h·inner.

    With STRIP ``columns`` are a strip of the products themselves.
    """
    if STRIP:
        other = load_tile(columns, i, j, row_count, strip_stride(column_count), BLOCK_ROWS, BLOCK_COLUMNS)
        c = other
    else:
        other = load_block(columns, j, BLOCK_COLUMNS, WIDTH, PRECISION)
        c = inner_products(own, other, PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    near = level[:, None] + (load_numbers(column_numbers, j, BLOCK_COLUMNS) * inner)[None, :]
    r = relations(c * inner - near, i, j, offset, column_count, MISSING, BLOCK_ROWS, BLOCK_COLUMNS, POLYNOMIALS, EDGE)
    return r, other


@triton.jit
def own_rows(rows, i, STRIP: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """A program's own rows of a stage; none with STRIP."""
    if STRIP:
        return 0.0
    else:
        return load_block(rows, i, BLOCK_ROWS, WIDTH, PRECISION)


@triton.jit
def divergence(d, u, v):
    """u (e^d − 1 − d) ≥ 0 with u e^d = v: small d by the series, 5e-7 near, as a difference would be roundings."""
    direct = v - u - u * d
    if u.dtype == tl.float64:
        return direct
    else:
        p = d * (1 / 5040) + 1 / 720
        p = p * d + 1 / 120
        p = p * d + 1 / 24
        p = p * d + 1 / 6
        p = p * d + 1 / 2
        square = d * d
        return tl.where(square < SMALL_LOGIT * SMALL_LOGIT, u * (square * p), direct)


@triton.jit
def add_sums(
    total, own, levels, columns, column_numbers, shift, i, j, row_count, column_count, offset, inner, outer,
    TEACHERS: tl.constexpr, EDGE: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """The sums with those of the tile at (i, j) added."""
    of_stages = ()
    of_pairs = ()
    for q in tl.static_range(1 + TEACHERS):
        r, _ = walked_relations(
            own[q], levels[q], columns[q], column_numbers[q], i, j, row_count, column_count, offset, inner, NOWHERE,
            EDGE, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION, POLYNOMIALS,
        )  # fmt: skip
        logits = r * outer - shift[q]
        weights = tl.exp2(logits)
        of_stages = of_stages + (total[q] + tl.sum(weights, 1),)
        if q == 0:
            student_logits = logits
        else:
            # Made again, so that its registers are not held beside the logits'.
            student = tl.exp2(student_logits)
            x = student_logits - logits
            before = of_pair(total, TEACHERS, q)
            of_pairs = of_pairs + (
                before[0] - tl.sum(weights * x, 1),
                before[1] + tl.sum(student - weights, 1),
                before[2] + tl.sum(divergence(x * LN2, weights, student), 1),
            )
    return of_stages + of_pairs


@triton.constexpr_function
def num_sums(teachers):
    """Sums of a student and so many teachers: Z of each, and Q, V and D of every pair."""
    return 1 + teachers + 3 * teachers


@triton.jit
def of_pair(total, TEACHERS: tl.constexpr, q: tl.constexpr):
    """Q, V and D of a group's teacher at place q."""
    return total[1 + TEACHERS + 3 * (q - 1) : 1 + TEACHERS + 3 * q]


@triton.jit
def pair_loss(q, student_z, teacher_z, v, d):
    """ℓ, not below 0."""
    loss = q / teacher_z * LN2 + tl.log2(student_z / teacher_z) * LN2
    y = v / teacher_z
    # y − log(1 + y) = y x − 2 x³ (1/3 + x²/5 + x⁴/7 + …)
    x = y / (2 + y)
    square = x * x
    series = y * x - 2 * x * square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9))))
    if q.dtype == tl.float64:
        excess = y - tl.log(1 + y)
    else:
        excess = tl.where(tl.abs(y) < SMALL_RATIO, series, y - tl.log2(1 + y) * LN2)
    loss = tl.where(tl.abs(y) < MODERATE_RATIO, d / teacher_z - excess, loss)
    return tl.where(loss < 0, 0.0, loss)


@triton.jit(do_not_specialize=COUNTS)
def relation_sums(
    rows, row_numbers, columns, column_numbers, sums, shifts, losses, student_log_sums, teacher_log_sums, row_count,
    column_count, offset, parts, accumulate, is_last, stride, inner: tl.float64, outer: tl.float64, S: tl.constexpr,
    T: tl.constexpr, TEACHERS: tl.constexpr, OWN_SHIFT: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """sums[part, group, k, i] over the part's columns, in ``num_sums``' order; a group is a student and teachers.

    stride: that of the log-sums' and shifts' stages. With STRIP the columns are strips of products.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    part, group = tl.program_id(1), tl.program_id(2)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    inner, outer = number(inner, SUM), number(outer, SUM)
    own = ()
    levels = ()
    others = ()
    other_numbers = ()
    shift = ()
    for q in tl.static_range(1 + TEACHERS):
        stage = stage_of(group, q, S, T, TEACHERS)
        own = own + (own_rows(pick(rows, stage), i, STRIP, BLOCK_ROWS, WIDTH, PRECISION),)
        levels = levels + (load_numbers(pick(row_numbers, stage), i, BLOCK_ROWS) * inner,)
        others = others + (pick(columns, stage),)
        other_numbers = other_numbers + (pick(column_numbers, stage),)
        if OWN_SHIFT:
            shift = shift + (load_vector(shifts + number(stage, tl.int64) * stride, i, row_count, BLOCK_ROWS)[:, None],)
        else:
            shift = shift + (outer,)
    total = ()
    for _ in tl.static_range(num_sums(TEACHERS)):
        total = total + (tl.zeros([BLOCK_ROWS], SUM),)
    whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in range(0, whole - crossed):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        total = add_sums(total, own, levels, others, other_numbers, shift, i, j, row_count, column_count, offset, inner,
                         outer, TEACHERS, False, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
                         POLYNOMIALS)  # fmt: skip
    for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        total = add_sums(total, own, levels, others, other_numbers, shift, i, j, row_count, column_count, offset, inner,
                         outer, TEACHERS, True, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
                         POLYNOMIALS)  # fmt: skip
    place = sums + (part * tl.num_programs(2) + group) * number(row_count, tl.int64) * num_sums(TEACHERS)
    complete = ()
    for k in tl.static_range(num_sums(TEACHERS)):
        before = load_vector(place + k * number(row_count, tl.int64), i, row_count * accumulate, BLOCK_ROWS)
        complete = complete + (total[k] + before,)
    if (is_last != 0) & (parts == 1):
        store_losses(complete, shifts, losses, student_log_sums, teacher_log_sums, group, i, row_count, stride, outer,
                     S, T, TEACHERS, OWN_SHIFT, BLOCK_ROWS)  # fmt: skip
    else:
        for k in tl.static_range(num_sums(TEACHERS)):
            store_vector(place + k * number(row_count, tl.int64), complete[k], i, row_count, BLOCK_ROWS)


@triton.jit
def stage_of(group, q: tl.constexpr, S: tl.constexpr, T: tl.constexpr, TEACHERS: tl.constexpr):
    """The stage at place q of a group; a last group that is not full has its last teacher several times."""
    GROUPS: tl.constexpr = (T + TEACHERS - 1) // TEACHERS
    if q == 0:
        return group // GROUPS
    else:
        return S + tl.minimum(group % GROUPS * TEACHERS + (q - 1), T - 1)


@triton.jit
def store_losses(
    total, shifts, losses, student_log_sums, teacher_log_sums, group, i, row_count, stride, outer, S: tl.constexpr,
    T: tl.constexpr, TEACHERS: tl.constexpr, OWN_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The losses and log-sums of a group's block of rows, from sums in ``num_sums``' order.

    Every group of a stage has the same log-sums of it, to the bit.
    """
    row = i + tl.arange(0, BLOCK_ROWS)
    student = stage_of(group, 0, S, T, TEACHERS)
    for q in tl.static_range(1 + TEACHERS):
        stage = stage_of(group, q, S, T, TEACHERS)
        shift = outer
        if OWN_SHIFT:
            shift = load_vector(shifts + number(stage, tl.int64) * stride, i, row_count, BLOCK_ROWS)
        log_z = log_sum(total[q], shift)
        if q == 0:
            store_vector(student_log_sums + number(stage, tl.int64) * stride, log_z, i, row_count, BLOCK_ROWS)
        else:
            store_vector(teacher_log_sums + number(stage - S, tl.int64) * stride, log_z, i, row_count, BLOCK_ROWS)
            sums = of_pair(total, TEACHERS, q)
            loss = pair_loss(sums[0], total[0], total[q], sums[1], sums[2])
            place = row.to(tl.int64) * (S * T) + (student * T + (stage - S))
            tl.store(losses + place, loss, mask=row < row_count)


@triton.jit(do_not_specialize=COUNTS)
def relation_losses(
    sums, shifts, losses, student_log_sums, teacher_log_sums, row_count, parts, stride, outer: tl.float64,
    S: tl.constexpr, T: tl.constexpr, TEACHERS: tl.constexpr, OWN_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """The losses from the sums of several parts, added in the order of the parts."""
    i, group = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    total = ()
    for _ in tl.static_range(num_sums(TEACHERS)):
        total = total + (tl.zeros([BLOCK_ROWS], SUM),)
    for part in range(parts):
        place = sums + (part * tl.num_programs(1) + group) * number(row_count, tl.int64) * num_sums(TEACHERS)
        new = ()
        for k in tl.static_range(num_sums(TEACHERS)):
            of_part = load_vector(place + k * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)
            new = new + (total[k] + of_part,)
        total = new
    store_losses(total, shifts, losses, student_log_sums, teacher_log_sums, group, i, row_count, stride,
                 number(outer, SUM), S, T, TEACHERS, OWN_SHIFT, BLOCK_ROWS)  # fmt: skip
