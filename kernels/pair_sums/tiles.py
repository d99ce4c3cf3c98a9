"""pair_sums' kernels: products of both sides, a piece of the width at a time, and of these what the kind makes.

``pair_row_sums``: a program owns a block of rows and walks the columns. ``pair_weights``: a program makes one tile of
the weights M^s = ∂/∂x and M^t = ∂/∂y, by which cuBLAS multiplies the columns: dS_i = Σ_j M^s_ij s_j. With TANGENT both
give the tangents, of the same formulas: Ṡ_i = Σ_j (Ṁ^s_ij s_j + M^s_ij ṡ_j).

With GRAPHS the third dimension of the grid is the graph: rows, terms, constants and results are those of many graphs,
[graphs, rows, …], [terms, graphs, rows], [constants, graphs], and the first row_counts[g] rows and column_counts[g]
columns of graph g count.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.duals import tangent
from gkd_fast.kernels.common.strips import store_strip, strip_stride
from gkd_fast.kernels.common.tangents import similarities
from gkd_fast.kernels.common.tile import (
    COUNTS,
    column_range,
    count_of_graph,
    load_vector,
    number,
    of_graph,
    place_among,
    place_of,
    replace_missing,
    store_vector,
)
from gkd_fast.kernels.pair_sums.kinds import slopes_of, sums_of


@triton.jit
def side_products(
    rows, row_tangents, columns, column_tangents, dims, i, j, row_count, column_count, row_length, column_length,
    SIDES: tl.constexpr, GRAPHS: tl.constexpr, MOVING: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x and y of the tile at (i, j), with tangents where the bit of MOVING is set."""
    found = ()
    for q in tl.static_range(SIDES):
        c, moving = similarities(
            of_graph(rows[q], row_length, dims[q], GRAPHS), of_graph(row_tangents[q], row_length, dims[q], GRAPHS),
            of_graph(columns[q], column_length, dims[q], GRAPHS),
            of_graph(column_tangents[q], column_length, dims[q], GRAPHS), i, j, row_count, column_count, dims[q],
            (MOVING >> q) & 1, (MOVING >> q) & 1, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
        )  # fmt: skip
        if (MOVING >> q) & 1:
            found = found + ((c, moving),)
        else:
            found = found + ((c,),)
    return found


@triton.jit
def load_terms(
    terms, tangents, start, count, length, TERMS: tl.constexpr, TANGENT: tl.constexpr, OF_ROWS: tl.constexpr,
    GRAPHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms of a block of rows, or of columns, as duals."""
    loaded = ()
    for p in tl.static_range(TERMS):
        place = place_of(p, length, GRAPHS)
        v = load_vector(terms + place, start, count, BLOCK)
        v = v[:, None] if OF_ROWS else v[None, :]
        if TANGENT:
            d = load_vector(tangents + place, start, count, BLOCK)
            d = d[:, None] if OF_ROWS else d[None, :]
            loaded = loaded + ((v, d),)
        else:
            loaded = loaded + ((v,),)
    return loaded


@triton.jit
def load_constants(
    constants, tangents, COUNT: tl.constexpr, TANGENT: tl.constexpr, GRAPHS: tl.constexpr, SUM: tl.constexpr
):
    """The constants as duals."""
    loaded = ()
    for k in tl.static_range(COUNT):
        place = place_of(k, 1, GRAPHS)
        if TANGENT:
            loaded = loaded + ((tl.load(constants + place).to(SUM), tl.load(tangents + place).to(SUM)),)
        else:
            loaded = loaded + ((tl.load(constants + place).to(SUM),),)
    return loaded


@triton.jit
def is_diagonal(i, j, offset, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Where column j + x is row i + r's own."""
    own = tl.arange(0, BLOCK_ROWS) + (i + offset - j)
    return tl.arange(0, BLOCK_COLUMNS)[None, :] == own[:, None]


@triton.jit
def wanted(x, j, column_count, TANGENT: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The value or, with TANGENT, the tangent, 0 in columns that do not exist."""
    if TANGENT:
        tile = tangent(x)
    else:
        tile = x[0]
    return replace_missing(tile, j, column_count, 0.0, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=COUNTS)
def pair_row_sums(
    rows, row_tangents, columns, column_tangents, dims, terms, term_tangents, column_terms, column_term_tangents,
    constants, constant_tangents, totals, row_counts, column_counts, row_length, column_length, offset, parts,
    KIND: tl.constexpr, GRAPHS: tl.constexpr, SIDES: tl.constexpr, TERMS: tl.constexpr, SUMS: tl.constexpr,
    COUNT: tl.constexpr, MOVING: tl.constexpr,
    TANGENT: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """totals[part, k, i], in float64: the sums over the part's columns or, with TANGENT, their tangents."""
    i = tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    row_count = count_of_graph(row_counts, row_length, GRAPHS)
    column_count = count_of_graph(column_counts, column_length, GRAPHS)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    c = load_constants(constants, constant_tangents, COUNT, TANGENT, GRAPHS, SUM)
    A = load_terms(terms, term_tangents, i, row_count, row_length, TERMS, TANGENT, True, GRAPHS, BLOCK_ROWS)
    total = ()
    for _ in tl.static_range(SUMS):
        total = total + (tl.zeros([BLOCK_ROWS], tl.float64),)
    for j in range(start, stop, BLOCK_COLUMNS):
        found = side_products(
            rows, row_tangents, columns, column_tangents, dims, i, j, row_count, column_count, row_length,
            column_length, SIDES, GRAPHS, MOVING, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
        )  # fmt: skip
        B = load_terms(
            column_terms, column_term_tangents, j, column_count, column_length, TERMS, TANGENT, False, GRAPHS,
            BLOCK_COLUMNS,
        )  # fmt: skip
        is_own = is_diagonal(i, j, offset, BLOCK_ROWS, BLOCK_COLUMNS)
        summands = sums_of(found[0], found[SIDES - 1], A, B, c, is_own, KIND, COUNT)
        new = ()
        for k in tl.static_range(SUMS):
            tile = wanted(summands[k], j, column_count, TANGENT, BLOCK_COLUMNS)
            new = new + (total[k] + tl.sum(tile, 1).to(tl.float64),)
        total = new
    for k in tl.static_range(SUMS):
        out = totals + place_of(part * SUMS + k, row_length, GRAPHS)
        store_vector(out, total[k], i, row_count, BLOCK_ROWS)


@triton.jit
def store_of_graph(
    strip, tile, i, j, row_count, column_count, row_length, column_length, GRAPHS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """A tile of a strip; of a graph's, with zeros where its rows and columns do not count."""
    if GRAPHS:
        rows, columns = i + tl.arange(0, BLOCK_ROWS), j + tl.arange(0, BLOCK_COLUMNS)
        tile = tl.where((rows < row_count)[:, None] & (columns < column_count)[None, :], tile, 0.0)
        strip += tl.program_id(2) * number(row_length, tl.int64) * strip_stride(column_length)
    store_strip(strip, tile, i, j, row_length, column_length, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)


@triton.jit(do_not_specialize=COUNTS)
def pair_weights(
    rows, row_tangents, columns, column_tangents, dims, terms, term_tangents, column_terms, column_term_tangents,
    constants, constant_tangents, upstream, column_upstream, moving, still, sums, row_counts, column_counts, row_length,
    column_length, offset, KIND: tl.constexpr, GRAPHS: tl.constexpr, SIDES: tl.constexpr, TERMS: tl.constexpr,
    COUNT: tl.constexpr, WANTED: tl.constexpr,
    MOVING: tl.constexpr, TANGENT: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Strips of M or, with TANGENT, of M˙ (``moving``) of the sides whose bit of WANTED is set, and of M (``still``)
    where they move; sums[column block, p, i]: the slopes by the rows' terms."""
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    row_count = count_of_graph(row_counts, row_length, GRAPHS)
    column_count = count_of_graph(column_counts, column_length, GRAPHS)
    c = load_constants(constants, constant_tangents, COUNT, TANGENT, GRAPHS, SUM)
    found = side_products(
        rows, row_tangents, columns, column_tangents, dims, i, j, row_count, column_count, row_length,
        column_length, SIDES, GRAPHS, MOVING, APART, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, SUM, PRECISION,
    )  # fmt: skip
    A = load_terms(terms, term_tangents, i, row_count, row_length, TERMS, TANGENT, True, GRAPHS, BLOCK_ROWS)
    B = load_terms(
        column_terms, column_term_tangents, j, column_count, column_length, TERMS, TANGENT, False, GRAPHS, BLOCK_COLUMNS
    )
    g = load_vector(of_graph(upstream, row_length, 1, GRAPHS), i, row_count, BLOCK_ROWS)[:, None]
    h = load_vector(of_graph(column_upstream, column_length, 1, GRAPHS), j, column_count, BLOCK_COLUMNS)[None, :]
    is_own = is_diagonal(i, j, offset, BLOCK_ROWS, BLOCK_COLUMNS)
    by_products, by_terms = slopes_of(
        found[0], found[SIDES - 1], A, B, c, g, h, is_own, KIND, COUNT, (WANTED >> 1) & 1
    )  # fmt: skip
    # M and M˙ of the sides in turn: the strips are those of the wanted ones.
    for q in tl.static_range(len(by_products)):
        if (WANTED >> q) & 1:
            m = by_products[q]
            store_of_graph(
                moving[place_among(WANTED, q)], wanted(m, j, column_count, TANGENT, BLOCK_COLUMNS), i, j, row_count,
                column_count, row_length, column_length, GRAPHS, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
            )  # fmt: skip
            if (MOVING >> q) & 1:
                store_of_graph(
                    still[place_among(WANTED & MOVING, q)], m[0], i, j, row_count, column_count, row_length,
                    column_length, GRAPHS, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                )  # fmt: skip
    for p in tl.static_range(len(by_terms)):
        tile = wanted(by_terms[p], j, column_count, TANGENT, BLOCK_COLUMNS)
        out = sums + place_of(tl.program_id(0) * TERMS + p, row_length, GRAPHS)
        store_vector(out, tl.sum(tile, 1), i, row_count, BLOCK_ROWS)
