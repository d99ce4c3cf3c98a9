"""unit_rows on GPUs: rows of all stages in one launch, any floating type, any strides, any width."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, on_device
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.unit_rows.tiles import unit_rows_forward, unit_rows_gradient

BLOCK_ROWS, BLOCK_WIDTH = 8, 128


def unit_rows(rows: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    units = [x.new_empty(*x.shape, dtype=dtype) for x in rows]
    norms = [x.new_empty(x.shape[0]) for x in units]
    kernel, zero = _forward(dtype)
    for x, e, n in _groups(rows, units, norms):
        _launch(kernel, x, e, n, x[0].shape[0], zero)
    return units, norms


def unit_rows_backward(
    upstream: list[Tensor], unit: list[Tensor], inverse_norms: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    gradients = [torch.empty_like(e, dtype=dtype) for e in unit]
    for g, e, n, out in _groups(upstream, unit, inverse_norms, gradients):
        _launch(_gradient(e[0].dtype), g, e, n, out, g[0].shape[0])
    return gradients


@planned
def _forward(dtype: torch.dtype) -> tuple[Launch, float]:
    """The launch, and below which largest entry a row is zero."""
    return launch(unit_rows_forward, **_constants(dtype)), torch.finfo(dtype).tiny ** 0.5


@planned
def _gradient(dtype: torch.dtype) -> Launch:
    return launch(unit_rows_gradient, **_constants(dtype))


def _constants(dtype: torch.dtype) -> dict:
    sum_type = tl.float64 if dtype == torch.float64 else tl.float32
    return {"TYPE": sum_type, "ROWS": BLOCK_ROWS, "WIDTH": BLOCK_WIDTH}


def _launch(kernel: Launch, rows: Sequence[Tensor], *arguments) -> None:
    """``arguments``: lists of tensors, of one for each of the rows, and numbers."""
    row_strides, strides = zip(*[x.stride() for x in rows])
    with on_device(rows[0]):
        kernel(
            (cdiv(rows[0].size(0), BLOCK_ROWS), len(rows)), tuple(rows), row_strides, strides,
            tuple([x.size(1) for x in rows]), *[tuple(x) if isinstance(x, list) else x for x in arguments],
        )  # fmt: skip


def _groups(tensors: list[Tensor], *others: list[Tensor]) -> list[tuple[list[Tensor], ...]]:
    """The lists, by what one launch can take: tensors of one type and one number of rows."""
    lists, first = (tensors, *others), tensors[0]
    dtype, count = first.dtype, first.size(0)
    if all(x.dtype is dtype and x.size(0) == count for x in tensors):
        return [lists] if count else []
    groups: dict[tuple, list[int]] = {}
    for k, x in enumerate(tensors):
        if x.shape[0]:
            groups.setdefault((x.dtype, x.shape[0]), []).append(k)
    return [tuple([values[k] for k in group] for values in lists) for group in groups.values()]
