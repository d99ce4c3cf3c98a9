"""Rows too wide for a program's registers: cuBLAS multiplies strips of similarities, the kernels work on those.

A strip holds ``rows`` × ``columns`` entries per stage, so that memory stays bounded. The walk over the rows is the op
itself, called for a few rows with all columns as its column set.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

STRIP_BYTES = 8 * 2**20
LEAST, MOST_ROWS = 128, 2048
# The third dimension of a grid is at most this on NVIDIA's devices.
MOST_GRAPHS = 65535


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


def graph_strips(row_bytes: int, length: int, most_bytes: int) -> tuple[int, int]:
    """How many graphs of ``length`` rows go at a time and how many rows of each, so that strips of as many rows of
    ``row_bytes`` stay within ``most_bytes``: whole graphs, or some rows of one."""
    most = max(1, most_bytes // max(row_bytes, 1))
    if most >= length:
        return min(MOST_GRAPHS, most // max(length, 1)), max(length, 1)
    return 1, max(LEAST, most // LEAST * LEAST)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a·b, or of many matrices each one's, with sums and result in float32 (float64); float32 products follow
    PyTorch's own setting, not autocast."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype not in (torch.float16, torch.bfloat16):
            return a @ b
        if a.is_cuda:
            return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()
