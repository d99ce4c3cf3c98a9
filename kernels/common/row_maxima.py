"""The largest similarity of every row: the shift of sums that could underflow under the common bound."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    Product,
    architecture,
    column_pieces,
    on_device,
    padded_width,
    walk_product_of,
)
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.strips import entry_bytes, multiply, row_strips, strip_columns
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.common.tile import (
    COUNTS,
    SPLIT_UNIT,
    as_block,
    inner_products,
    is_split,
    load_rows,
    load_vector,
    replace_diagonal,
    replace_missing,
    store_vector,
)


@triton.jit(do_not_specialize=COUNTS)
def row_maxima_kernel(
    rows, columns, maxima, dim, row_count, column_count, offset, accumulate, EXCEPT_OWN: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_ROWS
    LOADED: tl.constexpr = SUM if is_split(PRECISION) else TYPE
    own = load_rows(rows, i, row_count, dim, BLOCK_ROWS, WIDTH, LOADED)
    if is_split(PRECISION):
        own *= SPLIT_UNIT
    own = as_block(own, TYPE, PRECISION)
    largest = tl.full([BLOCK_ROWS], -1e30, SUM)
    for j in range(0, column_count, BLOCK_COLUMNS):
        other = load_rows(columns, j, column_count, dim, BLOCK_COLUMNS, WIDTH, LOADED)
        if is_split(PRECISION):
            other *= SPLIT_UNIT
        c = inner_products(own, as_block(other, TYPE, PRECISION), PRECISION)
        if EXCEPT_OWN:
            c = replace_diagonal(c, i, j, offset, -1e30, BLOCK_ROWS, BLOCK_COLUMNS)
        c = replace_missing(c, j, column_count, -1e30, BLOCK_COLUMNS)
        largest = tl.maximum(largest, tl.max(c, 1))
    if accumulate:
        largest = tl.maximum(largest, load_vector(maxima, i, row_count, BLOCK_ROWS))
    store_vector(maxima, largest, i, row_count, BLOCK_ROWS)


def row_maxima(out: Tensor, rows: Tensor, columns: Tensor, offset: int, except_own: bool, product: Product) -> Tensor:
    """out_i = max_j c_ij, without row i's own column i + offset if ``except_own`` (−1e30 where it is the only one)."""
    walk_product = walk_product_of(product, architecture(rows.device), rows.shape[1])
    if walk_product is None:
        return _maxima_of_strips(out, rows, columns, offset, except_own, product)
    # The walk of the degrees: one product per step and a reduction.
    config = tiles("graph_degree_sums", architecture(rows.device), walk_product.name, padded_width(rows.shape[1]))
    constants = {
        "EXCEPT_OWN": except_own, "WIDTH": padded_width(rows.shape[1]), "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns, "num_warps": config.warps, "num_stages": config.stages,
        **walk_product.constants(),
    }  # fmt: skip
    with on_device(rows):
        for piece in column_pieces([columns], product.torch_type):
            launch(row_maxima_kernel, **constants)(
                (triton.cdiv(len(rows), config.rows),), rows, piece.matrices[0], out, rows.shape[1], len(rows),
                piece.count, offset - piece.start, int(piece.start > 0),
            )  # fmt: skip
    return out


def _maxima_of_strips(out, rows, columns, offset, except_own, product: Product) -> Tensor:
    out.fill_(-1e30)
    for strip in row_strips(len(rows), rows.shape[1]):
        largest, own = out[strip], rows[strip].to(product.torch_type)
        most = strip_columns(len(own), entry_bytes(product, 1))
        for piece in column_pieces([columns], product.torch_type, most=most):
            similarities = multiply(own, piece.matrices[0].T)
            first = offset + strip.start - piece.start
            if except_own and -len(own) < first < piece.count:
                similarities.diagonal(first).fill_(-1e30)
            torch.maximum(largest, similarities.amax(dim=1), out=largest)
            del similarities  # before the next ones are made
    return out
