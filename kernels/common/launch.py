"""What the launchers share: product types, tile sizes, the division of the columns, the device."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.tile import is_split

# Columns are copied in the product's type this much at a time, in multiples of so many.
COLUMN_BYTES = 8 * 2**20
COLUMN_MULTIPLE = 256
# Tiles in float16 are scaled by a power of two to at most this.
LARGEST_FLOAT16 = 2.0**14
# Rows that are sums of two float16 numbers are at most so long, in units of ``tile.SPLIT_UNIT``.
LONGEST_SPLIT = 2.0


@dataclass(frozen=True, eq=False)
class Product:
    """How tiles are multiplied: their type, Triton's name of it and of the sums, and the precision of float32."""

    name: str
    torch_type: torch.dtype
    TYPE: tl.dtype
    SUM: tl.dtype
    PRECISION: str

    @cached_property
    def sum_type(self) -> torch.dtype:
        """``SUM`` in PyTorch's words."""
        return torch.float64 if self.name == "float64" else torch.float32

    @cached_property
    def split(self) -> bool:
        """Whether operands are sums of two numbers of the type."""
        return is_split(self.PRECISION)

    @cached_property
    def scaled(self) -> bool:
        """Whether gradient tiles are scaled, because entries that shrink like 1/B² would leave the type's range."""
        return self.name == "float16"

    @cached_property
    def longest(self) -> float | None:
        """To about this length rows of any length are brought, where the type's range is short."""
        if self.split:
            return LONGEST_SPLIT
        return LARGEST_FLOAT16 if self.name == "float16" else None

    @cached_property
    def limited(self) -> bool:
        """Whether rows of any length are scaled."""
        return self.longest is not None

    def constants(self) -> dict:
        return {"TYPE": self.TYPE, "SUM": self.SUM, "PRECISION": self.PRECISION}


PRODUCTS = {
    "float64": Product("float64", torch.float64, tl.float64, tl.float64, "ieee"),
    "float32": Product("float32", torch.float32, tl.float32, tl.float32, "ieee"),
    "tf32x3": Product("tf32x3", torch.float32, tl.float32, tl.float32, "tf32x3"),
    "tf32": Product("tf32", torch.float32, tl.float32, tl.float32, "tf32"),
    "bfloat16": Product("bfloat16", torch.bfloat16, tl.bfloat16, tl.float32, "ieee"),
    "float16": Product("float16", torch.float16, tl.float16, tl.float32, "ieee"),
    # Three products of numbers as sums of two float16 ones; sums and results are float32.
    "float16x3": Product("float16x3", torch.float16, tl.float16, tl.float32, "float16x3"),
}


# What CPU tensors stand in for, interpreted or ``offline``.
stand_in = "sm_90"


def architecture(device: torch.device) -> str:
    """The entry of the table that serves this device."""
    return stand_in if device.type == "cpu" else _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0 or later, {torch.cuda.get_device_name(device)} has "
            f'{major}.{minor}: use backend="reference"'
        )
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "sm_86")


def multiprocessors(device: torch.device) -> int:
    return table.MULTIPROCESSORS[stand_in] if device.type == "cpu" else _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def product_of(precision: str, x: Tensor) -> Product:
    """The product type of an op call; float64 rows are multiplied in float64, whatever the precision.

    "float32" is three tf32 products, whose errors are near float32's, unless the device has none: without matrix units
    float32 would be slower than plain PyTorch. Kernels that walk tiles have a type of their own (``walk_product_of``).
    """
    if precision not in PRODUCTS:
        raise ValueError(f"product_precision must be one of {tuple(PRODUCTS)}, got {precision!r}")
    if x.dtype == torch.float64:
        return PRODUCTS["float64"]
    if precision in ("float32", "float64"):
        return PRODUCTS["float32" if torch.version.hip else "tf32x3"]
    return PRODUCTS[precision]


def walk_product_of(product: Product, arch: str, width: int) -> Product | None:
    """The product type of the kernels that walk tiles of rows of ``width``; None: these are too wide for a program.

    Numbers of 32 bits are multiplied as sums of two float16 ones, which errs as float32 products do, whatever PyTorch's
    setting is.
    """
    walked = PRODUCTS["float16x3"] if product.torch_type == torch.float32 else product
    return walked if padded_width(width) <= table.largest_width(arch, walked.name) else None


_NO_CHANGE = nullcontext()


def on_device(x: Tensor):
    """Triton launches on the current device and its current stream: make it the tensor's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device(x.device)


EXACT = torch.float32, torch.float64
FLOATING = *EXACT, torch.bfloat16, torch.float16


def matrices(
    name: str, tensors: Sequence[Tensor], rows: int | None = None, types: tuple[torch.dtype, ...] = EXACT
) -> list[Tensor]:
    """The matrices, contiguous, checked for one type of these, one device and one number of rows."""
    first = tensors[0]
    dtype, device = first.dtype, first.device
    rows = first.shape[0] if rows is None else rows
    for k, x in enumerate(tensors):
        if x.dim() != 2 or x.size(0) != rows:
            raise ValueError(f"{name}[{k}] must have shape [{rows}, width], got {tuple(x.shape)}")
        if x.dtype is not dtype or x.device != device or dtype not in types:
            allowed = " or ".join(str(t).removeprefix("torch.") for t in types)
            raise ValueError(f"{name}[{k}] must be {allowed} like the others, got {x.dtype} on {x.device}")
    return [x.contiguous() for x in tensors]


def rows_of(name: str, stages: Sequence[Tensor], prepared: object, rows: int | None = None) -> Sequence[Tensor]:
    """``matrices`` of unit rows, which need no check where operands are ``prepared`` for them: then the call has made
    them itself.
    """
    return matrices(name, stages, rows) if prepared is None else stages


def bits_of(flags: Sequence[bool]) -> int:
    """Bit k says whether flag k is set."""
    return sum([1 << k for k, flag in enumerate(flags) if flag])


def lengthened(places: int, *lists: Sequence) -> list[tuple]:
    """The lists with at least so many entries, of which no program reads the last: a kernel is compiled for each number
    of stages, and launches of fewer can share that of most.
    """
    more = places - len(lists[0])
    return [(*values, *([values[0]] * more)) for values in lists] if more > 0 else [tuple(values) for values in lists]


def cdiv(count: int, size: int) -> int:
    """⌈count/size⌉; Triton's own, a function of its language too, takes the host many times as long."""
    return -(-count // size)


def padded_width(*widths: int) -> int:
    """The power of two that holds the widths, at least 16, the least that a matrix product takes."""
    return 1 << max(4, (max(widths) - 1).bit_length())


def divide(row_blocks: int, columns: int, block_columns: int, processors: int, least_saved: int = 1) -> int:
    """Among how many programs the columns of a row block are divided, so that the multiprocessors are all at work.

    least_saved: among one, where others would not save each program so many tiles.
    """
    tiles = cdiv(columns, block_columns)
    parts = max(1, min(tiles, processors // row_blocks))
    return parts if tiles - cdiv(tiles, parts) >= least_saved else 1


@dataclass(frozen=True)
class Piece:
    """Some of a set's rows: the first, the number of them, their matrices, and whether they are the last.

    An ``aligned`` piece needs no masked loads: its matrices have the widths and the whole blocks that were asked for.
    """

    start: int
    count: int
    matrices: tuple[Tensor, ...]
    is_last: bool
    aligned: bool = False


def column_pieces(
    columns: Sequence[Tensor],
    dtype: torch.dtype,
    factors: Sequence[Tensor | None] | None = None,
    most: int | None = None,
    widths: Sequence[int] | None = None,
    block: int = 1,
) -> Iterator[Piece]:
    """The columns in the product's type, rows multiplied by their factors, ``COLUMN_BYTES`` or ``most`` at a time.

    Where nothing is to be changed, the matrices themselves. With ``widths`` (none less than a matrix's own) copies are
    that wide and whole blocks long, zero beyond the matrix. A piece is overwritten by the next one.
    """
    count = len(columns[0])
    factors = factors or [None] * len(columns)
    unchanged = all(x.dtype == dtype for x in columns) and all(f is None for f in factors)
    if most is None and unchanged:
        exact = widths is not None and all(x.shape[1] == w for x, w in zip(columns, widths, strict=True))
        yield Piece(0, count, tuple(columns), True, exact and count % block == 0)
        return
    stored = widths or [x.shape[1] for x in columns]
    step = min(count, most or _rows_of_a_copy(sum(stored) * dtype.itemsize))
    copies = _copies(columns, dtype, stored, cdiv(step, block) * block)
    yield from _copied(columns, copies, step, factors, widths is not None)


def _rows_of_a_copy(row_bytes: int) -> int:
    return max(COLUMN_MULTIPLE, COLUMN_BYTES // row_bytes // COLUMN_MULTIPLE * COLUMN_MULTIPLE)


def _copies(matrices: Sequence[Tensor], dtype: torch.dtype, widths: Sequence[int], length: int) -> list[Tensor]:
    copies = [x.new_empty(length, width, dtype=dtype) for x, width in zip(matrices, widths, strict=True)]
    for x, copy in zip(matrices, copies, strict=True):
        copy[:, x.shape[1] :] = 0
    return copies


def _copied(matrices, copies, step: int, factors, aligned: bool) -> Iterator[Piece]:
    """Pieces of ``step`` rows, one after another in the same ``copies``."""
    count = len(matrices[0])
    for start in range(0, count, step):
        stop = min(start + step, count)
        for x, factor, copy in zip(matrices, factors, copies, strict=True):
            here = copy[: stop - start, : x.shape[1]]
            if factor is None:
                here.copy_(x[start:stop])
            else:
                torch.mul(x[start:stop], factor[start:stop, None], out=here)
            copy[stop - start :] = 0
        pieces = copies if aligned else [copy[: stop - start] for copy in copies]
        yield Piece(start, stop - start, tuple(pieces), stop == count, aligned)


def power_of_two(bound: Tensor, largest: float = LARGEST_FLOAT16) -> Tensor:
    """The power of two that brings ``bound`` just under ``largest``, by default the largest float16 tile entry; without
    dimensions.
    """
    return torch.exp2(torch.floor(torch.log2(largest / bound.clamp(2.0**-60, 2.0**60))))
