"""Rows too wide for a program's registers: cuBLAS multiplies strips of similarities, the kernels work on those.

A strip holds ``rows`` × ``columns`` entries per stage, so that memory stays bounded. The walk over the rows is the op
itself, called for a few rows with all columns as its column set.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

STRIP_BYTES = 8 * 2**20
LEAST, MOST_ROWS = 128, 2048


def row_strips(count: int, width: int) -> Iterator[slice]:
    """Rows per strip: as many as keep a float32 gradient of them within ``STRIP_BYTES``."""
    step = strip_rows(width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def strip_rows(width: int) -> int:
    return min(MOST_ROWS, max(LEAST, STRIP_BYTES // (4 * width) // LEAST * LEAST))


def strip_columns(rows: int, strips: int) -> int:
    """Columns per strip, for ``strips`` of them in float32."""
    return max(LEAST, STRIP_BYTES // (4 * rows * strips) // LEAST * LEAST)


def column_strips(count: int, step: int) -> Iterator[slice]:
    """Columns per strip, ``step`` of them."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a·b, or of many matrices each one's, with sums and result in float32 (float64); float32 products follow
    PyTorch's own setting, not autocast."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype not in (torch.float16, torch.bfloat16):
            return a @ b
        if a.is_cuda:
            return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()
