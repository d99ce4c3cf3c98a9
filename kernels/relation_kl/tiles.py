"""relation_kl's kernels: every program owns a block of rows, walks the columns and keeps all stages' sums.

In base 2, with l = R·outer − shift, R = 2^((c − 1)·inner) off the diagonal and 0 on it, and U = 2^l:
Z = Σ_j U, Q = Σ_j U^t (l^t − l^s), ℓ = ln2·(Q/Z^t + log2(Z^s/Z^t)). The shift is the bound ``outer`` of all logits,
or each row's largest logit where sums under the bound could underflow. Where stages are alike the two terms of ℓ nearly
cancel: so Q has the logits that U has, with their roundings, and V = Z^s − Z^t is summed beside Z.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.log_sums import LN2, log_sum
from gkd_fast.kernels.common.tile import (
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
def stage_rows(
    rows, dims, i, count, STAGES: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """A program's own rows of every stage; none with STRIP."""
    own = ()
    if not STRIP:
        for q in tl.static_range(STAGES):
            own = own + (load_row_block(rows[q], i, count, dims[q], BLOCK_ROWS, WIDTH, TYPE, ALIGNED),)
    return own


@triton.jit
def add_sums(
    total, own, columns, dims, shift, i, j, row_count, column_count, offset, inner, outer, S: tl.constexpr,
    T: tl.constexpr, EDGE: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """The sums with those of the tile at (i, j) added."""
    students = ()
    of_stages = ()
    of_pairs = ()
    for q in tl.static_range(S + T):
        if STRIP:
            c = load_tile(columns[q], i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        else:
            other = load_columns(columns[q], j, column_count, dims[q], BLOCK_COLUMNS, WIDTH, TYPE, ALIGNED)
            c = product(own[q], tl.trans(other), PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        r = relations(c, i, j, offset, column_count, inner, NOWHERE, BLOCK_ROWS, BLOCK_COLUMNS, POLYNOMIALS, EDGE)
        logits = r * outer - shift[q]
        weights = tl.exp2(logits)
        z = tl.sum(weights, 1)
        of_stages = of_stages + (total[q] + z,)
        if q < S:
            students = students + ((logits, z),)
        else:
            for s in tl.static_range(S):
                divergence = tl.sum(weights * (logits - students[s][0]), 1)
                of_pairs = of_pairs + (total[S + T + len(of_pairs)] + divergence,)
                of_pairs = of_pairs + (total[S + T + len(of_pairs)] + (students[s][1] - z),)
    return of_stages + of_pairs


@triton.constexpr_function
def num_sums(S, T):
    """Sums of the forward: Z [S + T], and Q and V of every pair [T, S, 2]."""
    return S + T + 2 * S * T


@triton.jit
def pair_loss(q, student_z, teacher_z, v):
    """ℓ = ln2·(Q/Z^t + log2(Z^s/Z^t)); near 1 the quotient's logarithm is 2 artanh(V/(Z^s + Z^t)). Not below 0."""
    ratio = tl.log2(student_z / teacher_z) * LN2
    if q.dtype != tl.float64:
        x = v / (student_z + teacher_z)
        square = x * x
        near = 2 * x * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7))))
        ratio = tl.where(tl.abs(x) < 1 / 8, near, ratio)
    loss = q / teacher_z * LN2 + ratio
    return tl.where(loss < 0, 0.0, loss)


@triton.jit(do_not_specialize=COUNTS)
def relation_sums(
    rows, columns, dims, sums, shifts, losses, student_log_sums, teacher_log_sums, first_row, row_count, column_count,
    offset, parts, accumulate, is_last, loss_row_stride, loss_stride, inner: tl.float64, outer: tl.float64,
    S: tl.constexpr, T: tl.constexpr, OWN_SHIFT: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr, POLYNOMIALS: tl.constexpr,
):  # fmt: skip
    """sums[part, k, i] over the part's columns, in ``num_sums``' order.

    The rows are those from ``first_row``. With STRIP the columns are strips of similarities [row_count, column_count].
    """
    i = first_row + tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    inner, outer = number(inner, SUM), number(outer, SUM)
    own = stage_rows(rows, dims, i - first_row, row_count - first_row, S + T, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, TYPE)
    shift = ()
    total = ()
    for q in tl.static_range(S + T):
        if OWN_SHIFT:
            shift = shift + (load_vector(shifts + q * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)[:, None],)
        else:
            shift = shift + (outer,)
    for _ in tl.static_range(num_sums(S, T)):
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
    for k in tl.static_range(num_sums(S, T)):
        before = sums + (part * num_sums(S, T) + k) * number(row_count, tl.int64)
        complete = complete + (total[k] + load_vector(before, i, row_count * accumulate, BLOCK_ROWS),)
    if (is_last != 0) & (parts == 1):
        store_losses(complete, shifts, losses, student_log_sums, teacher_log_sums, i, row_count, loss_row_stride,
                     loss_stride, outer, S, T, OWN_SHIFT, BLOCK_ROWS)  # fmt: skip
    else:
        for k in tl.static_range(num_sums(S, T)):
            out = sums + (part * num_sums(S, T) + k) * number(row_count, tl.int64)
            store_vector(out, complete[k], i, row_count, BLOCK_ROWS)


@triton.jit
def store_losses(
    total, shifts, losses, student_log_sums, teacher_log_sums, i, row_count, loss_row_stride, loss_stride, outer,
    S: tl.constexpr, T: tl.constexpr, OWN_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The losses and log-sums of a block of rows, from sums in ``num_sums``' order."""
    row = tl.arange(0, BLOCK_ROWS)
    for q in tl.static_range(S + T):
        shift = outer
        if OWN_SHIFT:
            shift = load_vector(shifts + q * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)
        log_z = log_sum(total[q], shift)
        if q < S:
            store_vector(student_log_sums + q * number(row_count, tl.int64), log_z, i, row_count, BLOCK_ROWS)
        else:
            store_vector(teacher_log_sums + (q - S) * number(row_count, tl.int64), log_z, i, row_count, BLOCK_ROWS)
            for s in tl.static_range(S):
                of_pair = total[S + T + 2 * ((q - S) * S + s) : S + T + 2 * ((q - S) * S + s) + 2]
                loss = pair_loss(of_pair[0], total[s], total[q], of_pair[1])
                place = (i + row).to(tl.int64) * loss_row_stride + s * loss_stride + (q - S)
                tl.store(losses + place, loss, mask=row < row_count - i)


@triton.jit(do_not_specialize=COUNTS)
def relation_losses(
    sums, shifts, losses, student_log_sums, teacher_log_sums, row_count, parts, loss_row_stride, loss_stride,
    outer: tl.float64, S: tl.constexpr, T: tl.constexpr, OWN_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """The losses from the sums of several parts, added in the order of the parts."""
    i = tl.program_id(0) * BLOCK_ROWS
    total = ()
    for _ in tl.static_range(num_sums(S, T)):
        total = total + (tl.zeros([BLOCK_ROWS], SUM),)
    for part in range(parts):
        new = ()
        for k in tl.static_range(num_sums(S, T)):
            of_part = sums + (part * num_sums(S, T) + k) * number(row_count, tl.int64)
            new = new + (total[k] + load_vector(of_part, i, row_count, BLOCK_ROWS),)
        total = new
    store_losses(total, shifts, losses, student_log_sums, teacher_log_sums, i, row_count, loss_row_stride, loss_stride,
                 number(outer, SUM), S, T, OWN_SHIFT, BLOCK_ROWS)  # fmt: skip
