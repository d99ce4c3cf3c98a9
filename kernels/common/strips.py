"""Rows too wide for a program's registers: cuBLAS multiplies strips of similarities, the kernels work on those.

Strips that are alive at a time take at most ``STRIP_BYTES`` together, so that memory stays bounded; of that they make
use, because cuBLAS is slow on low ones. The walk over the rows is the op itself, called for some rows with all columns
as its column set.
"""

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common.launch import Product, divide, multiprocessors
from gkd_fast.kernels.common.table import Tiles
from gkd_fast.kernels.common.tile import convert, store_tile


def megabytes(name: str, default: int) -> int:
    """The bytes that an environment variable gives in MiB."""
    given = os.environ.get(name, str(default))
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{name} must be a whole number of MiB, at least 1, got {given!r}")
    return int(given) * 2**20


# What strips that are alive at a time take, together.
STRIP_BYTES = megabytes("GKD_FAST_STRIP_MB", 256)
LEAST, MOST_ROWS = 128, 4096
# Rows of strips begin at multiples of so many entries.
ALIGNMENT = tl.constexpr(16)
# Programs for each multiprocessor: a strip is read once, so that loads of several must be on their way.
PROGRAMS = 4
# The third dimension of a grid is at most this on NVIDIA's devices.
MOST_GRAPHS = 65535
# From this version on addmm takes short types and adds in float32.
ADDS_IN_PLACE = torch.__version__ >= (2, 12)


@triton.jit
def strip_stride(column_count):
    """From row to row of a strip of so many columns."""
    return tl.cdiv(column_count, ALIGNMENT) * ALIGNMENT


@triton.jit
def store_strip(
    strip, weights, i, j, row_count, column_count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """A tile of a strip of ``new_strip``."""
    store_tile(strip, convert(weights, TYPE), i, j, row_count, strip_stride(column_count), BLOCK_ROWS, BLOCK_COLUMNS)


def row_strips(count: int, width: int) -> Iterator[slice]:
    """Rows per strip: as many as keep a float32 gradient of them within ``STRIP_BYTES``."""
    step = strip_rows(width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def strip_rows(width: int) -> int:
    return min(MOST_ROWS, max(LEAST, STRIP_BYTES // (4 * width) // LEAST * LEAST))


def strip_columns(rows: int, entry_bytes: int) -> int:
    """Columns per strip of so many rows, where all strips together have ``entry_bytes`` per entry."""
    return max(LEAST, STRIP_BYTES // (rows * entry_bytes) // LEAST * LEAST)


def entry_bytes(product: Product, similarities: int, weights: int = 0) -> int:
    """Bytes per entry of strips of sums and of weights in the product's type."""
    return (8 if product.name == "float64" else 4) * similarities + product.torch_type.itemsize * weights


def strip_parts(device: torch.device, config: Tiles, rows: int, columns: int, programs: int = 1) -> int:
    """Among how many programs a strip's columns are divided, of which ``programs`` work on each row block."""
    row_blocks = -(-rows // config.rows) * programs
    return divide(row_blocks, columns, config.columns, PROGRAMS * multiprocessors(device))


def column_strips(count: int, step: int) -> Iterator[slice]:
    """Columns per strip, ``step`` of them."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def new_strip(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty strip of weights of the type of ``like``; its rows begin at multiples of ``ALIGNMENT`` entries."""
    return like.new_empty(rows, triton.cdiv(columns, int(ALIGNMENT)) * int(ALIGNMENT))[:, :columns]


def aligned(columns: slice) -> slice:
    """The columns of a strip as ``strip_stride`` has them: operands have rows of zeros beyond the last column."""
    length = -(-(columns.stop - columns.start) // int(ALIGNMENT)) * int(ALIGNMENT)
    return slice(columns.start, columns.start + length)


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


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b, as ``multiply`` has it, with as many of b's columns as ``total`` has."""
    b = b[..., : total.shape[-1]]
    with torch.autocast(a.device.type, enabled=False):
        if a.dim() == 3:
            total += multiply(a, b)
        elif a.dtype == total.dtype:
            total.addmm_(a, b)
        elif a.is_cuda and ADDS_IN_PLACE:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total += multiply(a, b)
