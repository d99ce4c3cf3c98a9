"""unit_rows' kernels: rows of any floating type, strides and width, a piece of the width at a time."""

import triton
import triton.language as tl

from gkd_fast.kernels.common.tile import convert, number, pick


@triton.jit
def load_block(
    matrix, i, k, count, dim, row_stride, stride, TYPE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = i + tl.arange(0, ROWS).to(tl.int64)
    column = k + tl.arange(0, WIDTH).to(tl.int64)
    mask = (row[:, None] < count) & (column[None, :] < dim)
    return tl.load(matrix + row[:, None] * row_stride + column[None, :] * stride, mask=mask, other=0).to(TYPE)


@triton.jit
def store_block(matrix, values, i, k, count, dim, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = i + tl.arange(0, ROWS).to(tl.int64)
    column = k + tl.arange(0, WIDTH)
    mask = (row[:, None] < count) & (column[None, :] < dim)
    tl.store(matrix + row[:, None] * dim + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["count"])
def unit_rows_forward(
    rows, row_strides, strides, dims, units, inverse_norms, count, zero: tl.float64, TYPE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """e = x/‖x‖ and 1/‖x‖; both are 0 where no entry reaches ``zero``."""
    i, stage = tl.program_id(0) * ROWS, tl.program_id(1)
    x, unit, dim = pick(rows, stage), pick(units, stage), pick(dims, stage)
    row_stride, stride = pick(row_strides, stage), pick(strides, stage)
    largest = tl.zeros([ROWS], TYPE)
    for k in range(0, dim, WIDTH):
        block = load_block(x, i, k, count, dim, row_stride, stride, TYPE, ROWS, WIDTH)
        largest = tl.maximum(largest, tl.max(tl.abs(block), 1))
    is_zero = largest < number(zero, TYPE)
    # The largest entry is divided out first, so that no square over- or underflows. A zero row is multiplied by 0,
    # which keeps a NaN.
    divisor = tl.where(is_zero, 1.0, largest)
    squares = tl.zeros([ROWS], TYPE)
    for k in range(0, dim, WIDTH):
        block = load_block(x, i, k, count, dim, row_stride, stride, TYPE, ROWS, WIDTH) / divisor[:, None]
        squares += tl.sum(block * block, 1)
    inverse = tl.where(is_zero, squares * 0, 1 / tl.sqrt(squares))
    for k in range(0, dim, WIDTH):
        block = load_block(x, i, k, count, dim, row_stride, stride, TYPE, ROWS, WIDTH) / divisor[:, None]
        store_block(unit, block * inverse[:, None], i, k, count, dim, ROWS, WIDTH)
    row = i + tl.arange(0, ROWS)
    tl.store(pick(inverse_norms, stage) + row, inverse / divisor, mask=row < count)


@triton.jit(do_not_specialize=["count"])
def unit_rows_gradient(
    upstream, row_strides, strides, dims, units, inverse_norms, gradients, count, TYPE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx = (g − e (e·g))/‖x‖."""
    i, stage = tl.program_id(0) * ROWS, tl.program_id(1)
    g, unit, dim = pick(upstream, stage), pick(units, stage), pick(dims, stage)
    row_stride, stride = pick(row_strides, stage), pick(strides, stage)
    gradient = pick(gradients, stage)
    along = tl.zeros([ROWS], TYPE)
    for k in range(0, dim, WIDTH):
        block = load_block(g, i, k, count, dim, row_stride, stride, TYPE, ROWS, WIDTH)
        along += tl.sum(block * load_block(unit, i, k, count, dim, dim, 1, TYPE, ROWS, WIDTH), 1)
    row = i + tl.arange(0, ROWS)
    inverse = tl.load(pick(inverse_norms, stage) + row, mask=row < count, other=0)
    for k in range(0, dim, WIDTH):
        block = load_block(g, i, k, count, dim, row_stride, stride, TYPE, ROWS, WIDTH)
        e = load_block(unit, i, k, count, dim, dim, 1, TYPE, ROWS, WIDTH)
        block = (block - e * along[:, None]) * inverse[:, None]
        store_block(gradient, convert(block, gradient.dtype.element_ty), i, k, count, dim, ROWS, WIDTH)
