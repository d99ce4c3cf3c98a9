"""neighbor_conv's kernels beside ``graph_conv``'s, which sum over the columns with log-sums taken from the exponents:
A_ij is 2^(x_ij·log2(e) − shares), never above 1. With

    u = exp((x_ij − l_i)/2),  t = exp((x_ij − l_j)/2):  p_ij = u²,  p_ji = t²,  w_ij = u t.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.strips import store_strip, strip_stride
from gkd_fast.kernels.common.tile import (
    COUNTS,
    SPLIT_UNIT,
    add_inner_products,
    column_range,
    divide_walk,
    edge_tile,
    gather,
    inner_products,
    inner_tile,
    load_block,
    load_numbers,
    load_tile,
    load_vector,
    number,
    pick,
    store_rows,
    store_tile,
    store_vector,
)  # fmt: skip
from gkd_fast.kernels.graph_conv.tiles import LOG2E, adjacency, exponents_of, less_shares, shares


@triton.jit
def along_rounded(
    operand, centre, power, tile, i, k, row_count, width, stride, SCALED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """a_i·b_i of a tile of b at columns k …, a the rows as the operand has them; stride: its columns."""
    row, column = i + tl.arange(0, BLOCK_ROWS), k + tl.arange(0, BLOCK_WIDTH)
    mask = (row[:, None] < row_count) & (column[None, :] < width)
    place = row.to(tl.int64)[:, None] * (stride * (2 if SPLIT else 1)) + column[None, :]
    a = tl.load(operand + place, mask=mask, other=0).to(SUM)
    if SPLIT:
        a = (a + tl.load(operand + stride + place, mask=mask, other=0).to(SUM)) * (1 / SPLIT_UNIT)
    if SCALED:
        a = a / tl.load(power)
    a += tl.load(centre + column, mask=column < width, other=0)[None, :]
    return tl.sum(a * tile, 1)


@triton.jit(do_not_specialize=COUNTS)
def neighbor_terms(
    terms, others, upstream, upstream_numbers, upstream_centres, upstream_powers, messages, message_numbers,
    message_centres, message_powers, outputs, partial, messages_gradients, widths, strides, kinds, row_count,
    SYMMETRIC: tl.constexpr, ADDS: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """d and e as ``gradient_weights`` has them: the node terms −(G_i·Y_i + m_i·dM_i)/2 if SYMMETRIC, else −G_i·Y_i, G
    and m as products take them, and if it ADDS the numbers of these; and dM where it comes in several parts.

    strides: the operands' columns. kinds: 16 times how many parts dM comes in.
    """
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    width, stride, parts = pick(widths, stage), pick(strides, stage), number(pick(kinds, stage), tl.int32) // 16
    along = tl.zeros([BLOCK_ROWS], SUM)
    for k in range(0, width, BLOCK_WIDTH):
        output = load_tile(pick(outputs, stage), i, k, row_count, width, BLOCK_ROWS, BLOCK_WIDTH)
        along += along_rounded(
            pick(upstream, stage), pick(upstream_centres, stage), pick(upstream_powers, stage), output, i, k, row_count,
            width, stride, SCALED, SPLIT, BLOCK_ROWS, BLOCK_WIDTH, SUM,
        )  # fmt: skip
        total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], SUM)
        for part in range(0, parts):
            of_part = pick(partial, stage) + number(part, tl.int64) * row_count * width
            total += load_tile(of_part, i, k, row_count, width, BLOCK_ROWS, BLOCK_WIDTH)
        store_tile(
            pick(messages_gradients, stage), total, i, k, row_count * (parts > 1), width, BLOCK_ROWS, BLOCK_WIDTH
        )
        if SYMMETRIC:
            along += along_rounded(
                pick(messages, stage), pick(message_centres, stage), pick(message_powers, stage), total, i, k,
                row_count, width, stride, SCALED, SPLIT, BLOCK_ROWS, BLOCK_WIDTH, SUM,
            )  # fmt: skip
    d = -0.5 * along if SYMMETRIC else -along
    if ADDS:
        of_upstream = load_numbers(pick(upstream_numbers, stage), i, BLOCK_ROWS)
        e = load_numbers(pick(message_numbers, stage), i, BLOCK_ROWS)
        if SYMMETRIC:
            e += of_upstream
        else:
            d += of_upstream
        store_vector(pick(others, stage), e, i, row_count, BLOCK_ROWS)
    store_vector(pick(terms, stage), d, i, row_count, BLOCK_ROWS)


@triton.jit
def half_exponentials(
    x, own, log_sums, i, j, column_count, offset, BOTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """u, and if BOTH t, of a tile of halves of exponents, 0 on the diagonal and in missing columns; own: the rows'
    ``shares`` of ½, and log_sums the columns' log-sums."""
    u = adjacency(less_shares(x, own, log_sums, j, column_count, 0.5, 0.0, BLOCK_COLUMNS), i, j, offset, column_count,
                  0.0, 0, BLOCK_ROWS, BLOCK_COLUMNS, EDGE)  # fmt: skip
    t = u
    if BOTH:
        t = adjacency(less_shares(x, own, log_sums, j, column_count, 0.0, 0.5, BLOCK_COLUMNS), i, j, offset,
                      column_count, 0.0, 0, BLOCK_ROWS, BLOCK_COLUMNS, EDGE)  # fmt: skip
    return u, t


@triton.jit
def gradient_weights(
    u, t, ahead, behind, d, e, column_d, column_e, SYMMETRIC: tl.constexpr, HAS_UPSTREAM: tl.constexpr
):
    """M/v of a tile: u t (ahead + e_i + e_j) + u² d_i + t² d_j if SYMMETRIC, ``ahead`` with what is behind in it; else
    u² (ahead + d_i + e_j) + t² (behind + e_i + d_j). Without HAS_UPSTREAM the terms with t² are 0.
    """
    if SYMMETRIC:
        m = u * t * (ahead + (e[:, None] + column_e[None, :])) + u * u * d[:, None]
        if HAS_UPSTREAM:
            m += t * t * column_d[None, :]
    else:
        m = u * u * (ahead + (d[:, None] + column_e[None, :]))
        if HAS_UPSTREAM:
            m += t * t * (behind + (e[:, None] + column_d[None, :]))
    return m


@triton.jit
def add_nodes(
    total, sums, rows, level, own, h, g, d, e, column_nodes, column_numbers, column_log_sums, column_messages,
    column_upstream, column_terms, column_others, i, j, column_count, offset, half, v, unscale, EDGE: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_UPSTREAM: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ M_ij e_j and Σ M_ij with those of the tile at (i, j) added."""
    BOTH: tl.constexpr = SYMMETRIC or HAS_UPSTREAM
    columns = load_block(column_nodes, j, BLOCK_COLUMNS, WIDTH, PRECISION)  # first, as in graph_conv
    other = load_block(column_messages, j, BLOCK_COLUMNS, VALUE_WIDTH, PRECISION)
    ahead = inner_products(g, other, PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    behind = ahead
    if HAS_UPSTREAM:
        other = load_block(column_upstream, j, BLOCK_COLUMNS, VALUE_WIDTH, PRECISION)
        if SYMMETRIC:
            ahead = add_inner_products(ahead, h, other, PRECISION)
        else:
            behind = inner_products(h, other, PRECISION)
    if SCALED:
        ahead = ahead * unscale
        behind = behind * unscale
    c = inner_products(rows, columns, PRECISION)
    x = exponents_of(c, level, column_numbers, j, half, BLOCK_COLUMNS)
    u, t = half_exponentials(x, own, column_log_sums, i, j, column_count, offset, BOTH, BLOCK_ROWS, BLOCK_COLUMNS, EDGE)
    column_d = load_vector(column_terms, j, column_count, BLOCK_COLUMNS)
    column_e = load_vector(column_others, j, column_count, BLOCK_COLUMNS)
    weights = gradient_weights(u, t, ahead, behind, d, e, column_d, column_e, SYMMETRIC, HAS_UPSTREAM) * v
    return gather(total, weights, columns, TYPE, PRECISION), sums + tl.sum(weights, 1)


@triton.jit(do_not_specialize=COUNTS)
def neighbor_gradients(
    nodes, numbers, log_sums, column_nodes, column_numbers, column_log_sums, centres, messages, upstream,
    column_messages, column_upstream, terms, others, column_terms, column_others, gradients, powers, inverse_variances,
    dims, row_count, column_count, offset, parts, SYMMETRIC: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
    SCALED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j, M as ``gradient_weights`` says, over the part's columns, of every stage.

    powers: those of the messages, of the upstream and of M. Without HAS_UPSTREAM the columns' upstream is zero.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    part, stage = tl.program_id(1), tl.program_id(2)
    nodes, numbers, log_sums, column_nodes, column_numbers, column_log_sums = (
        pick(nodes, stage), pick(numbers, stage), pick(log_sums, stage), pick(column_nodes, stage),
        pick(column_numbers, stage), pick(column_log_sums, stage),
    )  # fmt: skip
    messages, upstream, column_messages, column_upstream = (
        pick(messages, stage), pick(upstream, stage), pick(column_messages, stage), pick(column_upstream, stage)
    )  # fmt: skip
    terms, others, column_terms, column_others = (
        pick(terms, stage), pick(others, stage), pick(column_terms, stage), pick(column_others, stage)
    )  # fmt: skip
    powers, inverse_variance, dim = pick(powers, stage), pick(inverse_variances, stage), pick(dims, stage)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    v = tl.load(inverse_variance).to(SUM)
    half = v * (0.5 * LOG2E)
    unscale = v
    if SCALED:
        unscale = 1 / (tl.load(powers) * tl.load(powers + 1))
        v = v * tl.load(powers + 2)
    rows = load_block(nodes, i, BLOCK_ROWS, WIDTH, PRECISION)
    level = load_numbers(numbers, i, BLOCK_ROWS) * half
    own = shares(log_sums, i, row_count, 0.5, BLOCK_ROWS, SUM)
    g = load_block(upstream, i, BLOCK_ROWS, VALUE_WIDTH, PRECISION)
    h = g
    if HAS_UPSTREAM:
        h = load_block(messages, i, BLOCK_ROWS, VALUE_WIDTH, PRECISION)
    d, e = load_vector(terms, i, row_count, BLOCK_ROWS), load_vector(others, i, row_count, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
    sums = tl.zeros([BLOCK_ROWS], SUM)
    whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in tl.range(0, whole - crossed, disable_licm=True):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        total, sums = add_nodes(
            total, sums, rows, level, own, h, g, d, e, column_nodes, column_numbers, column_log_sums,
            column_messages, column_upstream, column_terms, column_others, i, j, column_count, offset, half, v, unscale,
            False, SYMMETRIC, HAS_UPSTREAM, SCALED, WIDTH, VALUE_WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
        )  # fmt: skip
    for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        total, sums = add_nodes(
            total, sums, rows, level, own, h, g, d, e, column_nodes, column_numbers, column_log_sums,
            column_messages, column_upstream, column_terms, column_others, i, j, column_count, offset, half, v, unscale,
            True, SYMMETRIC, HAS_UPSTREAM, SCALED, WIDTH, VALUE_WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
        )  # fmt: skip
    total += sums[:, None] * load_numbers(pick(centres, stage), 0, WIDTH)[None, :]
    if SCALED:
        total = total * (1 / tl.load(powers + 2))
    out = pick(gradients, stage) + number(part, tl.int64) * row_count * dim
    store_rows(out, total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def neighbor_strip(
    similarities, products, products_behind, weights, sums, numbers, log_sums, column_numbers, column_log_sums, terms,
    others, column_terms, column_others, powers, inverse_variance, row_count, column_count, offset, accumulate,
    SYMMETRIC: tl.constexpr, HAS_UPSTREAM: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Wide rows: weights M from strips of products, and their sums over each part's columns [parts, row_count]."""
    i = tl.program_id(0) * BLOCK_ROWS
    start, stop = column_range(column_count, tl.program_id(1), tl.num_programs(1), BLOCK_COLUMNS)
    sums += number(tl.program_id(1), tl.int64) * row_count
    length = strip_stride(column_count)
    v = tl.load(inverse_variance).to(SUM)
    half = v * (0.5 * LOG2E)
    level = load_numbers(numbers, i, BLOCK_ROWS) * half
    own = shares(log_sums, i, row_count, 0.5, BLOCK_ROWS, SUM)
    d, e = load_vector(terms, i, row_count, BLOCK_ROWS), load_vector(others, i, row_count, BLOCK_ROWS)
    total = load_vector(sums, i, row_count * accumulate, BLOCK_ROWS)
    for j in range(start, stop, BLOCK_COLUMNS):
        c = load_tile(similarities, i, j, row_count, length, BLOCK_ROWS, BLOCK_COLUMNS)
        x = exponents_of(c, level, column_numbers, j, half, BLOCK_COLUMNS)
        u, t = half_exponentials(x, own, column_log_sums, i, j, column_count, offset, True, BLOCK_ROWS, BLOCK_COLUMNS,
                                 None)  # fmt: skip
        ahead = load_tile(products, i, j, row_count, length, BLOCK_ROWS, BLOCK_COLUMNS)
        behind = ahead
        if HAS_UPSTREAM and not SYMMETRIC:
            behind = load_tile(products_behind, i, j, row_count, length, BLOCK_ROWS, BLOCK_COLUMNS)
        if SCALED:
            unscale = 1 / (tl.load(powers) * tl.load(powers + 1))
            ahead = ahead * unscale
            behind = behind * unscale
        column_d = load_vector(column_terms, j, column_count, BLOCK_COLUMNS)
        column_e = load_vector(column_others, j, column_count, BLOCK_COLUMNS)
        m = gradient_weights(u, t, ahead, behind, d, e, column_d, column_e, SYMMETRIC, HAS_UPSTREAM) * v
        if SCALED:
            m = m * tl.load(powers + 2)
        total += tl.sum(m, 1)
        store_strip(weights, m, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    store_vector(sums, total, i, row_count, BLOCK_ROWS)
