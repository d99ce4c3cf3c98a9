"""Rows as matrix products take them: about a centre, in the product's type, with a number per row.

Rounding a row to a short type errs by a part of its length, and exponents (c − 1)/σ² magnify that where cosines are
near 1. But x − m, with m the mean row, is as short as the rows differ. With x̂ = x − m, rounded, distances are

    1 − c_ij = h_i + h_j − x̂_i·x̂_j,   h = ‖x̂‖²/2,

of unit rows; a zero row, whose cosines are 0, has h = (1 + ‖m‖²)/2. Products of rows about two centres m and n are

    x_i·y_j = x̂_i·ŷ_j + p_i + q_j,   p = (x − m/2)·n,   q = (y − n/2)·m,

and what weights gather is Σ_j w_ij x_j = Σ_j w_ij x̂_j + m Σ_j w_ij. Any m will do, so every call takes its columns'
mean. Two launches make the operands of all stages of a call: partial sums of the rows, added in a fixed order, and the
rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import memory
from gkd_fast.kernels.common.launch import PRODUCTS, Product, cdiv, lengthened, on_device, padded_width
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.tile import COUNTS, SPLIT_UNIT, as_block, convert, load_tile, number, pick, power_of_two

# Operands are whole tiles of any size.
ROW_MULTIPLE = 128
WIDTH_MULTIPLE = 16
MOST_PARTS = 32
BLOCK_ROWS, BLOCK_WIDTH = 32, 64
# Operands that a forward pass leaves to its backward pass take at most this.
KEPT_BYTES = 16 * 2**20
POWER_STRIDE = tl.constexpr(4)

# Bits of a stage's kind: its numbers are products with another centre; its rows have factors; they have a power; those
# products are of the rows as they are rounded.
# All are multiples of 16, which Triton tells from other integers: every mixture of kinds is one kernel.
ALONG, FACTOR, POWER, ROUNDED = tl.constexpr(16), tl.constexpr(32), tl.constexpr(64), tl.constexpr(128)


@dataclass(eq=False)  # frozen ones take the host three times as long
class Operand:
    """Rows in the product's type [whole tiles, width], zero beyond the matrix; their numbers and their centre, in the
    type of the sums. Of a split product they are [whole tiles, 2·width]: x̂ is the sum of both halves
    over ``SPLIT_UNIT``.
    """

    rows: Tensor
    numbers: Tensor
    centre: Tensor

    def __getitem__(self, rows: slice) -> "Operand":
        return Operand(self.rows[rows], self.numbers[rows], self.centre)


@triton.jit
def load_piece(matrix, factors, kind, i, k, count, dim, SUM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows i … of a contiguous [count, dim] matrix at columns k …, times the factors that some have; zero beyond."""
    row, column = i + tl.arange(0, ROWS), k + tl.arange(0, WIDTH)
    mask = (row[:, None] < count) & (column[None, :] < dim)
    x = tl.load(matrix + row.to(tl.int64)[:, None] * dim + column[None, :], mask=mask, other=0).to(SUM)
    return x * tl.load(factors + row, mask=(row < count) & ((kind & FACTOR) != 0), other=1)[:, None]


@triton.jit(do_not_specialize=COUNTS)
def row_sums(
    rows, factors, dims, widths, kinds, partial, count, parts, SUM: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """partial[part, :] = (1/count) Σ_i x_i of the part's rows of every stage; rows that are not finite count as 0, so
    that they spoil no others.
    """
    part, stage = tl.program_id(0), tl.program_id(1)
    x, f, dim, width = pick(rows, stage), pick(factors, stage), pick(dims, stage), pick(widths, stage)
    kind, out = number(pick(kinds, stage), tl.int32), pick(partial, stage) + part * width
    per_part = tl.cdiv(tl.cdiv(count, ROWS), parts) * ROWS
    first = part * per_part
    column = tl.arange(0, WIDTH)
    share = 1 / number(count, SUM)
    for k in range(0, width, WIDTH):
        total = tl.zeros([WIDTH], SUM)
        for i in range(first, tl.minimum(first + per_part, count), ROWS):
            piece = load_piece(x, f, kind, i, k, count, dim, SUM, ROWS, WIDTH)
            total += tl.sum(tl.where(piece - piece == 0, piece, 0.0), 0)
        tl.store(out + k + column, total * share, mask=k + column < width)


@triton.jit(do_not_specialize=COUNTS)
def row_lengths(
    rows, dims, lengths, count, parts, SUM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """lengths[stage, part]: of the longest of the part's rows of every stage."""
    part, stage = tl.program_id(0), tl.program_id(1)
    x, dim = pick(rows, stage), pick(dims, stage)
    per_part = tl.cdiv(tl.cdiv(count, ROWS), parts) * ROWS
    first = part * per_part
    longest = tl.zeros([ROWS], SUM)
    for i in range(first, tl.minimum(first + per_part, count), ROWS):
        squares = tl.zeros([ROWS], SUM)
        for k in range(0, dim, WIDTH):
            piece = load_tile(x, i, k, count, dim, ROWS, WIDTH).to(SUM)
            squares += tl.sum(piece * piece, 1)
        longest = tl.maximum(longest, squares)
    tl.store(lengths + stage * parts + part, tl.sqrt(tl.max(longest, 0)))


@triton.jit(do_not_specialize=COUNTS)
def length_powers(lengths, powers, parts, LONGEST: tl.constexpr, PARTS: tl.constexpr):
    """powers[stage, 0]: that of two which brings the longest of a stage's parts, [stages, parts], to LONGEST."""
    stage, part = tl.program_id(0), tl.arange(0, PARTS)
    longest = tl.max(tl.load(lengths + stage * parts + part, mask=part < parts, other=0), 0)
    tl.store(powers + stage * POWER_STRIDE, power_of_two(longest, LONGEST))


@triton.jit
def load_centre(partial, k, width, parts, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns k … of a centre, the sum of its parts."""
    part, column = tl.arange(0, PARTS), k + tl.arange(0, WIDTH)
    mask = (part[:, None] < parts) & (column[None, :] < width)
    return tl.sum(tl.load(partial + part[:, None] * width + column[None, :], mask=mask, other=0), 0)


@triton.jit(do_not_specialize=COUNTS)
def round_rows(
    rows, factors, powers, dims, widths, kinds, centres, others, out, numbers, own_centres, count, parts,
    SCALED: tl.constexpr, CENTRED: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """x̂, the rows' numbers of the kind that ``kinds`` says, and the centre of every stage.

    centres, others: parts of the own centre, that CENTRED rows are about, and of the one that numbers ALONG are taken
    with. powers: what float16 rows are multiplied by.
    """
    i, stage = tl.program_id(0) * ROWS, tl.program_id(1)
    x, f, dim, width = pick(rows, stage), pick(factors, stage), pick(dims, stage), pick(widths, stage)
    own, other, rounded, centre = (
        pick(centres, stage), pick(others, stage), pick(out, stage), pick(own_centres, stage)
    )  # fmt: skip
    kind = number(pick(kinds, stage), tl.int32)
    of_rounded = ((kind & ROUNDED) != 0).to(SUM)  # 0 or 1
    row, column = i + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    squares = tl.zeros([ROWS], SUM)
    distances = tl.zeros([ROWS], SUM)
    along = tl.zeros([ROWS], SUM)
    length = number(0.0, SUM)
    for k in range(0, width, WIDTH):
        piece = load_piece(x, f, kind, i, k, count, dim, SUM, ROWS, WIDTH)
        squares += tl.sum(piece * piece, 1)
        n = load_centre(other, k, width, parts, PARTS, WIDTH)
        along += tl.sum(piece * n[None, :], 1) * (1 - of_rounded)
        centred = piece
        if CENTRED:
            m = load_centre(own, k, width, parts, PARTS, WIDTH)
            if i == 0:
                tl.store(centre + k + column, m, mask=k + column < width)
            length += tl.sum(m * m, 0)
            along += tl.sum(m * n, 0) * (of_rounded - 0.5)
            centred = tl.where((row < count)[:, None], piece - m[None, :], 0.0)
        power = number(1.0, SUM)
        if SCALED:
            power = tl.load(pick(powers, stage), mask=(kind & POWER) != 0, other=1)
            centred = centred * power
        stride = width * (2 if SPLIT else 1)
        place = rounded + row.to(tl.int64)[:, None] * stride + (k + column)[None, :]
        mask = (k + column < width)[None, :]
        if SPLIT:
            halves = as_block(centred * SPLIT_UNIT, TYPE, "float16x3")
            tl.store(place, halves[0], mask=mask)
            tl.store(place + width, halves[1], mask=mask)
            kept = (halves[0].to(SUM) + halves[1].to(SUM)) * (1 / SPLIT_UNIT)
        else:
            rounded_rows = convert(centred, TYPE)
            tl.store(place, rounded_rows, mask=mask)
            kept = rounded_rows.to(SUM)
        distances += tl.sum(kept * kept, 1)
        if CENTRED:
            along += tl.sum(kept * n[None, :], 1) * (of_rounded / power)
    halves = 0.5 * tl.where(squares == 0, 1 + length, distances)
    tl.store(pick(numbers, stage) + row, tl.where(row < count, tl.where((kind & ALONG) == 0, halves, along), 0.0))


def block_width(product: Product) -> int:
    """Columns of an operand that a program rounds at a time, 128 bytes.

    More would spill: of 32-bit numbers on sm_100, of 64-bit ones on sm_80.
    """
    return 128 // product.torch_type.itemsize


def stored_width(dim: int, is_wide: bool = False) -> int:
    """Columns of an operand; ``is_wide``: of rows that cuBLAS multiplies, not a program."""
    return cdiv(dim, WIDTH_MULTIPLE) * WIDTH_MULTIPLE if is_wide else padded_width(dim)


@planned
def _row_sums(name: str) -> Launch:
    product = PRODUCTS[name]
    return launch(row_sums, SUM=product.SUM, ROWS=BLOCK_ROWS, WIDTH=block_width(product))


@planned
def _row_lengths(name: str) -> Launch:
    return launch(row_lengths, SUM=PRODUCTS[name].SUM, ROWS=BLOCK_ROWS, WIDTH=BLOCK_WIDTH)


@planned
def _length_powers(name: str) -> Launch:
    return launch(length_powers, LONGEST=PRODUCTS[name].longest, PARTS=MOST_PARTS)


@planned
def _round_rows(name: str, is_centred: bool) -> Launch:
    product = PRODUCTS[name]
    return launch(
        round_rows, SCALED=product.limited, CENTRED=is_centred, SPLIT=product.split, PARTS=MOST_PARTS,
        TYPE=product.TYPE, SUM=product.SUM, ROWS=BLOCK_ROWS, WIDTH=block_width(product),
    )  # fmt: skip


def means(
    stages: Sequence[Tensor], product: Product, widths: Sequence[int], factors: Sequence[Tensor | None] | None = None,
    places: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Each stage's mean row, as partial sums [parts, width]; places: see ``operands``."""
    first = stages[0]
    count, factors = first.shape[0], factors or [None] * len(stages)
    parts = min(MOST_PARTS, cdiv(count, BLOCK_ROWS))
    partial = memory.of_widths(first, widths, parts, dtype=product.sum_type)
    with on_device(first):
        _row_sums(product.name)(
            (parts, len(stages)), *lengthened(
                places, stages, _or_else(factors, partial), [x.shape[1] for x in stages], widths,
                [0 if f is None else FACTOR.value for f in factors], partial,
            ), count, parts,
        )  # fmt: skip
    return partial


def longest_rows(stages: Sequence[Tensor], product: Product, places: int = 0) -> Tensor:
    """The length of each stage's longest row, of parts of its rows, [stages, parts]; places: see ``operands``."""
    first, count = stages[0], stages[0].shape[0]
    parts = min(MOST_PARTS, cdiv(count, BLOCK_ROWS))
    lengths = first.new_empty(len(stages), parts, dtype=product.sum_type)
    with on_device(first):
        _row_lengths(product.name)(
            (parts, len(stages)), *lengthened(places, stages, [x.shape[1] for x in stages]), lengths, count, parts
        )
    return lengths


def powers_of(lengths: Tensor, product: Product) -> list[Tensor]:
    """Powers of two, 0-dim, that bring each stage's longest row (``longest_rows``) to what the product's type takes."""
    stages, parts = lengths.shape
    # Each begins at a multiple of 16 bytes: for other addresses Triton has other kernels.
    powers = lengths.new_empty(stages, POWER_STRIDE.value)
    with on_device(lengths):
        _length_powers(product.name)((stages,), lengths, powers, parts)
    return list(powers[:, 0].unbind())


def operands(
    stages: Sequence[Tensor], product: Product, widths: Sequence[int], centres: Sequence[Tensor] | None, *,
    others: Sequence[Tensor | None] | None = None, factors: Sequence[Tensor | None] | None = None,
    powers: Sequence[Tensor | None] | None = None, places: int = 0, rounded: bool = False,
) -> list[Operand]:  # fmt: skip
    """The stages, contiguous and of one number of rows, times their factors, about their centres.

    centres: as ``means`` gives them, or of other operands; None: the rows are rounded as they are.
    others: the centres that rows' numbers are taken along; None where they are distances.
    powers: what rows, but not numbers, are multiplied by in a type of short range.
    rounded: numbers taken along others are of the rounded rows, so that x̂_i·ŷ_j + p_i + q_j is the product of these;
    else of exact ones.
    places: the most stages that launches of this kind have in a step: a kernel is compiled for so many, and not for
    fewer too.
    """
    first, none = stages[0], [None] * len(stages)
    count = first.shape[0]
    others, factors, powers = others or none, factors or none, powers or none
    length = cdiv(count, ROW_MULTIPLE) * ROW_MULTIPLE
    stored = [2 * width for width in widths] if product.split else widths
    rows = memory.of_widths(first, stored, length, dtype=product.torch_type)
    numbers = memory.several(first, len(stages), length, dtype=product.sum_type)
    own_centres = memory.of_widths(first, widths, dtype=product.sum_type)
    own = others if centres is None else centres
    kinds = [
        ALONG.value * (n is not None)
        + FACTOR.value * (f is not None)
        + POWER.value * (p is not None)
        + ROUNDED.value * rounded
        for n, f, p in zip(others, factors, powers, strict=True)
    ]
    with on_device(first):
        _round_rows(product.name, centres is not None)(
            (length // BLOCK_ROWS, len(stages)), *lengthened(
                places, stages, _or_else(factors, numbers), _or_else(powers, numbers), [x.shape[1] for x in stages],
                widths, kinds, own, _or_else(others, own), rows, numbers, own_centres,
            ), count, _parts(own[0]),
        )  # fmt: skip
    return list(map(Operand, rows, numbers, own_centres))


def centred(stages: Sequence[Tensor], product: Product, widths: Sequence[int], places: int = 0) -> list[Operand]:
    """Unit rows about their mean; places: see ``operands``."""
    return operands(stages, product, widths, means(stages, product, widths, places=places), places=places)


class Prepared:
    """Operands of a call's unit rows about their means, made once for all that multiplies them, forward and backward.

    Args:
        kept: what :meth:`kept` gave in the forward pass.
    """

    def __init__(self, kept: tuple[Sequence[tuple], Sequence[Tensor]] = ((), ())):
        keys, parts = kept
        self._made = {key: Operand(*parts[3 * k : 3 * k + 3]) for k, key in enumerate(keys)}
        self._means: dict[tuple[int, int], Tensor] = {}

    def leave_means(self, partial: Sequence[Tensor]) -> None:
        """Means of all of the call's stages, as ``means`` gives them, that another launch has found."""
        self._means = {(place, x.shape[1]): x for place, x in enumerate(partial)}

    def centred(
        self, places: Sequence[int], stages: Sequence[Tensor], product: Product, widths: Sequence[int], most: int = 0
    ) -> list[Operand]:
        """``centred`` of the stages, which are at these places of the call's; most: see ``operands``, its places."""
        name, made = product.name, self._made
        keys = [(place, name, width) for place, width in zip(places, widths, strict=True)]
        found = [made.get(key) for key in keys]
        if None in found:
            left = [self._means.get(key) for key in zip(places, widths, strict=True)]
            centres = means(stages, product, widths, places=most) if any(x is None for x in left) else left
            found = operands(stages, product, widths, centres, places=most)
            made.update(zip(keys, found, strict=True))
        return found

    def kept(self) -> tuple[list[tuple], list[Tensor]]:
        """Their names and tensors; none where these take more than ``KEPT_BYTES``: then two launches matter little."""
        if not self._made:
            return [], []
        tensors = [part for x in self._made.values() for part in (x.rows, x.numbers, x.centre)]
        if sum([x.nbytes for x in tensors]) > KEPT_BYTES:
            return [], []
        return list(self._made), tensors


def _parts(centre: Tensor) -> int:
    return centre.shape[0] if centre.dim() == 2 else 1


def _or_else(given: Sequence[Tensor | None], stages: Sequence[Tensor]) -> list[Tensor]:
    """Something in the place of what is not read."""
    return [x if y is None else y for x, y in zip(stages, given, strict=True)]
