"""What the second order's kernels share.

Twice the rows, two gradients and up to ten products per tile do not fit the registers of a program that walks columns.
So here a program makes one tile, of whatever width, a piece of the width at a time; what it makes of the similarities
and their tangents are partial sums, or weights by which cuBLAS multiplies the columns. Weights come in strips of
bounded size.

All results are linear in the directions. So float16, whose range is short, needs no scaling in a kernel: the launchers
multiply directions by a power of two, and divide the results by it.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.launch import LARGEST_FLOAT16, Product, matrices, power_of_two
from gkd_fast.kernels.common.operands import Operand
from gkd_fast.kernels.common.strips import add_products, column_strips, entry_bytes, row_strips, strip_columns
from gkd_fast.kernels.common.tile import add_product, add_tile_product, load_numbers, load_tile

# No exponential goes to the float units: beside so many products it costs little, and the hardware's errs less.
HARDWARE_ONLY = tl.constexpr(0)


@triton.jit
def similarities(
    rows, row_tangents, columns, column_tangents, i, j, row_count, column_count, dim, ROWS_MOVE: tl.constexpr,
    COLUMNS_MOVE: tl.constexpr, APART: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c_ij = x_i·y_j and ċ_ij = ẋ_i·y_j + x_i·ẏ_j of the tile at (i, j); both may stand still.

    APART: a loop for each product, so that its result is laid out without regard to the others.
    """
    c = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    moving = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    if APART:
        TYPE: tl.constexpr = rows.dtype.element_ty
        c = add_tile_product(rows, columns, i, j, row_count, column_count, dim, c, BLOCK_ROWS, BLOCK_COLUMNS,
                             BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
        if ROWS_MOVE:
            moving = add_tile_product(row_tangents, columns, i, j, row_count, column_count, dim, moving, BLOCK_ROWS,
                                      BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
        if COLUMNS_MOVE:
            moving = add_tile_product(rows, column_tangents, i, j, row_count, column_count, dim, moving, BLOCK_ROWS,
                                      BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
    else:
        for k in range(0, dim, BLOCK_WIDTH):
            x = load_tile(rows, i, k, row_count, dim, BLOCK_ROWS, BLOCK_WIDTH)
            y = load_tile(columns, j, k, column_count, dim, BLOCK_COLUMNS, BLOCK_WIDTH)
            c = add_product(x, tl.trans(y), c, PRECISION)
            if ROWS_MOVE:
                x_tangent = load_tile(row_tangents, i, k, row_count, dim, BLOCK_ROWS, BLOCK_WIDTH)
                moving = add_product(x_tangent, tl.trans(y), moving, PRECISION)
            if COLUMNS_MOVE:
                y_tangent = load_tile(column_tangents, j, k, column_count, dim, BLOCK_COLUMNS, BLOCK_WIDTH)
                moving = add_product(x, tl.trans(y_tangent), moving, PRECISION)
    return c, moving


@triton.jit
def both_sides_numbers(numbers, column_numbers, i, j, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """What the rows' and the columns' numbers add to a tile."""
    return load_numbers(numbers, i, BLOCK_ROWS)[:, None] + load_numbers(column_numbers, j, BLOCK_COLUMNS)[None, :]


def tiling(kernel: str, arch: str, product: Product, rows: int, columns: int) -> tuple[tuple[int, int], dict]:
    """The grid, columns first, of one program per tile; and the compile-time arguments."""
    config = table.tiles(kernel, arch, product.name, 0)
    constants = {
        "APART": arch in table.PRODUCTS_APART, "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
        "BLOCK_WIDTH": table.block_width(product.name), "num_warps": config.warps,
        "num_stages": config.stages, **product.constants(),
    }  # fmt: skip
    return (triton.cdiv(columns, config.columns), triton.cdiv(rows, config.rows)), constants


def column_pieces_of(count: int, product: Product, rows: int, weights: int) -> Iterator[slice]:
    """As many columns at a time as ``weights`` strips of ``rows`` rows may have."""
    return column_strips(count, columns_at_a_time(product, rows, weights))


def columns_at_a_time(product: Product, rows: int, weights: int) -> int:
    """The columns of ``weights`` strips of ``rows`` rows."""
    return strip_columns(rows, entry_bytes(product, 0, weights))


def row_blocks(count: int, width: int) -> list[slice]:
    """The rows of one strip after another."""
    return list(row_strips(count, width))


def add_gathered(total: Tensor, weights: Tensor, columns: Operand, piece: slice, sums: Tensor | None = None) -> None:
    """total_i += Σ_j weights_ij columns_j; of columns about a centre with ``sums`` of the weights by column block."""
    width = total.shape[1]
    add_products(total, weights, columns.rows[piece])
    if sums is not None:
        total.addcmul_(sums.sum(dim=0)[:, None], columns.centre[:width])


def converted(x: Tensor, product: Product) -> Tensor:
    """x in the product's type."""
    return x.to(product.torch_type)


class Directions:
    """The directions of the stages, of rows and columns; None where a stage stands still.

    power: what the directions were multiplied by in float16, so that ``bound`` times the longest is about 2^14, by
    default that the longest is about 1; else None.
    """

    def __init__(self, product: Product, *sides: list[Tensor | None], bound: Tensor | float = LARGEST_FLOAT16):
        self.power = None
        if product.scaled and (given := [x for side in sides for x in side if x is not None]):
            norms = torch.stack([torch.linalg.vector_norm(x, dim=1).amax() for x in given])
            self.power = power_of_two(norms.amax() * bound)
        self.sides = [[x if x is None else self.multiplied(x) for x in side] for side in sides]

    def multiplied(self, x: Tensor) -> Tensor:
        """A tangent in the directions' units."""
        return x if self.power is None else x * self.power

    def divided(self, x: Tensor) -> Tensor:
        """The inverse of ``multiplied``."""
        return x if self.power is None else x / self.power


def spread(name: str, tangents: Sequence[Tensor], moving: Sequence[bool], stages: Sequence[Tensor]) -> list:
    """The tangents at the places of the stages that move, None at those that stand still."""
    if len(moving) != len(stages):
        raise ValueError(f"moving must have {len(stages)} entries, got {len(moving)}")
    if len(tangents) != sum(moving):
        raise ValueError(f"{name} must have one for each of {sum(moving)} moving stages, got {len(tangents)}")
    given = iter(tangents)
    places = [next(given) if moves else None for moves in moving]
    for k, (x, stage) in enumerate(zip(places, stages, strict=True)):
        if x is None:
            continue
        (places[k],) = matrices(name, [x], len(stage))
        if x.shape[1] != stage.shape[1] or x.dtype != stage.dtype:
            raise ValueError(
                f"{name} of stage {k} must have shape {tuple(stage.shape)} and type {stage.dtype}, "
                f"got {tuple(x.shape)} and {x.dtype}"
            )
    return places
