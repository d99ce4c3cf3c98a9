"""node_contrast's second order. Along directions of the stages the weights w_ij = g P_ij/τ, where upstream g and the
softmax are the row's or the column's, move at ẇ_ij = w_ij (ċ_ij/τ − ż), ż the tangent of its log-sum.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.strips import store_strip
from gkd_fast.kernels.common.tangents import similarities
from gkd_fast.kernels.common.tile import COUNTS, NOWHERE, load_vector, number, replace_edges, store_vector


@triton.jit
def moving_similarities(
    rows, row_tangents, columns, column_tangents, numbers, row_rates, column_numbers, column_rates, i, j, row_count,
    column_count, dim, offset, ROWS_MOVE: tl.constexpr, COLUMNS_MOVE: tl.constexpr, APART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """c and ċ of the tile at (i, j), without own and missing columns; numbers and rates: what c and ċ have of each."""
    c, moving = similarities(rows, row_tangents, columns, column_tangents, i, j, row_count, column_count, dim,
                             ROWS_MOVE, COLUMNS_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
                             PRECISION)  # fmt: skip
    c += load_vector(numbers, i, row_count, BLOCK_ROWS)[:, None]
    c += load_vector(column_numbers, j, column_count, BLOCK_COLUMNS)[None, :]
    moving += load_vector(row_rates, i, row_count, BLOCK_ROWS)[:, None]
    moving += load_vector(column_rates, j, column_count, BLOCK_COLUMNS)[None, :]
    c = replace_edges(c, i, j, offset, column_count, NOWHERE, NOWHERE, True, None, BLOCK_ROWS, BLOCK_COLUMNS)
    return c, moving


@triton.jit(do_not_specialize=COUNTS)
def contrast_tangent_sums(
    rows, row_tangents, columns, column_tangents, numbers, row_rates, column_numbers, column_rates, shifts, sums, dim,
    row_count, column_count, offset, scale: tl.float64, inverse_temperature: tl.float64, ROWS_MOVE: tl.constexpr,
    COLUMNS_MOVE: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[column block, i] = (1/τ) Σ_j U_ij ċ_ij of one pair, U = 2^(c·scale − shift), but for the own column."""
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    c, moving = moving_similarities(
        rows, row_tangents, columns, column_tangents, numbers, row_rates, column_numbers, column_rates, i, j, row_count,
        column_count, dim, offset, ROWS_MOVE, COLUMNS_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
        PRECISION,
    )  # fmt: skip
    shift = load_vector(shifts, i, row_count, BLOCK_ROWS)[:, None]
    weights = tl.exp2(c * number(scale, SUM) - shift)
    total = tl.sum(weights * moving, 1) * number(inverse_temperature, SUM)
    out = sums + number(tl.program_id(0), tl.int64) * row_count
    store_vector(out, total, i, row_count, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def contrast_double_gradients(
    rows, row_tangents, columns, column_tangents, numbers, row_rates, column_numbers, column_rates, factors, shifts,
    log_sum_tangents, moving, still, sums, dim, row_count, column_count, offset, scale: tl.float64,
    inverse_temperature: tl.float64, ROWS_MOVE: tl.constexpr, COLUMNS_MOVE: tl.constexpr, BY_COLUMN: tl.constexpr,
    APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strips of ẇ (``moving``) and, where columns move, of w (``still``), of one pair, 0 at the own columns;
    sums[column block, :, i]: of ẇ, and where columns move of w.

    factors, g/τ times what P is over U, shifts and the log-sums' tangents are those of the rows (students), or
    BY_COLUMN those of the columns (teachers).
    """
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    c, tangent = moving_similarities(
        rows, row_tangents, columns, column_tangents, numbers, row_rates, column_numbers, column_rates, i, j, row_count,
        column_count, dim, offset, ROWS_MOVE, COLUMNS_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
        PRECISION,
    )  # fmt: skip
    if BY_COLUMN:
        factor = load_vector(factors, j, column_count, BLOCK_COLUMNS)[None, :]
        shift = load_vector(shifts, j, column_count, BLOCK_COLUMNS)[None, :]
        term = load_vector(log_sum_tangents, j, column_count, BLOCK_COLUMNS)[None, :]
    else:
        factor = load_vector(factors, i, row_count, BLOCK_ROWS)[:, None]
        shift = load_vector(shifts, i, row_count, BLOCK_ROWS)[:, None]
        term = load_vector(log_sum_tangents, i, row_count, BLOCK_ROWS)[:, None]
    weights = tl.exp2(c * number(scale, SUM) - shift) * factor
    tangent = weights * (tangent * number(inverse_temperature, SUM) - term)
    out = sums + number(tl.program_id(0), tl.int64) * 2 * row_count
    store_vector(out, tl.sum(tangent, 1), i, row_count, BLOCK_ROWS)
    store_strip(moving, tangent, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    if COLUMNS_MOVE:
        store_vector(out + row_count, tl.sum(weights, 1), i, row_count, BLOCK_ROWS)
        store_strip(still, weights, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
