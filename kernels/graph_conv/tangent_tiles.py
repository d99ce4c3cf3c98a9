"""graph_conv's second order. Along a direction of the nodes K˙_ij = v K_ij ċ_ij off the diagonal and 0 on it."""

import triton
import triton.language as tl

from gkd_fast.kernels.common.strips import store_strip
from gkd_fast.kernels.common.tangents import both_sides_numbers, similarities
from gkd_fast.kernels.common.tile import (
    COUNTS,
    add_tile_product,
    load_numbers,
    load_vector,
    number,
    replace_diagonal,
    store_vector,
)  # fmt: skip
from gkd_fast.kernels.graph_conv.tiles import LOG2E, adjacency


@triton.jit
def moving_adjacency(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, i, j, row_count,
    column_count, dim, offset, slope, DIAGONAL: tl.constexpr, BOOST: tl.constexpr, NODES_MOVE: tl.constexpr,
    APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K·2^BOOST and ċ of the tile at (i, j); numbers are distances, and of tangents products with the nodes' centre."""
    c, moving = similarities(rows, row_tangents, columns, column_tangents, i, j, row_count, column_count, dim,
                             NODES_MOVE, NODES_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
                             PRECISION)  # fmt: skip
    near = both_sides_numbers(numbers, column_numbers, i, j, BLOCK_ROWS, BLOCK_COLUMNS)
    k = adjacency((c - near) * slope, i, j, offset, column_count, DIAGONAL, BOOST, BLOCK_ROWS, BLOCK_COLUMNS, None)
    if NODES_MOVE:
        moving += both_sides_numbers(row_along, column_along, i, j, BLOCK_ROWS, BLOCK_COLUMNS)
    return k, moving


@triton.jit(do_not_specialize=COUNTS)
def graph_degree_tangents(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, sums,
    inverse_variance, dim, row_count, column_count, offset,
    APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE:
    tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[column block, i] = Σ_j K˙_ij."""
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    v = tl.load(inverse_variance).to(SUM)
    k, moving = moving_adjacency(
        rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, i, j, row_count,
        column_count, dim, offset, v * LOG2E, 0.0, 0, True, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
        PRECISION,
    )  # fmt: skip
    out = sums + number(tl.program_id(0), tl.int64) * row_count
    store_vector(out, tl.sum(k * moving, 1) * v, i, row_count, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def graph_tangent_weights(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, moving, still,
    sums, inverse_variance, dim, row_count, column_count, offset,
    NODES_MOVE: tl.constexpr, SCALED: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS:
    tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strips of K˙ (``moving``), where the nodes move, and of K (``still``), in float16 times 2^14.

    sums[column block, i]: Σ_j K˙_ij, and after those of all rows Σ_j K_ij, in the same units.
    """
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    BOOST: tl.constexpr = 14 if SCALED else 0
    v = tl.load(inverse_variance).to(SUM)
    k, tangent = moving_adjacency(
        rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, i, j, row_count,
        column_count, dim, offset, v * LOG2E, 1.0, BOOST, NODES_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
        SUM, PRECISION,
    )  # fmt: skip
    out = sums + number(tl.program_id(0), tl.int64) * 2 * row_count
    store_vector(out + row_count, tl.sum(k, 1), i, row_count, BLOCK_ROWS)
    store_strip(still, k, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    if NODES_MOVE:
        tangent = replace_diagonal(k * tangent * (v * 2.0**-BOOST), i, j, offset, 0.0, BLOCK_ROWS, BLOCK_COLUMNS)
        store_vector(out, tl.sum(tangent, 1), i, row_count, BLOCK_ROWS)
        store_strip(moving, tangent, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)


@triton.jit
def crossed_products(
    left, right, column_left, column_right, left_numbers, column_left_numbers, i, j, row_count, column_count, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G'_i·H'_j and H'_i·G'_j; H' is about its centre, and the numbers of G' are products with that."""
    TYPE: tl.constexpr = left.dtype.element_ty
    ahead = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    behind = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    ahead = add_tile_product(left, column_right, i, j, row_count, column_count, width, ahead, BLOCK_ROWS, BLOCK_COLUMNS,
                             BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
    behind = add_tile_product(right, column_left, i, j, row_count, column_count, width, behind, BLOCK_ROWS,
                              BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
    ahead += load_numbers(left_numbers, i, BLOCK_ROWS)[:, None]
    behind += load_numbers(column_left_numbers, j, BLOCK_COLUMNS)[None, :]
    return ahead, behind


@triton.jit
def both_terms(row_terms, column_terms, k, i, j, row_count, column_count, BLOCK_ROWS: tl.constexpr,
               BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    """Entry k of the rows' terms and of the columns', to be added."""
    mine = load_vector(row_terms + k * number(row_count, tl.int64), i, row_count, BLOCK_ROWS)
    other = load_vector(column_terms + k * number(column_count, tl.int64), j, column_count, BLOCK_COLUMNS)
    return mine[:, None], other[None, :]


@triton.jit(do_not_specialize=COUNTS)
def graph_double_gradients(
    rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, left, right, extra,
    left_numbers, column_left, column_right, column_extra, column_left_numbers, row_terms, column_terms, moving, still,
    sums, inverse_variance, unit, dim, width, row_count, column_count, offset,
    NODES_MOVE: tl.constexpr, HAS_EXTRA: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS:
    tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strips of unit·(K˙_ij m_ij + K_ij ṁ_ij) (``moving``) and, where the nodes move, of unit·K_ij m_ij (``still``).

    m_ij = G'_i·H'_j + H'_i·G'_j + d_i + d_j, and with G' and H' moving at rates a and b and by ``extra``
    ṁ_ij = G'_i·H'_j (a_i + b_j) + H'_i·G'_j (b_i + a_j) + G'_i·extra_j + extra_i·G'_j + ḋ_i + ḋ_j; where the nodes
    stand still, so do a, b and d. Terms: ḋ, d, a, b, each [count].  sums[column block, i]: of ``moving``.
    """
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    v = tl.load(inverse_variance).to(SUM)
    mine, other = both_terms(row_terms, column_terms, 0, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
    m_tangent = mine + other
    if HAS_EXTRA:
        _, more = similarities(left, extra, column_left, column_extra, i, j, row_count, column_count, width, True, True,
                               APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION)  # fmt: skip
        m_tangent += more
    if NODES_MOVE:
        ahead, behind = crossed_products(
            left, right, column_left, column_right, left_numbers, column_left_numbers, i, j, row_count, column_count,
            width, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
        )  # fmt: skip
        a, column_a = both_terms(row_terms, column_terms, 2, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        b, column_b = both_terms(row_terms, column_terms, 3, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        m_tangent += ahead * (a + column_b) + behind * (b + column_a)
        mine, other = both_terms(row_terms, column_terms, 1, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        m = ahead + behind + (mine + other)
    k, tangent = moving_adjacency(
        rows, row_tangents, columns, column_tangents, numbers, row_along, column_numbers, column_along, i, j, row_count,
        column_count, dim, offset, v * LOG2E, 0.0, 0, NODES_MOVE, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM,
        PRECISION,
    )  # fmt: skip
    k = k * tl.load(unit).to(SUM)
    if NODES_MOVE:
        m = k * m
        m_tangent = k * m_tangent + m * tangent * v
        store_strip(still, m, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    else:
        m_tangent = k * m_tangent
    out = sums + number(tl.program_id(0), tl.int64) * row_count
    store_vector(out, tl.sum(m_tangent, 1), i, row_count, BLOCK_ROWS)
    store_strip(moving, m_tangent, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
