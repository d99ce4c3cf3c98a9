"""node_contrast's second order. Along directions of the stages the weights w_ij = 2^(c_ij·scale − shift)·g move at
ẇ_ij = w_ij (ċ_ij/τ − ż), where shift and ż are the log-sum and its tangent of the row or of the column.
"""

import triton
import triton.language as tl
from gkd_fast.kernels.node_contrast_tiles import LOG2E
from gkd_fast.kernels.tangents import load_operand, similarities
from gkd_fast.kernels.tile import (
    COUNTS,
    add_product,
    column_range,
    convert,
    load_rows,
    load_vector,
    number,
    replace_missing,
    store_rows,
    store_tile,
    store_vector,
)  # fmt: skip


@triton.jit
def softmax_weights(c, shift, j, column_count, scale, BLOCK_COLUMNS: tl.constexpr):
    """P_ij of a tile of similarities, 0 in columns that do not exist."""
    weights = tl.exp2(c * scale - shift * LOG2E)
    if j + BLOCK_COLUMNS > column_count:
        weights = replace_missing(weights, j, column_count, 0.0, BLOCK_COLUMNS)
    return weights


@triton.jit(do_not_specialize=COUNTS)
def contrast_tangent_sums(
    rows, row_tangents, columns, column_tangents, log_sums, sums, dim, row_count, column_count, parts, accumulate,
    scale: tl.float64, inverse_temperature: tl.float64, ROWS_MOVE: tl.constexpr, COLUMNS_MOVE: tl.constexpr,
    STRIP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[part, i] = (1/τ) Σ_j P_ij ċ_ij of one pair over the part's columns. With STRIP: see ``similarities``."""
    i = tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    scale = number(scale, SUM)
    mine = load_operand(rows, i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE, not STRIP)
    moves = load_operand(row_tangents, i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE, ROWS_MOVE and not STRIP)
    shift = load_vector(log_sums, i, row_count, BLOCK_ROWS)[:, None]
    out = sums + number(part, tl.int64) * row_count
    total = load_vector(out, i, row_count * accumulate, BLOCK_ROWS)
    for j in range(start, stop, BLOCK_COLUMNS):
        tile = similarities(mine, moves, columns, column_tangents, i, j, row_count, column_count, dim, ROWS_MOVE,
                            COLUMNS_MOVE, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION)  # fmt: skip
        weights = softmax_weights(tile[0], shift, j, column_count, scale, BLOCK_COLUMNS)
        total += tl.sum(weights * tile[1], 1) * number(inverse_temperature, SUM)
    store_vector(out, total, i, row_count, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def contrast_double_gradients(
    rows, row_tangents, columns, column_tangents, upstream, log_sums, log_sum_tangents, gradient, still, dim, row_count,
    column_count, parts, accumulate, scale: tl.float64, inverse_temperature: tl.float64, ROWS_MOVE: tl.constexpr,
    COLUMNS_MOVE: tl.constexpr, BY_COLUMN: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_j (ẇ_ij y_j + w_ij ẏ_j) of one pair over the part's columns.

    upstream g (with 1/τ), log-sums and their tangents are those of the rows (students), or BY_COLUMN those of the
    columns (teachers). With STRIP ``gradient`` and ``still`` are strips of ẇ and w.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    scale = number(scale, SUM)
    mine = load_operand(rows, i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE, not STRIP)
    moves = load_operand(row_tangents, i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE, ROWS_MOVE and not STRIP)
    if not STRIP:
        total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
    if not BY_COLUMN:
        g = load_vector(upstream, i, row_count, BLOCK_ROWS)[:, None]
        shift = load_vector(log_sums, i, row_count, BLOCK_ROWS)[:, None]
        term = load_vector(log_sum_tangents, i, row_count, BLOCK_ROWS)[:, None]
    for j in range(start, stop, BLOCK_COLUMNS):
        tile = similarities(mine, moves, columns, column_tangents, i, j, row_count, column_count, dim, ROWS_MOVE,
                            COLUMNS_MOVE, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION)  # fmt: skip
        if BY_COLUMN:
            g = load_vector(upstream, j, column_count, BLOCK_COLUMNS)[None, :]
            shift = load_vector(log_sums, j, column_count, BLOCK_COLUMNS)[None, :]
            term = load_vector(log_sum_tangents, j, column_count, BLOCK_COLUMNS)[None, :]
        weights = softmax_weights(tile[0], shift, j, column_count, scale, BLOCK_COLUMNS) * g
        moving = convert(weights * (tile[1] * number(inverse_temperature, SUM) - term), TYPE)
        if STRIP:
            store_tile(gradient, moving, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
            if COLUMNS_MOVE:
                store_tile(still, convert(weights, TYPE), i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        else:
            total = add_product(moving, tile[2], total, PRECISION)
            if COLUMNS_MOVE:
                total = add_product(convert(weights, TYPE), tile[3], total, PRECISION)
    if not STRIP:
        out = gradient + number(part, tl.int64) * row_count * dim
        before = load_rows(out, i, row_count * accumulate, dim, BLOCK_ROWS, WIDTH, SUM)
        store_rows(out, before + total, i, row_count, dim, BLOCK_ROWS, WIDTH)
