"""What the kernels share: loads, products, exponentials and masks of one tile of similarities."""

import os

import triton
import triton.language as tl

# Arguments that change from call to call: no kernel is compiled anew for their values.
COUNTS = [
    "accumulate", "are_bandwidths", "column_count", "column_length", "count", "factor", "first_node", "first_row",
    "has_degrees", "has_terms", "is_cold", "is_last", "loss_row_stride", "loss_stride", "needed", "node_count",
    "offset", "owned", "partner_stride", "parts", "passes", "row_count", "row_length", "stride", "upstream_row_stride",
    "upstream_stride", "wanted",
]  # fmt: skip

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Added to a float32 of at most 2^22, it leaves the nearest integer, plus the bias of exponents, in the lowest bits.
ROUND_TO_EXPONENT = tl.constexpr(1.5 * 2.0**23 + 127)

# The minimax polynomial of 2^f on [−½, ½], degree 5, lowest first; its relative error is 7.5e-8.
POLYNOMIAL_0 = tl.constexpr(1.0000000716546822)
POLYNOMIAL_1 = tl.constexpr(0.6931469670647334)
POLYNOMIAL_2 = tl.constexpr(0.24022119723848698)
POLYNOMIAL_3 = tl.constexpr(0.05550713273542824)
POLYNOMIAL_4 = tl.constexpr(0.009675541334206542)
POLYNOMIAL_5 = tl.constexpr(0.001327647197931638)

# The relation of a column that does not exist: its weight 2^(R·outer − shift) is 0, and differences of two are 0.
NOWHERE = tl.constexpr(-1e30)


@triton.jit
def number(x, TYPE: tl.constexpr):
    """A scalar as a tensor of ``TYPE``; under the interpreter arguments and loop variables are Python numbers."""
    return tl.full((), x, TYPE)


@triton.jit
def convert(x, TYPE: tl.constexpr):
    """x in ``TYPE``, rounded to nearest; the interpreter would cut float32 off to bfloat16."""
    if INTERPRETED and TYPE == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + (((bits >> 16) & 1) + 0x7FFF)).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def of_graph(pointer, length, width, GRAPHS: tl.constexpr):
    """With GRAPHS, the pointer to the matrix [length, width] of the program's graph, the third index of the grid."""
    if GRAPHS:
        return pointer + tl.program_id(2) * number(length, tl.int64) * width
    else:
        return pointer


@triton.jit
def place_of(k, length, GRAPHS: tl.constexpr):
    """Where vector k of [·, length] begins; with GRAPHS, that of the program's graph of [·, graphs, length]."""
    if GRAPHS:
        return (number(k, tl.int64) * tl.num_programs(2) + tl.program_id(2)) * length
    else:
        return k * number(length, tl.int64)


@triton.jit
def count_of_graph(counts, length, GRAPHS: tl.constexpr):
    """How many of the ``length`` rows are there; with GRAPHS, of the program's graph."""
    if GRAPHS:
        return tl.load(counts + tl.program_id(2)).to(tl.int32)
    else:
        return length


@triton.jit
def column_range(column_count, part, parts, BLOCK_COLUMNS: tl.constexpr):
    """The columns that part ``part`` of ``parts`` walks, whole tiles."""
    per_part = tl.cdiv(tl.cdiv(column_count, BLOCK_COLUMNS), parts) * BLOCK_COLUMNS
    start = part * per_part
    return start, tl.minimum(start + per_part, column_count)


@triton.jit
def divide_walk(start, stop, own, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Of the tiles from column ``start`` to ``stop``: how many are whole, the first that holds a diagonal entry, how
    many whole ones do, and whether a ragged one follows. The rows' own columns start at ``own``.

    A walk takes the tiles that need no replacement (``inner_tile``) before the others (``edge_tile``).
    """
    count = tl.maximum(stop - start, 0)
    whole = count // BLOCK_COLUMNS
    first = tl.minimum(tl.maximum(own - start, 0) // BLOCK_COLUMNS, whole)
    end = tl.minimum(tl.cdiv(tl.maximum(own + BLOCK_ROWS - start, 0), BLOCK_COLUMNS), whole)
    return whole, first, end - first, (count % BLOCK_COLUMNS != 0).to(tl.int32)


@triton.jit
def inner_tile(k, start, first, crossed, BLOCK_COLUMNS: tl.constexpr):
    """The first column of tile k of those that hold no diagonal entry."""
    return start + tl.where(k < first, k, k + crossed) * BLOCK_COLUMNS


@triton.jit
def edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS: tl.constexpr):
    """The first column of tile k of those that hold diagonal entries, and then of the ragged one."""
    return start + tl.where(k < crossed, first + k, whole) * BLOCK_COLUMNS


@triton.jit
def pick(pointers, index):
    """``pointers[index]`` of a tuple, with an index known only when the kernel runs."""
    picked = pointers[0]
    for k in tl.static_range(1, len(pointers)):
        picked = tl.where(index == k, pointers[k], picked)
    return picked


@triton.constexpr_function
def place_among(wanted, q):
    """Set bits of ``wanted`` below bit q."""
    return (wanted & ((1 << q) - 1)).bit_count()


@triton.jit
def load_rows(matrix, start, count, dim, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Rows start … start + BLOCK of a contiguous [count, dim] matrix, zero beyond its edges."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    mask = (row[:, None] < count - start) & (column[None, :] < dim)
    corner = matrix + number(start, tl.int64) * dim
    return convert(tl.load(corner + (row[:, None] * dim + column[None, :]), mask=mask, other=0), TYPE)  # [BLOCK, WIDTH]


# Split rows, at most 2 long, are stored times this, so that the second numbers of short ones have all their digits.
SPLIT_UNIT = tl.constexpr(2.0**13)


@triton.constexpr_function
def is_split(precision):
    """Whether a product's operands are sums of two float16 numbers."""
    return precision == "float16x3"


@triton.jit
def load_block(operand, start, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Rows start … start + BLOCK of an operand, WIDTH wide and whole tiles long, so that no load is masked; of a split
    one the two matrices whose sum they are.
    """
    if is_split(PRECISION):
        corner = operand + number(start, tl.int64) * (2 * WIDTH)
        place = tl.arange(0, BLOCK)[:, None] * (2 * WIDTH) + tl.arange(0, WIDTH)[None, :]
        return tl.load(corner + place), tl.load(corner + (place + WIDTH))
    else:
        corner = operand + number(start, tl.int64) * WIDTH
        return tl.load(corner + (tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]))


@triton.jit
def load_numbers(numbers, start, BLOCK: tl.constexpr):
    """The numbers of these rows."""
    return tl.load(numbers + start + tl.arange(0, BLOCK))


@triton.jit
def store_rows(matrix, values, start, count, dim, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of ``load_rows``."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    mask = (row[:, None] < count - start) & (column[None, :] < dim)
    corner = matrix + number(start, tl.int64) * dim
    tl.store(corner + (row[:, None] * dim + column[None, :]), values, mask=mask)


@triton.jit
def load_tile(matrix, i, j, row_count, column_count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The tile at (i, j) of a contiguous [row_count, column_count] matrix, zero beyond its edges."""
    row, column = i + tl.arange(0, BLOCK_ROWS), j + tl.arange(0, BLOCK_COLUMNS)
    mask = (row[:, None] < row_count) & (column[None, :] < column_count)
    return tl.load(matrix + (row.to(tl.int64)[:, None] * column_count + column[None, :]), mask=mask, other=0)


@triton.jit
def store_tile(matrix, tile, i, j, row_count, column_count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The inverse of ``load_tile``."""
    row, column = i + tl.arange(0, BLOCK_ROWS), j + tl.arange(0, BLOCK_COLUMNS)
    mask = (row[:, None] < row_count) & (column[None, :] < column_count)
    tl.store(matrix + (row.to(tl.int64)[:, None] * column_count + column[None, :]), tile, mask=mask)


@triton.jit
def load_vector(vector, start, count, BLOCK: tl.constexpr):
    """Entries start … start + BLOCK of a vector, zero beyond its end."""
    k = tl.arange(0, BLOCK)
    return tl.load(vector + start + k, mask=k < count - start, other=0)


@triton.jit
def store_vector(vector, values, start, count, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    tl.store(vector + start + k, values, mask=k < count - start)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a·b with float32 (float64) sums.

    A matrix unit adds an entry's products alike in tiles of any shape, NumPy does not: interpreted, they are added in
    float64, which also multiplies bfloat16.
    """
    if INTERPRETED and a.dtype != tl.float64:
        wide = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64), out_dtype=tl.float64)
        return wide.to(tl.float32)
    elif a.dtype == tl.float64:  # Triton 3.6 has float32 sums unless told
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    """total + a·b."""
    if INTERPRETED:
        return total + product(a, b, PRECISION)
    elif a.dtype == tl.float64:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def inner_products(rows, columns, PRECISION: tl.constexpr):
    """x_i·y_j of two blocks as ``load_block`` gives them, [BLOCK_ROWS, BLOCK_COLUMNS].

    Of split ones x = x' + x": x"·y' + x'·y" + x'·y', the smaller ones first. What is left out, x"·y", is as small as a
    rounding of float32: one float16 number is within 2^-12 of x, two are within 2^-24.
    """
    if is_split(PRECISION):
        c = tl.dot(rows[1], tl.trans(columns[0]))
        c = tl.dot(rows[0], tl.trans(columns[1]), c)
        return tl.dot(rows[0], tl.trans(columns[0]), c) * (1 / (SPLIT_UNIT * SPLIT_UNIT))
    else:
        return product(rows, tl.trans(columns), PRECISION)


@triton.jit
def add_inner_products(total, rows, columns, PRECISION: tl.constexpr):
    """total + x_i·y_j."""
    if is_split(PRECISION):
        return total + inner_products(rows, columns, PRECISION)
    else:
        return add_product(rows, tl.trans(columns), total, PRECISION)


@triton.jit
def gather(total, weights, columns, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total_i + Σ_j w_ij y_j, ``columns`` as ``load_block`` gives them.

    Of split ones each row's weights are first multiplied by the power of two that brings the largest to 2^14, so that
    none of any size leaves float16's range, and split. The tile's sum is made apart and added as float32 numbers are: a
    matrix unit that keeps adding to a total cuts digits off at every step, more the longer the walk is.
    """
    if is_split(PRECISION):
        power, inverse = row_powers(weights)
        scaled = as_block(weights * power[:, None], TYPE, PRECISION)
        gathered = tl.dot(scaled[1], columns[0])
        gathered = tl.dot(scaled[0], columns[1], gathered)
        gathered = tl.dot(scaled[0], columns[0], gathered)
        return total + gathered * (inverse * (1 / SPLIT_UNIT))[:, None]
    else:
        return add_product(convert(weights, TYPE), columns, total, PRECISION)


@triton.jit
def as_block(x, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x in the product's type, as ``load_block`` gives blocks, but for their unit."""
    if is_split(PRECISION):
        first = x.to(TYPE)
        return first, (x - first.to(x.dtype)).to(TYPE)
    else:
        return convert(x, TYPE)


@triton.jit
def row_powers(x):
    """Powers of two that bring the largest entry of each row of float32 numbers to between 2^14 and 2^15, unless all
    are below 2^-112, and their inverses.
    """
    largest = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
    exponent = tl.maximum(largest >> 23, 15)  # plus 127, as in the bits of a float32
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(bound, LARGEST: tl.constexpr):
    """``launch.power_of_two`` of a float32 number."""
    ratio = LARGEST / tl.minimum(tl.maximum(bound, 2.0**-60), 2.0**60)
    return (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def add_tile_product(
    rows, columns, i, j, row_count, column_count, dim, total, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x_i·y_j of the tile at (i, j), rows of any width, a piece of it at a time."""
    for k in range(0, dim, BLOCK_WIDTH):
        x = convert(load_tile(rows, i, k, row_count, dim, BLOCK_ROWS, BLOCK_WIDTH), TYPE)
        y = convert(load_tile(columns, j, k, column_count, dim, BLOCK_COLUMNS, BLOCK_WIDTH), TYPE)
        total = add_product(x, tl.trans(y), total, PRECISION)
    return total


@triton.jit
def operand(x, TYPE: tl.constexpr, SCALED: tl.constexpr):
    """x in ``TYPE`` and what a product with it is in units of; if SCALED, x times a power of two, near 2^14 at most."""
    if SCALED:
        largest = tl.minimum(tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 2.0**-60), 2.0**60)
        power = tl.exp2(tl.floor(14.0 - tl.log2(largest)))
        return convert(x * power, TYPE), 1.0 / power
    else:
        return convert(x, TYPE), 1.0


@triton.jit
def polynomial_exp2(x):
    """2^x for −126 ≤ x ≤ 127: 2^n by the exponent's bits, times a polynomial in x − n ∈ [−½, ½]."""
    rounded = x + ROUND_TO_EXPONENT
    f = x - (rounded - ROUND_TO_EXPONENT)
    p = POLYNOMIAL_5 * f + POLYNOMIAL_4
    p = p * f + POLYNOMIAL_3
    p = p * f + POLYNOMIAL_2
    p = p * f + POLYNOMIAL_1
    p = p * f + POLYNOMIAL_0
    # A product, since a sum of bits would make a NaN a number.
    return p * (rounded.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def bounded_exp2(x, HALVES: tl.constexpr):
    """2^x for x ≥ −126; of two neighbours, ``HALVES`` go to the float units and the rest to the exponential unit."""
    if x.dtype == tl.float64 or HALVES == 0:
        return tl.exp2(x)
    elif HALVES == 2:
        return polynomial_exp2(x)
    else:
        even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
        return tl.join(polynomial_exp2(even), tl.exp2(odd)).reshape(x.shape[0], x.shape[1])


@triton.jit
def touches_edge(i, j, offset, column_count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Whether the tile at (i, j) holds a diagonal entry or columns that do not exist."""
    own = i + offset - j
    return ((own > -BLOCK_ROWS) & (own < BLOCK_COLUMNS)) | (j + BLOCK_COLUMNS > column_count)


@triton.jit
def replace_diagonal(tile, i, j, offset, value, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The tile at (i, j) with ``value`` where column j + x is row i + r's own."""
    own = tl.arange(0, BLOCK_ROWS) + (i + offset - j)
    return tl.where(tl.arange(0, BLOCK_COLUMNS)[None, :] == own[:, None], value, tile)


@triton.jit
def replace_missing(tile, j, column_count, value, BLOCK_COLUMNS: tl.constexpr):
    """The tile at columns j … with ``value`` in columns that do not exist."""
    return tl.where((tl.arange(0, BLOCK_COLUMNS) < column_count - j)[None, :], tile, value)


@triton.jit
def replace_edges(
    tile, i, j, offset, column_count, diagonal, missing, MISSING: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile at (i, j), at an EDGE with ``diagonal`` on the diagonal and, if MISSING, ``missing`` in columns that do
    not exist. EDGE None: found out when the kernel runs.
    """
    if EDGE is None:
        at_edge = touches_edge(i, j, offset, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        at_edge = EDGE
    if at_edge:
        tile = replace_diagonal(tile, i, j, offset, diagonal, BLOCK_ROWS, BLOCK_COLUMNS)
        if MISSING:
            tile = replace_missing(tile, j, column_count, missing, BLOCK_COLUMNS)
    return tile
