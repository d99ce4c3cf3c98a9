"""unit_rows on GPUs: rows of all stages in one launch, any floating type, any strides, any width."""

import torch
import triton
import triton.language as tl
from gkd_fast.kernels.launch import on_device
from gkd_fast.kernels.tile import convert, number, pick
from torch import Tensor

BLOCK_ROWS, BLOCK_WIDTH = 8, 128


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


def unit_rows(rows: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    units = [x.new_empty(x.shape, dtype=dtype) for x in rows]
    norms = [x.new_empty(x.shape[0], dtype=dtype) for x in rows]
    for group in _groups(rows):
        x, e, n = ([values[k] for k in group] for values in (rows, units, norms))
        grid = (triton.cdiv(len(x[0]), BLOCK_ROWS), len(x))
        with on_device(x[0]):
            unit_rows_forward[grid](
                tuple(x), *_strides(x), tuple(v.shape[1] for v in x), tuple(e), tuple(n), len(x[0]),
                torch.finfo(dtype).tiny ** 0.5, _triton_type(dtype), BLOCK_ROWS, BLOCK_WIDTH,
            )  # fmt: skip
    return units, norms


def unit_rows_backward(
    upstream: list[Tensor], unit: list[Tensor], inverse_norms: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    gradients = [e.new_empty(e.shape, dtype=dtype) for e in unit]
    for group in _groups(upstream):
        g, e, n, out = ([values[k] for k in group] for values in (upstream, unit, inverse_norms, gradients))
        grid = (triton.cdiv(len(g[0]), BLOCK_ROWS), len(g))
        with on_device(g[0]):
            unit_rows_gradient[grid](
                tuple(g), *_strides(g), tuple(v.shape[1] for v in g), tuple(e), tuple(n), tuple(out), len(g[0]),
                _triton_type(e[0].dtype), BLOCK_ROWS, BLOCK_WIDTH,
            )  # fmt: skip
    return gradients


def _groups(tensors: list[Tensor]) -> list[list[int]]:
    """Places of the tensors that one launch can take: those of one type and one number of rows."""
    groups: dict[tuple, list[int]] = {}
    for k, x in enumerate(tensors):
        if len(x):
            groups.setdefault((x.dtype, len(x)), []).append(k)
    return list(groups.values())


def _strides(tensors: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(x.stride(0) for x in tensors), tuple(x.stride(1) for x in tensors)


def _triton_type(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32
