"""node_contrast's second order. Along directions of the stages the weights w_ij = g P_ij/τ, where upstream g and the
softmax are the row's or the column's, move at ẇ_ij = w_ij (ċ_ij/τ − ż), ż the tangent of its log-sum.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.tangents import similarities, store_strip
from gkd_fast.kernels.common.tile import COUNTS, load_numbers, load_vector, number, replace_missing, store_vector


@triton.jit
def softmax_weights(c, shift, j, column_count, scale, BLOCK_COLUMNS: tl.constexpr):
    """U_ij of a tile of similarities, 0 in columns that do not exist."""
    weights = tl.exp2(c * scale - shift)
    if j + BLOCK_COLUMNS > column_count:
        weights = replace_missing(weights, j, column_count, 0.0, BLOCK_COLUMNS)
    return weights


@triton.jit
def with_numbers(c, moving, along, row_along, i, ROWS_MOVE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """c and ċ with what rows and their tangents have along the centre of the columns."""
    if ROWS_MOVE:
        moving += load_numbers(row_along, i, BLOCK_ROWS)[:, None]
    return c + load_numbers(along, i, BLOCK_ROWS)[:, None], moving


@triton.jit(do_not_specialize=COUNTS)
def contrast_tangent_sums(
    rows, row_tangents, columns, column_tangents, along, row_along, shifts, sums, dim, row_count, column_count,
    scale: tl.float64, inverse_temperature: tl.float64, ROWS_MOVE: tl.constexpr, COLUMNS_MOVE: tl.constexpr,
    APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[column block, i] = (1/τ) Σ_j U_ij ċ_ij of one pair, U = 2^(c·scale − shift)."""
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    c, moving = similarities(rows, row_tangents, columns, column_tangents, i, j, row_count, column_count, dim,
                             ROWS_MOVE, COLUMNS_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
                             PRECISION)  # fmt: skip
    c, moving = with_numbers(c, moving, along, row_along, i, ROWS_MOVE, BLOCK_ROWS)
    shift = load_vector(shifts, i, row_count, BLOCK_ROWS)[:, None]
    weights = softmax_weights(c, shift, j, column_count, number(scale, SUM), BLOCK_COLUMNS)
    total = tl.sum(weights * moving, 1) * number(inverse_temperature, SUM)
    out = sums + number(tl.program_id(0), tl.int64) * row_count
    store_vector(out, total, i, row_count, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def contrast_double_gradients(
    rows, row_tangents, columns, column_tangents, along, row_along, factors, shifts, log_sum_tangents, moving, still,
    sums, dim, row_count,
    column_count, scale: tl.float64, inverse_temperature: tl.float64, ROWS_MOVE: tl.constexpr,
    COLUMNS_MOVE: tl.constexpr, BY_COLUMN: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS:
    tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strips of ẇ (``moving``) and, where columns move, of w (``still``), of one pair; sums[column block, i]: of ẇ.

    factors, g/τ times what P is over U, shifts and the log-sums' tangents are those of the rows (students), or
    BY_COLUMN those of the columns (teachers).
    """
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    c, tangent = similarities(rows, row_tangents, columns, column_tangents, i, j, row_count, column_count, dim,
                              ROWS_MOVE, COLUMNS_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
                              PRECISION)  # fmt: skip
    c, tangent = with_numbers(c, tangent, along, row_along, i, ROWS_MOVE, BLOCK_ROWS)
    if BY_COLUMN:
        factor = load_vector(factors, j, column_count, BLOCK_COLUMNS)[None, :]
        shift = load_vector(shifts, j, column_count, BLOCK_COLUMNS)[None, :]
        term = load_vector(log_sum_tangents, j, column_count, BLOCK_COLUMNS)[None, :]
    else:
        factor = load_vector(factors, i, row_count, BLOCK_ROWS)[:, None]
        shift = load_vector(shifts, i, row_count, BLOCK_ROWS)[:, None]
        term = load_vector(log_sum_tangents, i, row_count, BLOCK_ROWS)[:, None]
    weights = softmax_weights(c, shift, j, column_count, number(scale, SUM), BLOCK_COLUMNS) * factor
    tangent = weights * (tangent * number(inverse_temperature, SUM) - term)
    tangent = replace_missing(tangent, j, column_count, 0.0, BLOCK_COLUMNS)
    out = sums + number(tl.program_id(0), tl.int64) * row_count
    store_vector(out, tl.sum(tangent, 1), i, row_count, BLOCK_ROWS)
    store_strip(moving, tangent, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    if COLUMNS_MOVE:
        store_strip(still, weights, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
