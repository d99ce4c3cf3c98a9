"""What the second order's kernels share: the tangents of similarities, and how a kernel walks tiles or strips.

All results are linear in the directions. So float16, whose range is short, needs no scaling in a kernel: the launchers
multiply directions by a power of two, and divide the results by it.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from gkd_fast.kernels.launch import (
    LARGEST_FLOAT16,
    Columns,
    Product,
    column_pieces,
    divide,
    matrices,
    multiprocessors,
    padded_width,
    power_of_two,
)  # fmt: skip
from gkd_fast.kernels.strips import multiply, row_strips, strip_columns
from gkd_fast.kernels.table import largest_width, tiles
from gkd_fast.kernels.tile import add_product, load_rows, load_tile, product
from torch import Tensor


@triton.jit
def moving_similarities(
    rows, row_tangents, columns, column_tangents, ROWS_MOVE: tl.constexpr, COLUMNS_MOVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ċ_ij = ẋ_i·y_j + x_i·ẏ_j of a tile, of which one term may stand still."""
    if ROWS_MOVE:
        moving = product(row_tangents, tl.trans(columns), PRECISION)
        if COLUMNS_MOVE:
            moving = add_product(rows, tl.trans(column_tangents), moving, PRECISION)
    else:
        moving = product(rows, tl.trans(column_tangents), PRECISION)
    return moving


@triton.jit
def load_operand(
    matrix, start, count, dim, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, IS_READ: tl.constexpr
):
    """A block of rows; the matrix itself where tiles do not read it."""
    if IS_READ:
        return load_rows(matrix, start, count, dim, BLOCK, WIDTH, TYPE)
    else:
        return matrix


@triton.jit
def similarities(
    rows, row_tangents, columns, column_tangents, i, j, row_count, column_count, dim, ROWS_MOVE: tl.constexpr,
    COLUMNS_MOVE: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c and ċ of the tile at (i, j), and the columns and their tangents.

    With STRIP the columns are strips of c and ċ, and come back as such.
    """
    if STRIP:
        c = load_tile(columns, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        moving = load_tile(column_tangents, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
        return c, moving, c, moving
    else:
        other = load_rows(columns, j, column_count, dim, BLOCK_COLUMNS, WIDTH, TYPE)
        other_tangents = load_operand(column_tangents, j, column_count, dim, BLOCK_COLUMNS, WIDTH, TYPE, COLUMNS_MOVE)
        c = product(rows, tl.trans(other), PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        moving = moving_similarities(rows, row_tangents, other, other_tangents, ROWS_MOVE, COLUMNS_MOVE, PRECISION)
        return c, moving, other, other_tangents


class Walk:
    """How a kernel walks the columns: its grid, the parts of the columns, and its compile-time arguments.

    Rows too wide for a program's registers go in strips of similarities, which cuBLAS multiplies.
    """

    def __init__(self, kernel: str, arch: str, product: Product, rows: int, columns: int, device, *widths: int):
        self.product, self.rows = product, rows
        self.is_wide = is_wide(arch, product, *widths)
        width = padded_width(*widths)
        config = tiles("strip" if self.is_wide else kernel, arch, product.name, width)
        row_blocks = triton.cdiv(rows, config.rows)
        self.parts = 1
        if not self.is_wide:
            self.parts = divide(row_blocks, columns, config.columns, rows, multiprocessors(device))
        self.grid = row_blocks, self.parts
        self.constants = {
            "STRIP": self.is_wide, "WIDTH": 16 if self.is_wide else width, "BLOCK_ROWS": config.rows,
            "BLOCK_COLUMNS": config.columns, "num_warps": config.warps, "num_stages": config.stages,
            **product.constants(),
        }  # fmt: skip

    def pieces(self, columns: Sequence[Tensor], strips: int) -> Iterator[Columns]:
        """The columns in pieces; ``strips``: how many strips a wide walk holds at a time."""
        most = strip_columns(self.rows, strips) if self.is_wide else None
        return column_pieces(columns, self.product.torch_type, most=most)

    def strips(
        self, rows: Tensor, row_tangents: Tensor | None, columns: Tensor, column_tangents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Strips of c and, where something moves, of ċ, for one piece of the columns."""
        rows = rows.to(self.product.torch_type)
        similarities, moving = multiply(rows, columns.T), None
        if row_tangents is not None:
            moving = multiply(row_tangents.to(self.product.torch_type), columns.T)
        if column_tangents is not None:
            term = multiply(rows, column_tangents.T)
            moving = term if moving is None else moving.add_(term)
        return similarities, moving

    def weights(self, columns: int, like: Tensor) -> Tensor:
        """An empty strip of weights, of what a strip's columns are multiplied by."""
        return like.new_empty(self.rows, columns, dtype=self.product.torch_type)


def is_wide(arch: str, product: Product, *widths: int) -> bool:
    return padded_width(*widths) > largest_width(arch, product.name, second=True)


def row_blocks(wide: bool, count: int, widest: int) -> list[slice]:
    """The rows that one walk takes: all, or in strips a few at a time."""
    return list(row_strips(count, widest)) if wide else [slice(0, count)]


def complete(partial: Tensor) -> Tensor:
    """The parts' results [parts, …] added in their order."""
    return partial[0] if len(partial) == 1 else partial.sum(dim=0)


def rounded(x: Tensor, product: Product) -> Tensor:
    """x as the tiles' operands are rounded."""
    return x.to(product.torch_type).to(x.dtype)


class Directions:
    """The directions of the stages, of rows and columns; None where a stage stands still.

    power: what the directions were multiplied by in float16, so that the longest is about 1; else None.
    """

    def __init__(self, product: Product, *sides: list[Tensor | None]):
        self.power = None
        if product.scaled and (given := [x for side in sides for x in side if x is not None]):
            norms = torch.stack([torch.linalg.vector_norm(x, dim=1).amax() for x in given])
            self.power = power_of_two(norms.amax()) / LARGEST_FLOAT16
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
