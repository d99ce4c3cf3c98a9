"""What the kernels of small batches share.

A program owns a few rows and holds their similarities to all columns, at most ``SMALL_BATCH``, in one tile: no walk, no
partial sums, every row's own shift at hand. Widths go by in pieces, forward and for gradients, so that no width is
special and no similarity is computed twice. In float16 each operand of a product is brought within the type by its own
power of two. So an op is one launch, and its gradients one or two.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.launch import Product, cdiv
from gkd_fast.kernels.common.tile import (
    add_product,
    convert,
    load_tile,
    number,
    operand,
    product,
    store_tile,
)  # fmt: skip

SMALL_BATCH = 256
# Rows wider than this go the way of large batches.
SMALL_WIDTH = 1024
MOST_REGISTERS = 255
MEAN_ROWS = tl.constexpr(64)


def is_small(rows: int, has_columns: bool, *widths: int) -> bool:
    """Whether a batch that is its own column set goes to the kernels of small batches."""
    return rows <= SMALL_BATCH and not has_columns and max(widths) <= SMALL_WIDTH


def row_blocks(rows: int) -> int:
    return cdiv(rows, table.SMALL_ROWS)


def constants(arch: str, product: Product, **others) -> dict:
    """Compile-time arguments of a kernel that has all columns in one tile, and its launch's options."""
    is_amd = arch.startswith("gfx")
    found = {
        "BLOCK_ROWS": table.SMALL_ROWS, "BLOCK_COLUMNS": SMALL_BATCH,
        "BLOCK_WIDTH": table.small_block_width(product.name), "SCALED": product.scaled, "num_stages": 1,
        "num_warps": table.SMALL_THREADS // (64 if is_amd else 32), **product.constants(),
    }  # fmt: skip
    if not is_amd:
        # NVIDIA's compiler would rather spill a few registers than not fit two programs on a multiprocessor.
        found["maxnreg"] = MOST_REGISTERS
    return found | others


def weight_columns(product: Product) -> int:
    """Columns of the tiles of weights that are multiplied with the columns' values."""
    return min(SMALL_BATCH, table.small_columns(product.name))


def gradient_constants(arch: str, product: Product) -> dict:
    """As ``constants``, of a kernel that takes the columns in such tiles."""
    return constants(arch, product, BLOCK_COLUMNS=weight_columns(product))


@triton.jit
def mean_row(matrix, k, count, dim, WIDTH: tl.constexpr, SUM: tl.constexpr):
    """Columns k … of the mean row, of all tiles, so that a pair's weight is the same in each; what is not finite counts
    as 0.
    """
    total = tl.zeros([WIDTH], SUM)
    for i in range(0, count, MEAN_ROWS):
        x = load_tile(matrix, i, k, count, dim, MEAN_ROWS, WIDTH).to(SUM)
        total += tl.sum(tl.where(x - x == 0, x, 0.0), 0)
    return total / number(count, SUM)


@triton.jit
def negative_distances(
    rows, i, j, count, dim, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c − 1 of the tile at (i, j) of unit rows, rounded about their mean as ``operands`` says."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    squares, column_squares = tl.zeros([BLOCK_ROWS], SUM), tl.zeros([BLOCK_COLUMNS], SUM)
    distances, column_distances = tl.zeros([BLOCK_ROWS], SUM), tl.zeros([BLOCK_COLUMNS], SUM)
    length = number(0.0, SUM)
    for k in range(0, dim, BLOCK_WIDTH):
        x = load_tile(rows, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH)
        y = load_tile(rows, j, k, count, dim, BLOCK_COLUMNS, BLOCK_WIDTH)
        m = mean_row(rows, k, count, dim, BLOCK_WIDTH, SUM)
        squares += tl.sum(x * x, 1)
        column_squares += tl.sum(y * y, 1)
        length += tl.sum(m * m, 0)
        x, y = convert(x - m[None, :], TYPE), convert(y - m[None, :], TYPE)
        distances += tl.sum(x.to(SUM) * x.to(SUM), 1)
        column_distances += tl.sum(y.to(SUM) * y.to(SUM), 1)
        if SUM == tl.float64:
            # So that no entries are held for the distances beside a product's operands: sm_86 would spill.
            tl.debug_barrier()
        total = add_product(x, tl.trans(y), total, PRECISION)
    distances = tl.where(squares == 0, 1 + length, distances)
    column_distances = tl.where(column_squares == 0, 1 + length, column_distances)
    return total - 0.5 * (distances[:, None] + column_distances[None, :])


@triton.jit
def about_mean(x, m, ROUNDED: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr):
    """x − m in ``TYPE``, what a product with it is in units of, and x, if ROUNDED the sum of m and of what the product
    takes.
    """
    centred, unit = operand(x - m, TYPE, SCALED)
    if ROUNDED:
        x = centred.to(x.dtype) * unit + m
    return centred, unit, x


@triton.jit
def rounded_tile(
    matrix, i, k, count, dim, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Rows i … at columns k … as products of rows about their mean take them."""
    x = load_tile(matrix, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH).to(SUM)
    m = mean_row(matrix, k, count, dim, BLOCK_WIDTH, SUM)[None, :]
    return about_mean(x, m, True, SCALED, TYPE)[2]


@triton.jit
def centred_product(
    rows, columns, i, j, count, dim, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr = False,
):  # fmt: skip
    """x_i·y_j of the tile at (i, j), rounded about the means of either side; if ROUNDED the product of the rounded
    rows, else what the means have part in is exact.
    """
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    p, q = tl.zeros([BLOCK_ROWS], SUM), tl.zeros([BLOCK_COLUMNS], SUM)
    for k in range(0, dim, BLOCK_WIDTH):
        x = load_tile(rows, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH).to(SUM)
        y = load_tile(columns, j, k, count, dim, BLOCK_COLUMNS, BLOCK_WIDTH).to(SUM)
        m = mean_row(rows, k, count, dim, BLOCK_WIDTH, SUM)[None, :]
        n = mean_row(columns, k, count, dim, BLOCK_WIDTH, SUM)[None, :]
        of_x, x_unit, x = about_mean(x, m, ROUNDED, SCALED, TYPE)
        of_y, y_unit, y = about_mean(y, n, ROUNDED, SCALED, TYPE)
        p += tl.sum((x - 0.5 * m) * n, 1)
        q += tl.sum((y - 0.5 * n) * m, 1)
        if SCALED:
            total += product(of_x, tl.trans(of_y), PRECISION) * (x_unit * y_unit)
        else:
            total = add_product(of_x, tl.trans(of_y), total, PRECISION)
    return total + (p[:, None] + q[None, :])


@triton.jit
def load_of_pair(values, place, count, PAIRS: tl.constexpr):
    """The rows ``place`` of a column of [count, PAIRS], zero beyond the last; ``values``: from the column on."""
    return tl.load(values + place * PAIRS, mask=place < count, other=0)


@triton.jit
def store_weighted(
    out, weights, values, i, j, count, dim, accumulate, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    KEEPS_SUMS: tl.constexpr = False,
):  # fmt: skip
    """out_i = Σ_j w_ij values_j of a tile, added to what the program itself stored there before if ``accumulate``.

    KEEPS_SUMS: a row's rounded weights, none of them negative, are scaled to the sum of the unrounded ones.
    """
    sums = tl.sum(weights, 1)
    weights, unit = operand(weights, TYPE, SCALED)
    if KEEPS_SUMS and TYPE != sums.dtype:
        rounded = tl.sum(weights.to(sums.dtype), 1)
        unit = tl.where(rounded > 0, sums / rounded, 0.0)[:, None]
    # What another thread of the program stored is read here.
    tl.debug_barrier()
    for k in tl.range(0, dim, BLOCK_WIDTH, disable_licm=True):
        v = load_tile(values, j, k, count, dim, BLOCK_COLUMNS, BLOCK_WIDTH).to(sums.dtype)
        m = mean_row(values, k, count, dim, BLOCK_WIDTH, sums.dtype)[None, :]
        v, v_unit = operand(v - m, TYPE, SCALED)
        piece = product(weights, v, PRECISION) * (unit * v_unit) + sums[:, None] * m
        piece += load_tile(out, i, k, count * accumulate, dim, BLOCK_ROWS, BLOCK_WIDTH)
        store_tile(out, piece, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH)
