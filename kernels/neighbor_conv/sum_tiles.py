"""neighbor_sums' kernels. In base 2, with L_ij = (c_ij − 1)·slope, slope = v·log2(e), and L* a row's largest L_ij,
j ≠ i: u = 2^(L − L*), the one exponential of an entry, and

    l(v) = ln2·(L* + log2 Σ u),  l(2v) = ln2·(2L* + log2 Σ u²),  Σ p x = ln2·(L* + Σ u (L − L*)/Σ u),  Σ q x with u².

Sums are relative to the largest entry so far, so that nothing underflows where all other nodes are far. What a part of
the columns gives is in the form of the result: parts are added as the sums that they stand for.
"""

import triton
import triton.language as tl

from gkd_fast import _neighbors
from gkd_fast.kernels.common.log_sums import LN2, LOG2E, log_sum
from gkd_fast.kernels.common.small import negative_distances
from gkd_fast.kernels.common.strips import strip_stride
from gkd_fast.kernels.common.tile import (
    COUNTS,
    NOWHERE,
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

MIN_BANDWIDTH, MAX_BANDWIDTH = tl.constexpr(_neighbors.MIN_BANDWIDTH), tl.constexpr(_neighbors.MAX_BANDWIDTH)
# Above ``NOWHERE``, so that columns that do not exist weigh nothing even where no other was met.
LEAST = tl.constexpr(-5e29)


@triton.jit
def known_bandwidth(x):
    """σ within what a search gives; what is no bandwidth is 1."""
    least, largest = number(MIN_BANDWIDTH, x.dtype), number(MAX_BANDWIDTH, x.dtype)
    return tl.where(x >= 0, tl.minimum(tl.maximum(x, least), largest), 1.0)


@triton.jit
def load_slope(inverse_variances, stage, are_bandwidths, SUM: tl.constexpr):
    """v·log2(e) of a stage; 1 of ``are_bandwidths``: they are σ in the place of 1/σ²."""
    x = tl.load(pick(inverse_variances, stage))
    sigma = known_bandwidth(x)
    return tl.where(are_bandwidths == 1, 1 / (sigma * sigma), x).to(SUM) * LOG2E


@triton.jit
def no_sums(BLOCK_ROWS: tl.constexpr, SUM: tl.constexpr):
    """L* and the sums of no entries: Σ u, Σ u², Σ u (L − L*) and Σ u² (L − L*)."""
    total = (tl.full([BLOCK_ROWS], LEAST, SUM),)
    for _ in tl.static_range(4):
        total = total + (tl.zeros([BLOCK_ROWS], SUM),)
    return total


@triton.jit
def with_tile(total, exponents):
    """The sums with those of a tile of L added."""
    top = tl.maximum(total[0], tl.max(exponents, 1))
    fall = total[0] - top
    shrink = tl.exp2(fall)
    shrink_squares = shrink * shrink
    below = exponents - top[:, None]
    u = tl.exp2(below)
    squares = u * u
    return (
        top,
        total[1] * shrink + tl.sum(u, 1),
        total[2] * shrink_squares + tl.sum(squares, 1),
        (total[3] + total[1] * fall) * shrink + tl.sum(u * below, 1),
        (total[4] + total[2] * fall) * shrink_squares + tl.sum(squares * below, 1),
    )


@triton.jit
def store_sums(log_sums, sharp_log_sums, means, sharp_means, total, i, row_count, BLOCK_ROWS: tl.constexpr):
    """What the sums say, in float64; of no entries −inf, −inf, 0 and 0."""
    shift = total[0].to(tl.float64)
    store_vector(log_sums, log_sum(total[1], shift), i, row_count, BLOCK_ROWS)
    store_vector(sharp_log_sums, log_sum(total[2], 2 * shift), i, row_count, BLOCK_ROWS)
    store_vector(means, mean_exponent(total[3], total[1], shift), i, row_count, BLOCK_ROWS)
    store_vector(sharp_means, mean_exponent(total[4], total[2], shift), i, row_count, BLOCK_ROWS)


@triton.jit
def mean_exponent(below, z, shift):
    return tl.where(z == 0, 0.0, ((below / z).to(tl.float64) + shift) * LN2)


@triton.jit
def walked_exponents(
    rows, level, column_nodes, column_numbers, i, j, row_count, column_count, offset, slope, EDGE: tl.constexpr,
    STRIP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """L of the tile at (i, j), ``NOWHERE`` on the diagonal and in missing columns; with STRIP the columns are a strip
    of products.
    """
    if STRIP:
        c = load_tile(column_nodes, i, j, row_count, strip_stride(column_count), BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        columns = load_block(column_nodes, j, BLOCK_COLUMNS, WIDTH, PRECISION)
        c = inner_products(rows, columns, PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    near = level[:, None] + (load_numbers(column_numbers, j, BLOCK_COLUMNS) * slope)[None, :]
    return replace_edges(c * slope - near, i, j, offset, column_count, NOWHERE, NOWHERE, True, EDGE, BLOCK_ROWS,
                         BLOCK_COLUMNS)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def neighbor_sums(
    nodes, numbers, column_nodes, column_numbers, log_sums, sharp_log_sums, means, sharp_means, inverse_variances,
    are_bandwidths, row_count, column_count, offset, parts, stride, STRIP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Results [part, i] over the part's columns, of every stage; stride: the rows of all strips."""
    i = tl.program_id(0) * BLOCK_ROWS
    part, stage = tl.program_id(1), tl.program_id(2)
    nodes, numbers, column_nodes, column_numbers = (
        pick(nodes, stage), pick(numbers, stage), pick(column_nodes, stage), pick(column_numbers, stage)
    )  # fmt: skip
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    slope = load_slope(inverse_variances, stage, are_bandwidths, SUM)
    if STRIP:
        rows = 0.0
    else:
        rows = load_block(nodes, i, BLOCK_ROWS, WIDTH, PRECISION)
    level = load_numbers(numbers, i, BLOCK_ROWS) * slope
    total = no_sums(BLOCK_ROWS, SUM)
    whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in range(0, whole - crossed):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        exponents = walked_exponents(rows, level, column_nodes, column_numbers, i, j, row_count, column_count, offset,
                                     slope, False, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION)  # fmt: skip
        total = with_tile(total, exponents)
    for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        exponents = walked_exponents(rows, level, column_nodes, column_numbers, i, j, row_count, column_count, offset,
                                     slope, True, STRIP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION)  # fmt: skip
        total = with_tile(total, exponents)
    of_part = part * number(stride, tl.int64)
    store_sums(
        pick(log_sums, stage) + of_part, pick(sharp_log_sums, stage) + of_part, pick(means, stage) + of_part,
        pick(sharp_means, stage) + of_part, total, i, row_count, BLOCK_ROWS,
    )  # fmt: skip


@triton.jit
def sum_of_parts(partial, partial_means, i, row_count, parts, BLOCK_ROWS: tl.constexpr):
    """Σ exp of the parts' log-sums as exp(top)·z, and their means, weighted as these say."""
    stride = number(row_count, tl.int64)
    top = load_vector(partial, i, row_count, BLOCK_ROWS)
    for part in range(1, parts):
        top = tl.maximum(top, load_vector(partial + part * stride, i, row_count, BLOCK_ROWS))
    top = tl.where(top == float("-inf"), 0.0, top)
    z, mean = tl.zeros([BLOCK_ROWS], tl.float64), tl.zeros([BLOCK_ROWS], tl.float64)
    for part in range(0, parts):
        share = tl.exp(load_vector(partial + part * stride, i, row_count, BLOCK_ROWS) - top)
        z += share
        mean += share * load_vector(partial_means + part * stride, i, row_count, BLOCK_ROWS)
    return top, z, tl.where(z == 0, 0.0, mean / z)


@triton.jit
def add_parts(partial, partial_means, log_sums, means, i, row_count, parts, BLOCK_ROWS: tl.constexpr):
    """The parts' sums as those of all columns."""
    top, z, mean = sum_of_parts(partial, partial_means, i, row_count, parts, BLOCK_ROWS)
    store_vector(log_sums, top + tl.log(z), i, row_count, BLOCK_ROWS)
    store_vector(means, mean, i, row_count, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def neighbor_sum_parts(
    partial_log_sums, partial_sharp_log_sums, partial_means, partial_sharp_means, log_sums, sharp_log_sums, means,
    sharp_means, row_count, parts, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """What the parts of the columns gave, added in their order."""
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    add_parts(pick(partial_log_sums, stage), pick(partial_means, stage), pick(log_sums, stage), pick(means, stage), i,
              row_count, parts, BLOCK_ROWS)  # fmt: skip
    add_parts(pick(partial_sharp_log_sums, stage), pick(partial_sharp_means, stage), pick(sharp_log_sums, stage),
              pick(sharp_means, stage), i, row_count, parts, BLOCK_ROWS)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def neighbor_small_sums(
    nodes, log_sums, sharp_log_sums, means, sharp_means, inverse_variances, are_bandwidths, dims, count,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``neighbor_sums`` of small batches."""
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    slope = load_slope(inverse_variances, stage, are_bandwidths, SUM)
    c = negative_distances(pick(nodes, stage), i, 0, count, pick(dims, stage), BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                           TYPE, SUM, PRECISION)  # fmt: skip
    exponents = replace_edges(c * slope, i, 0, 0, count, NOWHERE, NOWHERE, True, True, BLOCK_ROWS,
                              BLOCK_COLUMNS)  # fmt: skip
    total = with_tile(no_sums(BLOCK_ROWS, SUM), exponents)
    store_sums(pick(log_sums, stage), pick(sharp_log_sums, stage), pick(means, stage), pick(sharp_means, stage), total,
               i, count, BLOCK_ROWS)  # fmt: skip
