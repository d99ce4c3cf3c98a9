"""unit_rows on GPUs: rows of all stages in one launch, any floating type, any strides, any width."""

import torch
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common.launch import on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.unit_rows.tiles import unit_rows_forward, unit_rows_gradient

BLOCK_ROWS, BLOCK_WIDTH = 8, 128


def unit_rows(rows: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    units = [x.new_empty(x.shape, dtype=dtype) for x in rows]
    norms = [x.new_empty(x.shape[0], dtype=dtype) for x in rows]
    for group in _groups(rows):
        x, e, n = ([values[k] for k in group] for values in (rows, units, norms))
        count = x[0].shape[0]
        grid = (-(-count // BLOCK_ROWS), len(x))
        with on_device(x[0]):
            launch(unit_rows_forward, TYPE=_triton_type(dtype), ROWS=BLOCK_ROWS, WIDTH=BLOCK_WIDTH)(
                grid, tuple(x), *_strides(x), tuple(v.shape[1] for v in x), tuple(e), tuple(n), count,
                torch.finfo(dtype).tiny ** 0.5,
            )  # fmt: skip
    return units, norms


def unit_rows_backward(
    upstream: list[Tensor], unit: list[Tensor], inverse_norms: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    gradients = [e.new_empty(e.shape, dtype=dtype) for e in unit]
    for group in _groups(upstream):
        g, e, n, out = ([values[k] for k in group] for values in (upstream, unit, inverse_norms, gradients))
        count = g[0].shape[0]
        grid = (-(-count // BLOCK_ROWS), len(g))
        with on_device(g[0]):
            launch(unit_rows_gradient, TYPE=_triton_type(e[0].dtype), ROWS=BLOCK_ROWS, WIDTH=BLOCK_WIDTH)(
                grid, tuple(g), *_strides(g), tuple(v.shape[1] for v in g), tuple(e), tuple(n), tuple(out), count
            )
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
