"""relation_kl's kernels: every program owns a block of rows, walks the columns and keeps all stages' sums.

In base 2, with l = R·outer, R = 2^((c − 1)·inner) off the diagonal and 0 on it, and U = 2^(l − shift):
Z = Σ_j U, Q = Σ_j U^t (l^t − l^s), ℓ = ln2·Q/Z^t − log Z^t + log Z^s. The shift is the bound ``outer`` of all logits,
or each row's largest logit where sums under the bound could underflow.
"""

import triton
import triton.language as tl
from gkd_fast.kernels.tile import (
    COUNTS,
    NOWHERE,
    bounded_exp2,
    column_range,
    divide_walk,
    edge_tile,
    inner_tile,
    load_columns,
    load_row_block,
    load_tile,
    load_vector,
    number,
    product,
    replace_edges,
    store_vector,
)  # fmt: skip

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def relations(
    c, i, j, offset, column_count, inner, MISSING: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    POLYNOMIALS: tl.constexpr, EDGE: tl.constexpr = True,
):  # fmt: skip
    """R of a tile of similarities: at an EDGE 0 on the diagonal, MISSING, unless that is 0, in missing columns.

    EDGE None: found out when the kernel runs.
    """
    r = bounded_exp2(c * inner - inner, POLYNOMIALS)
    return replace_edges(r, i, j, offset, column_count, 0.0, MISSING, MISSING != 0, EDGE, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def add_sums(
    total, own, columns, dims, shift, i, j, row_count, column_count, offset, inner, outer, S: tl.constexpr,
    T: tl.constexpr, EDGE: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """The sums with those of the tile at (i, j) added."""
    students = ()
    new = ()
    for q in tl.static_range(S + T):
        if STRIP:
            c = load_tile(columns[q], i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        else:
            other = load_columns(columns[q], j, column_count, dims[q], BLOCK_COLUMNS, WIDTH, TYPE, ALIGNED)
            c = product(own[q], tl.trans(other), PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        r = relations(c, i, j, offset, column_count, inner, NOWHERE, BLOCK_ROWS, BLOCK_COLUMNS, POLYNOMIALS, EDGE)
        weights = tl.exp2(r * outer - shift[q])
        new = new + (total[len(new)] + tl.sum(weights, 1),)
        if q < S:
            students = students + (r,)
        else:
            for s in tl.static_range(S):
                new = new + (total[len(new)] + tl.sum(weights * (r - students[s]), 1),)
    return new


@triton.jit(do_not_specialize=COUNTS)
def relation_sums(
    rows, columns, dims, sums, shifts, losses, student_log_sums, teacher_log_sums, first_row, row_count, column_count,
    offset, parts, accumulate, is_last, loss_row_stride, loss_stride, inner: tl.float64, outer: tl.float64,
    S: tl.constexpr, T: tl.constexpr, OWN_SHIFT: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """sums[part, k, i] over the part's columns: Z of the students, then for every teacher its Z and its S values Q.

    The rows are those from ``first_row``. With STRIP the columns are strips of similarities [row_count, column_count].
    """
    i = first_row + tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    inner, outer = number(inner, SUM), number(outer, SUM)
    own = ()
    shift = ()
    total = ()
    for q in tl.static_range(S + T):
        if not STRIP:
            block = load_row_block(
                rows[q], i - first_row, row_count - first_row, dims[q], BLOCK_ROWS, WIDTH, TYPE, ALIGNED
            )
            own = own + (block,)
        if OWN_SHIFT:
            shift = shift + (load_vector(shifts + q * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)[:, None],)
        else:
            shift = shift + (outer,)
    for _ in tl.static_range(S + T + S * T):
        total = total + (tl.zeros([BLOCK_ROWS], SUM),)
    whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in range(0, whole - crossed):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        total = add_sums(total, own, columns, dims, shift, i, j, row_count, column_count, offset, inner, outer, S, T,
                         False, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
                         POLYNOMIALS)  # fmt: skip
    for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        total = add_sums(total, own, columns, dims, shift, i, j, row_count, column_count, offset, inner, outer, S, T,
                         True, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
                         POLYNOMIALS)  # fmt: skip
    complete = ()
    for k in tl.static_range(S + T + S * T):
        before = sums + (part * (S + T + S * T) + k) * number(row_count, tl.int64)
        complete = complete + (total[k] + load_vector(before, i, row_count * accumulate, BLOCK_ROWS),)
    if (is_last != 0) & (parts == 1):
        store_losses(complete, shifts, losses, student_log_sums, teacher_log_sums, i, row_count, loss_row_stride,
                     loss_stride, outer, S, T, OWN_SHIFT, BLOCK_ROWS)  # fmt: skip
    else:
        for k in tl.static_range(S + T + S * T):
            out = sums + (part * (S + T + S * T) + k) * number(row_count, tl.int64)
            store_vector(out, complete[k], i, row_count, BLOCK_ROWS)


@triton.jit
def store_losses(
    total, shifts, losses, student_log_sums, teacher_log_sums, i, row_count, loss_row_stride, loss_stride, outer,
    S: tl.constexpr, T: tl.constexpr, OWN_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """ℓ = Q/(τ Z^t) − log Z^t + log Z^s and the log-sums of a block of rows, from sums in ``relation_sums``' order."""
    row = tl.arange(0, BLOCK_ROWS)
    students = ()
    for q in tl.static_range(S + T):
        z = total[q if q < S else S + (q - S) * (S + 1)]
        if OWN_SHIFT:
            log_z = (tl.log2(z) + load_vector(shifts + q * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)) * LN2
        else:
            log_z = (tl.log2(z) + outer) * LN2
        if q < S:
            students = students + (log_z,)
            store_vector(student_log_sums + q * number(row_count, tl.int64), log_z, i, row_count, BLOCK_ROWS)
        else:
            store_vector(teacher_log_sums + (q - S) * number(row_count, tl.int64), log_z, i, row_count, BLOCK_ROWS)
            for s in tl.static_range(S):
                divergence = total[S + (q - S) * (S + 1) + 1 + s] / z * (outer * LN2)
                place = (i + row).to(tl.int64) * loss_row_stride + s * loss_stride + (q - S)
                tl.store(losses + place, divergence - log_z + students[s], mask=row < row_count - i)


@triton.jit(do_not_specialize=COUNTS)
def relation_losses(
    sums, shifts, losses, student_log_sums, teacher_log_sums, row_count, parts, loss_row_stride, loss_stride,
    outer: tl.float64, S: tl.constexpr, T: tl.constexpr, OWN_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """The losses from the sums of several parts, added in the order of the parts."""
    i = tl.program_id(0) * BLOCK_ROWS
    total = ()
    for _ in tl.static_range(S + T + S * T):
        total = total + (tl.zeros([BLOCK_ROWS], SUM),)
    for part in range(parts):
        new = ()
        for k in tl.static_range(S + T + S * T):
            of_part = sums + (part * (S + T + S * T) + k) * number(row_count, tl.int64)
            new = new + (total[k] + load_vector(of_part, i, row_count, BLOCK_ROWS),)
        total = new
    store_losses(total, shifts, losses, student_log_sums, teacher_log_sums, i, row_count, loss_row_stride, loss_stride,
                 number(outer, SUM), S, T, OWN_SHIFT, BLOCK_ROWS)  # fmt: skip
