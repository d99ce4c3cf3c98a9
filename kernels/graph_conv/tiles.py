"""graph_conv's kernels. K_ij = exp((c_ij − 1)·v) off the diagonal and 1 on it, in base 2 with slope = v·log2(e).

All matrices that are multiplied are ``operands``: the nodes, whose numbers are h, and the values, rows of H or G times
a factor of their row, 1/deg or deg^-1/2, then called H' or G'.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.strips import store_strip, strip_stride
from gkd_fast.kernels.common.tile import (
    COUNTS,
    add_inner_products,
    column_range,
    convert,
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
    replace_edges,
    store_rows,
    store_tile,
    store_vector,
)  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)

# Factors of a value's row.
ONE = tl.constexpr(0)
INVERSE = tl.constexpr(1)
INVERSE_ROOT = tl.constexpr(2)


@triton.jit
def adjacency(
    exponents, i, j, offset, column_count, DIAGONAL: tl.constexpr, BOOST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, EDGE: tl.constexpr = True,
):  # fmt: skip
    """K·2^BOOST of a tile of (c − 1)·slope: at an EDGE DIAGONAL·2^BOOST on the diagonal, 0 in missing columns.

    EDGE None: found out when the kernel runs.
    """
    k = tl.exp2(exponents + BOOST)
    return replace_edges(k, i, j, offset, column_count, DIAGONAL * 2.0**BOOST, 0.0, True, EDGE, BLOCK_ROWS,
                         BLOCK_COLUMNS)  # fmt: skip


@triton.jit
def exponents_of(c, level, column_numbers, j, slope, BLOCK_COLUMNS: tl.constexpr):
    """(c_ij − 1)·slope of a tile of products of rows, whose ``level`` is h·slope, and columns."""
    return c * slope - (level[:, None] + (load_numbers(column_numbers, j, BLOCK_COLUMNS) * slope)[None, :])


@triton.jit
def walked_adjacency(
    rows, level, columns, column_numbers, i, j, column_count, offset, slope, DIAGONAL: tl.constexpr,
    BOOST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """``adjacency`` of a block of rows, whose ``level`` is h·slope, and a block of columns."""
    c = inner_products(rows, columns, PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    x = exponents_of(c, level, column_numbers, j, slope, BLOCK_COLUMNS)
    return adjacency(x, i, j, offset, column_count, DIAGONAL, BOOST, BLOCK_ROWS, BLOCK_COLUMNS, EDGE)


@triton.jit
def shares(log_sums, i, count, SHARE: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    """SHARE·l of these rows in base 2, as a number of the sums' type and its rest: they are of the size 1/σ², so that
    one rounding would move all weights of a row. −∞, of a row without others, counts as 0.
    """
    wide = load_vector(log_sums, i, count, BLOCK) * (SHARE * LOG2E)
    wide = tl.where(wide == float("-inf"), 0.0, wide)
    high = wide.to(SUM)
    return high, (wide - high.to(tl.float64)).to(SUM)


@triton.jit
def less_shares(x, own, log_sums, j, count, ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr,
                BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    """Exponents of a tile less the ``shares`` of its rows, ``own``, and of its columns; x is a tile of those that the
    log-sums were made of, so that the exponent of an only neighbour is 0. ``own`` may be without the rest, for sums to
    be multiplied by.
    """
    if ROW_SHARE != 0:
        x = x - own[0][:, None]
    if COLUMN_SHARE != 0:
        high, rest = shares(log_sums, j, count, COLUMN_SHARE, BLOCK_COLUMNS, x.dtype)
        x = x - high[None, :] - rest[None, :]
    if ROW_SHARE != 0 and len(own) == 2:
        x = x - own[1][:, None]
    return x


@triton.jit
def add_degrees(
    total, rows, level, column_nodes, column_numbers, i, j, stop, offset, slope, EDGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = load_block(column_nodes, j, BLOCK_COLUMNS, WIDTH, PRECISION)
    k = walked_adjacency(rows, level, columns, column_numbers, i, j, stop, offset, slope, 1.0, 0, BLOCK_ROWS,
                         BLOCK_COLUMNS, PRECISION, EDGE)  # fmt: skip
    return total + tl.sum(k, 1)


@triton.jit(do_not_specialize=COUNTS)
def graph_degree_sums(
    nodes, numbers, column_nodes, column_numbers, degrees, inverse_variances, row_count, column_count, offset, parts,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """degrees[part, i] = Σ_j K_ij over the part's columns, of every stage."""
    i = tl.program_id(0) * BLOCK_ROWS
    part, stage = tl.program_id(1), tl.program_id(2)
    nodes, numbers, column_nodes, column_numbers = (
        pick(nodes, stage), pick(numbers, stage), pick(column_nodes, stage), pick(column_numbers, stage)
    )  # fmt: skip
    degrees, inverse_variance = pick(degrees, stage), pick(inverse_variances, stage)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    slope = tl.load(inverse_variance).to(SUM) * LOG2E
    rows = load_block(nodes, i, BLOCK_ROWS, WIDTH, PRECISION)
    level = load_numbers(numbers, i, BLOCK_ROWS) * slope
    total = tl.zeros([BLOCK_ROWS], SUM)
    whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in range(0, whole - crossed):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        total = add_degrees(total, rows, level, column_nodes, column_numbers, i, j, stop, offset, slope, False,
                            BLOCK_ROWS, BLOCK_COLUMNS, WIDTH, PRECISION)  # fmt: skip
    for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        total = add_degrees(total, rows, level, column_nodes, column_numbers, i, j, stop, offset, slope, True,
                            BLOCK_ROWS, BLOCK_COLUMNS, WIDTH, PRECISION)  # fmt: skip
    store_vector(degrees + number(part, tl.int64) * row_count, total, i, row_count, BLOCK_ROWS)


@triton.jit
def row_factor(degrees, FACTOR: tl.constexpr):
    if FACTOR == INVERSE:
        return 1 / degrees
    elif FACTOR == INVERSE_ROOT:
        return tl.rsqrt(degrees)
    else:
        return degrees * 0 + 1


@triton.constexpr_function
def keeps_sums(diagonal, type, precision):
    """Whether rounded weights are scaled to the sums of the unrounded ones: over the others one may be near 1, and all
    the others together weigh as little as its rounding.
    """
    return diagonal == 0 and type.primitive_bitwidth == 16 and precision != "float16x3"


@triton.jit
def add_values(
    total, degrees, rounded, rows, level, own, column_nodes, column_numbers, column_log_sums, values, i, j,
    column_count, offset, slope, ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr, DIAGONAL: tl.constexpr,
    EDGE: tl.constexpr, BOOST: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ K_ij values_j, Σ K_ij and where they are wanted the sums of the rounded K_ij, with those of the tile at (i, j)
    added.
    """
    columns = load_block(column_nodes, j, BLOCK_COLUMNS, WIDTH, PRECISION)
    v = load_block(values, j, BLOCK_COLUMNS, VALUE_WIDTH, PRECISION)
    c = inner_products(rows, columns, PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    x = exponents_of(c, level, column_numbers, j, slope, BLOCK_COLUMNS)
    x = less_shares(x, own, column_log_sums, j, column_count, ROW_SHARE, COLUMN_SHARE, BLOCK_COLUMNS)
    k = adjacency(x, i, j, offset, column_count, DIAGONAL, BOOST, BLOCK_ROWS, BLOCK_COLUMNS, EDGE)
    if keeps_sums(DIAGONAL, TYPE, PRECISION):
        rounded += tl.sum(convert(k, TYPE).to(k.dtype), 1)
    return gather(total, k, v, TYPE, PRECISION), degrees + tl.sum(k, 1), rounded


@triton.jit(do_not_specialize=COUNTS)
def graph_sums(
    nodes, numbers, column_nodes, column_numbers, values, centres, log_sums, column_log_sums, row_degrees, outputs,
    sums, powers, inverse_variances, widths, row_count, column_count, offset, parts, DEGREES: tl.constexpr,
    ROW_FACTOR: tl.constexpr, SCALED: tl.constexpr, ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr,
    DIAGONAL: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """output_i = f_i Σ_j K_ij values_j over the part's columns, and with DEGREES sums_i = Σ_j K_ij, of every stage.

    The row factor f is applied to complete sums alone. centres: the values'. powers: what they were multiplied by if
    SCALED. DIAGONAL: K_ii. Over the others K_ij is exp(x_ij − ROW_SHARE·l_i − COLUMN_SHARE·l_j).
    """
    i = tl.program_id(0) * BLOCK_ROWS
    part, stage = tl.program_id(1), tl.program_id(2)
    nodes, numbers, column_nodes, column_numbers = (
        pick(nodes, stage), pick(numbers, stage), pick(column_nodes, stage), pick(column_numbers, stage)
    )  # fmt: skip
    values, centre, row_degrees, output, sums = (
        pick(values, stage), pick(centres, stage), pick(row_degrees, stage), pick(outputs, stage), pick(sums, stage)
    )  # fmt: skip
    power, inverse_variance, width = pick(powers, stage), pick(inverse_variances, stage), pick(widths, stage)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    slope = tl.load(inverse_variance).to(SUM) * LOG2E
    # Small weights keep their precision in float16 when all are scaled up.
    BOOST: tl.constexpr = 14 if SCALED else 0
    rows = load_block(nodes, i, BLOCK_ROWS, WIDTH, PRECISION)
    level = load_numbers(numbers, i, BLOCK_ROWS) * slope
    own, column_log_sums = level, pick(column_log_sums, stage)
    if ROW_SHARE != 0:
        own, _ = shares(pick(log_sums, stage), i, row_count, ROW_SHARE, BLOCK_ROWS, SUM)
    degrees, rounded = tl.zeros([BLOCK_ROWS], SUM), tl.zeros([BLOCK_ROWS], SUM)
    total = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], SUM)
    whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in range(0, whole - crossed):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        total, degrees, rounded = add_values(
            total, degrees, rounded, rows, level, (own,), column_nodes, column_numbers, column_log_sums, values, i, j,
            column_count, offset, slope, ROW_SHARE, COLUMN_SHARE, DIAGONAL, False, BOOST, WIDTH, VALUE_WIDTH,
            BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
        )  # fmt: skip
    for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        total, degrees, rounded = add_values(
            total, degrees, rounded, rows, level, (own,), column_nodes, column_numbers, column_log_sums, values, i, j,
            column_count, offset, slope, ROW_SHARE, COLUMN_SHARE, DIAGONAL, True, BOOST, WIDTH, VALUE_WIDTH,
            BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
        )  # fmt: skip
    if ROW_SHARE != 0:
        _, own_rest = shares(pick(log_sums, stage), i, row_count, ROW_SHARE, BLOCK_ROWS, SUM)
        degrees, total = degrees * tl.exp2(-own_rest), total * tl.exp2(-own_rest)[:, None]
        rounded = rounded * tl.exp2(-own_rest)
    if keeps_sums(DIAGONAL, TYPE, PRECISION):
        total = total * tl.where(rounded > 0, degrees / rounded, 0.0)[:, None]
    if SCALED:
        total = total * (2.0**-BOOST / tl.load(power))
        degrees = degrees * 2.0**-BOOST
    total += degrees[:, None] * load_numbers(centre, 0, VALUE_WIDTH)[None, :]
    part_rows = number(part, tl.int64) * row_count
    if DEGREES:
        store_vector(sums + part_rows, degrees, i, row_count, BLOCK_ROWS)
    elif ROW_FACTOR != ONE:
        row = tl.arange(0, BLOCK_ROWS)
        degrees = tl.load(row_degrees + i + row, mask=row < row_count - i, other=1)
    if parts == 1:
        total = total * row_factor(degrees, ROW_FACTOR)[:, None]
    store_rows(output + part_rows * width, total, i, row_count, width, BLOCK_ROWS, VALUE_WIDTH)


@triton.jit
def along_rows(a, b, i, k, row_count, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr):
    """a_i·b_i over columns k … k + BLOCK_WIDTH."""
    row, column = i + tl.arange(0, BLOCK_ROWS), k + tl.arange(0, BLOCK_WIDTH)
    mask = (row[:, None] < row_count) & (column[None, :] < width)
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    x, y = tl.load(a + place, mask=mask, other=0).to(SUM), tl.load(b + place, mask=mask, other=0).to(SUM)
    return tl.sum(x * y, 1)


@triton.jit(do_not_specialize=COUNTS)
def graph_parts(
    partial, partial_degrees, row_degrees, outputs, degrees, widths, row_count, parts, has_degrees, factor,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """What the parts of the columns gave, added in their order, times the row factor; 1 of ``has_degrees``: also the
    degrees, which are read otherwise.
    """
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    partial, output, width = pick(partial, stage), pick(outputs, stage), pick(widths, stage)
    degree = load_vector(pick(row_degrees, stage), i, row_count * (1 - has_degrees), BLOCK_ROWS).to(SUM)
    for part in range(0, parts * has_degrees):
        of_part = pick(partial_degrees, stage) + number(part, tl.int64) * row_count
        degree += load_vector(of_part, i, row_count, BLOCK_ROWS)
    store_vector(pick(degrees, stage), degree, i, row_count * has_degrees, BLOCK_ROWS)
    scale = tl.where(factor == INVERSE, 1 / degree, tl.where(factor == INVERSE_ROOT, tl.rsqrt(degree), 1.0))[:, None]
    for k in range(0, width, BLOCK_WIDTH):
        total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], SUM)
        for part in range(0, parts):
            of_part = partial + number(part, tl.int64) * row_count * width
            total += load_tile(of_part, i, k, row_count, width, BLOCK_ROWS, BLOCK_WIDTH)
        store_tile(output, total * scale, i, k, row_count, width, BLOCK_ROWS, BLOCK_WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def graph_terms(
    terms, upstream, convolved, messages, messages_gradients, degrees, message_numbers, upstream_numbers, widths,
    row_count, SYMMETRIC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The node terms −(G_i·Y_i)/deg_i, or if SYMMETRIC −(G_i·Y_i + H_i·dH_i)/(2 deg_i), to which the numbers of H' and
    of G' are added.
    """
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    upstream, convolved, width = pick(upstream, stage), pick(convolved, stage), pick(widths, stage)
    along = tl.zeros([BLOCK_ROWS], SUM)
    for k in range(0, width, BLOCK_WIDTH):
        along += along_rows(upstream, convolved, i, k, row_count, width, BLOCK_ROWS, BLOCK_WIDTH, SUM)
        if SYMMETRIC:
            along += along_rows(
                pick(messages, stage), pick(messages_gradients, stage), i, k, row_count, width, BLOCK_ROWS, BLOCK_WIDTH,
                SUM,
            )  # fmt: skip
    if SYMMETRIC:
        along = along * 0.5
    term = -along / load_vector(pick(degrees, stage), i, row_count, BLOCK_ROWS)
    term += load_numbers(pick(message_numbers, stage), i, BLOCK_ROWS)
    term += load_numbers(pick(upstream_numbers, stage), i, BLOCK_ROWS)
    store_vector(pick(terms, stage), term, i, row_count, BLOCK_ROWS)


@triton.jit
def add_nodes(
    total, sums, rows, level, h, g, d, column_nodes, column_numbers, column_messages, column_upstream, column_terms, i,
    j, column_count, offset, slope, v, unscale, EDGE: tl.constexpr, HAS_UPSTREAM: tl.constexpr, SCALED: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ M_ij e_j and Σ M_ij with those of the tile at (i, j) added."""
    # Loaded first, although used last: of nodes narrower than values, loaded after these, ptxas 12.8 (in the wheels of
    # Triton 3.6 and 3.7) sets the second product's descriptors at the end of a step only, so that the first step reads
    # elsewhere.
    columns = load_block(column_nodes, j, BLOCK_COLUMNS, WIDTH, PRECISION)
    other = load_block(column_messages, j, BLOCK_COLUMNS, VALUE_WIDTH, PRECISION)
    m = inner_products(g, other, PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    if HAS_UPSTREAM:
        other = load_block(column_upstream, j, BLOCK_COLUMNS, VALUE_WIDTH, PRECISION)
        m = add_inner_products(m, h, other, PRECISION)
    if SCALED:
        m = m * unscale
    m += d[:, None]
    if HAS_UPSTREAM:
        m += load_vector(column_terms, j, column_count, BLOCK_COLUMNS)[None, :]
    k = walked_adjacency(rows, level, columns, column_numbers, i, j, column_count, offset, slope, 0.0, 0, BLOCK_ROWS,
                         BLOCK_COLUMNS, PRECISION, EDGE)  # fmt: skip
    weights = k * m * v
    return gather(total, weights, columns, TYPE, PRECISION), sums + tl.sum(weights, 1)


@triton.jit(do_not_specialize=COUNTS)
def graph_gradients(
    nodes, numbers, column_nodes, column_numbers, centres, messages, upstream, column_messages, column_upstream, terms,
    column_terms, gradients, powers, inverse_variances, dims, row_count, column_count, offset, parts,
    HAS_UPSTREAM: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j, M_ij = v K_ij (G'_i·H'_j + H'_i·G'_j + d_i + d_j) off the diagonal, over the part's columns,
    of every stage.

    terms: d and the numbers of G' and H'. powers: those of H', of G' and of M. Without HAS_UPSTREAM the columns' G' and
    terms are zero.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    part, stage = tl.program_id(1), tl.program_id(2)
    nodes, numbers, column_nodes, column_numbers = (
        pick(nodes, stage), pick(numbers, stage), pick(column_nodes, stage), pick(column_numbers, stage)
    )  # fmt: skip
    messages, upstream, column_messages, column_upstream = (
        pick(messages, stage), pick(upstream, stage), pick(column_messages, stage), pick(column_upstream, stage)
    )  # fmt: skip
    terms, column_terms, centre, gradient = (
        pick(terms, stage), pick(column_terms, stage), pick(centres, stage), pick(gradients, stage)
    )  # fmt: skip
    powers, inverse_variance, dim = pick(powers, stage), pick(inverse_variances, stage), pick(dims, stage)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    v = tl.load(inverse_variance).to(SUM)
    slope = v * LOG2E
    unscale = v
    if SCALED:
        unscale = 1 / (tl.load(powers) * tl.load(powers + 1))
        v = v * tl.load(powers + 2)
    rows = load_block(nodes, i, BLOCK_ROWS, WIDTH, PRECISION)
    level = load_numbers(numbers, i, BLOCK_ROWS) * slope
    g = load_block(upstream, i, BLOCK_ROWS, VALUE_WIDTH, PRECISION)
    h = g
    if HAS_UPSTREAM:
        h = load_block(messages, i, BLOCK_ROWS, VALUE_WIDTH, PRECISION)
    d = load_vector(terms, i, row_count, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
    sums = tl.zeros([BLOCK_ROWS], SUM)
    whole, first, crossed, rest = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in tl.range(0, whole - crossed, disable_licm=True):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        total, sums = add_nodes(
            total, sums, rows, level, h, g, d, column_nodes, column_numbers, column_messages, column_upstream,
            column_terms, i, j, column_count, offset, slope, v, unscale, False, HAS_UPSTREAM, SCALED, WIDTH,
            VALUE_WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
        )  # fmt: skip
    for k in tl.range(0, crossed + rest, num_stages=1, disable_licm=True):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        total, sums = add_nodes(
            total, sums, rows, level, h, g, d, column_nodes, column_numbers, column_messages, column_upstream,
            column_terms, i, j, column_count, offset, slope, v, unscale, True, HAS_UPSTREAM, SCALED, WIDTH,
            VALUE_WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION,
        )  # fmt: skip
    total += sums[:, None] * load_numbers(centre, 0, WIDTH)[None, :]
    if SCALED:
        total = total * (1 / tl.load(powers + 2))
    out = gradient + number(part, tl.int64) * row_count * dim
    store_rows(out, total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["inverse_variance"])
def graph_strip(
    similarities, products, weights, sums, rounded_sums, numbers, column_numbers, terms, column_terms, powers,
    inverse_variance, log_sums, column_log_sums, row_count, column_count, offset, accumulate, GRADIENT: tl.constexpr,
    SCALED: tl.constexpr, ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr, DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Wide rows: weights K, or with GRADIENT M, from strips of products, and their sums over each part's columns
    [parts, row_count]; of K where they are kept also those of the rounded ones.

    products: strips of G'_i·H'_j + H'_i·G'_j.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    start, stop = column_range(column_count, tl.program_id(1), tl.num_programs(1), BLOCK_COLUMNS)
    sums += number(tl.program_id(1), tl.int64) * row_count
    length = strip_stride(column_count)
    v = tl.load(inverse_variance).to(SUM)
    slope = v * LOG2E
    BOOST: tl.constexpr = 14 if SCALED and not GRADIENT else 0
    level = load_numbers(numbers, i, BLOCK_ROWS) * slope
    total = load_vector(sums, i, row_count * accumulate, BLOCK_ROWS)
    own = level, level
    if ROW_SHARE != 0:
        own = shares(log_sums, i, row_count, ROW_SHARE, BLOCK_ROWS, SUM)
    KEEPS_SUMS: tl.constexpr = not GRADIENT and keeps_sums(DIAGONAL, TYPE, "ieee")
    if KEEPS_SUMS:
        rounded_sums += number(tl.program_id(1), tl.int64) * row_count
        rounded = load_vector(rounded_sums, i, row_count * accumulate, BLOCK_ROWS)
    for j in range(start, stop, BLOCK_COLUMNS):
        c = load_tile(similarities, i, j, row_count, length, BLOCK_ROWS, BLOCK_COLUMNS)
        x = exponents_of(c, level, column_numbers, j, slope, BLOCK_COLUMNS)
        x = less_shares(x, own, column_log_sums, j, column_count, ROW_SHARE, COLUMN_SHARE, BLOCK_COLUMNS)
        k = adjacency(x, i, j, offset, column_count, 0.0 if GRADIENT else DIAGONAL, BOOST, BLOCK_ROWS,
                      BLOCK_COLUMNS, None)  # fmt: skip
        if GRADIENT:
            m = load_tile(products, i, j, row_count, length, BLOCK_ROWS, BLOCK_COLUMNS)
            if SCALED:
                m = m * (1 / (tl.load(powers) * tl.load(powers + 1)))
            m += load_vector(terms, i, row_count, BLOCK_ROWS)[:, None]
            m += load_vector(column_terms, j, column_count, BLOCK_COLUMNS)[None, :]
            k = k * m * v
            if SCALED:
                k = k * tl.load(powers + 2)
        total += tl.sum(k, 1) * 2.0**-BOOST
        if KEEPS_SUMS:
            rounded += tl.sum(convert(k, TYPE).to(SUM), 1) * 2.0**-BOOST
        store_strip(weights, k, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    store_vector(sums, total, i, row_count, BLOCK_ROWS)
    if KEEPS_SUMS:
        store_vector(rounded_sums, rounded, i, row_count, BLOCK_ROWS)
