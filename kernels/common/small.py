"""What the kernels of small batches share.

A program owns a few rows and holds their similarities to all columns, at most ``SMALL_BATCH``, in one tile: no walk, no
partial sums, every row's own shift at hand. Widths go by in pieces, forward and for gradients, so that no width is
special and no similarity is computed twice. In float16 each operand of a product is brought within the type by its own
power of two. So an op is one launch, and its gradients one or two.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.launch import Product
from gkd_fast.kernels.common.tile import add_tile_product, load_tile, operand, product, store_tile

SMALL_BATCH = 256
# Rows wider than this go the way of large batches.
SMALL_WIDTH = 1024
MOST_REGISTERS = 255


def is_small(rows: int, has_columns: bool, *widths: int) -> bool:
    """Whether a batch that is its own column set goes to the kernels of small batches."""
    return rows <= SMALL_BATCH and not has_columns and max(widths) <= SMALL_WIDTH


def row_blocks(rows: int) -> int:
    return -(-rows // table.SMALL_ROWS)


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
def tile_product(
    rows, columns, i, j, count, dim, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i·y_j of the tile at (i, j)."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    if SCALED:
        for k in range(0, dim, BLOCK_WIDTH):
            x, x_unit = operand(load_tile(rows, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH), TYPE, SCALED)
            y, y_unit = operand(load_tile(columns, j, k, count, dim, BLOCK_COLUMNS, BLOCK_WIDTH), TYPE, SCALED)
            total += product(x, tl.trans(y), PRECISION) * (x_unit * y_unit)
        return total
    else:
        return add_tile_product(rows, columns, i, j, count, count, dim, total, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                                TYPE, PRECISION)  # fmt: skip


@triton.jit
def load_of_pair(values, place, count, PAIRS: tl.constexpr):
    """The rows ``place`` of a column of [count, PAIRS], zero beyond the last; ``values``: from the column on."""
    return tl.load(values + place * PAIRS, mask=place < count, other=0)


@triton.jit
def store_weighted(
    out, weights, values, i, j, count, dim, accumulate, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j w_ij values_j of a tile, added to what the program itself stored there before if ``accumulate``."""
    weights, unit = operand(weights, TYPE, SCALED)
    # What another thread of the program stored is read here.
    tl.debug_barrier()
    for k in tl.range(0, dim, BLOCK_WIDTH, disable_licm=True):
        v, v_unit = operand(load_tile(values, j, k, count, dim, BLOCK_COLUMNS, BLOCK_WIDTH), TYPE, SCALED)
        piece = product(weights, v, PRECISION) * (unit * v_unit)
        piece += load_tile(out, i, k, count * accumulate, dim, BLOCK_ROWS, BLOCK_WIDTH)
        store_tile(out, piece, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH)
