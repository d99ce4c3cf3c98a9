"""relation_kl on GPUs: the launches of ``tiles`` and ``gradient_tiles``, all pairs of stages in one."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    PRODUCTS,
    architecture,
    bits_of,
    cdiv,
    divide,
    matrices,
    multiprocessors,
    on_device,
    padded_width,
    power_of_two,
    product_of,
    rows_of,
    walk_product_of,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.operands import ROW_MULTIPLE, Operand, Prepared, centred, operands, stored_width
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.row_maxima import row_maxima
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.strips import (
    add_products,
    aligned,
    column_strips,
    entry_bytes,
    multiply,
    row_strips,
    strip_columns,
    strip_parts,
)  # fmt: skip
from gkd_fast.kernels.common.table import Tiles, polynomials, sharing, teachers_at_once, tiles
from gkd_fast.kernels.relation_kl import small
from gkd_fast.kernels.relation_kl.gradient_tiles import FACTORS, add_slots, relation_factors, relation_gradients
from gkd_fast.kernels.relation_kl.tiles import num_sums, relation_losses, relation_sums

LOG2E = 1.4426950408889634
# Up to this 2·log2(e)/σ², and for similarities that rounding leaves beyond ±1, a polynomial can give 2^((c − 1)·inner).
LARGEST_POLYNOMIAL_RANGE = 124
# Up to this 1/τ the sums of exp(L − 1/τ) cannot underflow in float32.
LARGEST_SHARED_SHIFT = 80
STATISTICS_BLOCK = 256
# What the pairs give to their stages, before it is added, of as many rows as take this much.
SLOT_BYTES = 64 * 2**20
SLOT_BLOCK = 1024


class Shape:
    """What follows from a call's numbers."""

    def __init__(
        self, dims: tuple[int, ...], num_students: int, row_count: int, column_count: int, temperature: float,
        bandwidth: float, product: str, device: torch.device,
    ):  # fmt: skip
        self.device, arch = device, architecture(device)
        self.dims, self.widest = dims, max(dims)
        self.num_students, self.num_teachers = num_students, len(dims) - num_students
        self.row_count, self.column_count = row_count, column_count
        self.product, self.arch = PRODUCTS[product], arch
        self.inner, self.outer = LOG2E / bandwidth**2, LOG2E / temperature
        bounded = 2 * self.inner <= LARGEST_POLYNOMIAL_RANGE
        self.slope = 1 / (bandwidth**2 * temperature)
        self.own_shift = 1 / temperature > LARGEST_SHARED_SHIFT
        walk_product = walk_product_of(self.product, arch, self.widest)
        self.is_wide = walk_product is None
        self.walk_product = walk_product or self.product
        self.polynomials = polynomials(arch, self.walk_product.name) if bounded else 0
        self.width = 16 if self.is_wide else padded_width(self.widest)

    @property
    def num_pairs(self) -> int:
        return self.num_students * self.num_teachers

    def stored_widths(self) -> list[int]:
        """Columns of the stages' operands: of all alike, as one launch has them, or as cuBLAS takes them."""
        return [stored_width(dim, True) for dim in self.dims] if self.is_wide else [self.width] * len(self.dims)

    def tiles(self, kernel: str) -> Tiles:
        return tiles("strip" if self.is_wide else kernel, self.arch, self.walk_product.name, self.width)

    def parts(self, config: Tiles, rows: int, programs: int, columns: int) -> int:
        """Among how many programs ``columns`` of a row block are divided, of which ``programs`` work on each."""
        if self.is_wide:
            return strip_parts(self.device, config, rows, columns, programs)
        row_blocks = cdiv(rows, config.rows) * programs
        return divide(row_blocks, columns, config.columns, multiprocessors(self.device))

    def constants(self, config: Tiles) -> dict:
        """Compile-time arguments of the two kernels that walk tiles."""
        return {
            "OWN_SHIFT": self.own_shift, "STRIP": self.is_wide, "WIDTH": self.width, "BLOCK_ROWS": config.rows,
            "BLOCK_COLUMNS": config.columns, "POLYNOMIALS": self.polynomials, "num_warps": config.warps,
            "num_stages": config.stages, **self.walk_product.constants(),
        }  # fmt: skip


_shape = planned(Shape)


class Problem(Shape):
    """Rows, columns and constants of one call.

    Attributes:
        shape: the one object of all calls with such numbers, that plans are kept by.
    """

    def __init__(self, students, teachers, temperature, bandwidth, product_precision, student_columns,
                 teacher_columns, offset, prepared=None):  # fmt: skip
        self.prepared: Prepared = prepared or Prepared()
        self.rows = rows_of("stages", [*students, *teachers], prepared)
        x = self.rows[0]
        if (student_columns is None) != (teacher_columns is None):
            raise ValueError("student_columns and teacher_columns go together")
        self.has_columns = student_columns is not None
        self.columns, self.offset = self.rows, 0
        if self.has_columns:
            self.columns = matrices("columns", [*student_columns, *teacher_columns])
            self.offset = offset
            if [y.shape[1] for y in self.columns] != [y.shape[1] for y in self.rows]:
                raise ValueError("rows and columns of a stage must share a width")
        self.shape = _shape(
            tuple([y.size(1) for y in self.rows]), len(students), x.size(0), self.columns[0].size(0), temperature,
            bandwidth, product_of(product_precision, x).name, x.device,
        )  # fmt: skip
        self.__dict__.update(self.shape.__dict__)

    @cached_property
    def operands(self) -> tuple[list[Operand], list[Operand]]:
        """The rows and the columns as products take them, about the columns' means."""
        widths = self.stored_widths()
        if not self.has_columns:
            return (self.prepared.centred(range(len(self.rows)), self.rows, self.walk_product, widths),) * 2
        columns = centred(self.columns, self.walk_product, widths)
        rows = operands(self.rows, self.walk_product, widths, [x.centre for x in columns])
        return rows, columns

    def row_strips(self) -> Iterator[slice]:
        """All rows, or of wide ones a strip after another."""
        return row_strips(self.row_count, self.widest) if self.is_wide else iter([slice(0, self.row_count)])

    def pieces(self, rows: int, similarities: int, weights: int = 0) -> list[slice]:
        """All columns, or of wide ones as many at a time as so many strips of so many rows may have."""
        step = self.column_count
        if self.is_wide:
            step = strip_columns(rows, entry_bytes(self.product, similarities, weights))
        return list(column_strips(self.column_count, step))


def _rows_of(sets: Sequence[Operand]) -> tuple[Tensor, ...]:
    return tuple([x.rows for x in sets])


def _numbers_of(sets: Sequence[Operand]) -> tuple[Tensor, ...]:
    return tuple([x.numbers for x in sets])


def _products(rows: Sequence[Operand], columns: Sequence[Operand], count: int) -> tuple[Tensor, ...]:
    """Strips of the products of wide rows, ``count`` of them."""
    return tuple([multiply(x.rows[:count], y.rows.T) for x, y in zip(rows, columns, strict=True)])


def relation_kl(
    students, teachers, temperature, bandwidth, product_precision, student_columns=None, teacher_columns=None, offset=0,
    *, prepared=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = Problem(students, teachers, temperature, bandwidth, product_precision, student_columns, teacher_columns,
                      offset, prepared)  # fmt: skip
    x, rows = problem.rows[0], problem.row_count
    losses = x.new_empty(rows, problem.num_students, problem.num_teachers)
    counts = problem.num_students, problem.num_teachers
    log_sums = [x.new_empty(count, rows, dtype=torch.float64) for count in counts]
    if is_small(rows, problem.has_columns, problem.widest):
        small.relation_kl(problem, losses, *log_sums)
        return losses, *log_sums
    with on_device(x):
        shifts = _own_shifts(problem) if problem.own_shift else losses
        for strip in problem.row_strips():
            here = shifts[:, strip] if problem.own_shift else shifts
            _forward(problem, strip, here, losses[strip], *(y[:, strip] for y in log_sums))
    return losses, *log_sums


@planned
def _sums(shape: Shape, count: int, column_count: int) -> tuple[tuple[int, int, int], tuple[int, ...], Launch, Launch]:
    """Of the forward pass of so many rows, and so many columns at a time: the first launch's grid, the shape of what it
    leaves where its columns are divided, and both launches.
    """
    teachers = shape.num_teachers
    shared = 1 if shape.is_wide else teachers_at_once(shape.arch, shape.walk_product.name, shape.width, teachers)
    groups = shape.num_students * cdiv(teachers, shared)
    config = sharing(shape.tiles("relation_sums"), shared)
    parts = shape.parts(config, count, groups, column_count)
    common = {"S": shape.num_students, "T": teachers, "TEACHERS": shared}
    losses = launch(
        relation_losses, **common, OWN_SHIFT=shape.own_shift, BLOCK_ROWS=STATISTICS_BLOCK, SUM=shape.product.SUM
    )
    return (
        (cdiv(count, config.rows), parts, groups), (parts, groups, num_sums(shared), count),
        launch(relation_sums, **common, **shape.constants(config)), losses,
    )  # fmt: skip


def _forward(problem: Problem, strip: slice, shifts: Tensor, losses: Tensor, *log_sums: Tensor):
    """The losses and log-sums of a strip of rows, written to their places."""
    count = losses.shape[0]
    rows, columns = problem.operands
    pieces = problem.pieces(count, len(rows))
    grid, partial, sum_relations, finish = _sums(problem.shape, count, pieces[0].stop)
    _, parts, groups = grid
    sums = losses.new_empty(*partial)
    if problem.is_wide:
        rows = [x[strip] for x in rows]
    own = _rows_of(rows), _numbers_of(rows)
    for piece in pieces:
        others = [x[aligned(piece)] for x in columns] if problem.is_wide else columns
        products = _products(rows, others, count) if problem.is_wide else _rows_of(others)
        sum_relations(
            grid, products if problem.is_wide else own[0], own[1], products, _numbers_of(others), sums, shifts, losses,
            *log_sums, count, piece.stop - piece.start, problem.offset + strip.start - piece.start, parts,
            int(piece.start > 0), int(piece.stop == problem.column_count), problem.row_count, problem.inner,
            problem.outer,
        )  # fmt: skip
        del products  # before the next ones are made
    if parts > 1:
        finish(
            (cdiv(count, STATISTICS_BLOCK), groups), sums, shifts, losses, *log_sums, count, parts, problem.row_count,
            problem.outer,
        )  # fmt: skip


def _own_shifts(problem: Problem) -> Tensor:
    """Each row's largest logit in base 2, per stage; the diagonal's logit 0 is the least that there is."""
    maxima = problem.rows[0].new_empty(len(problem.rows), problem.row_count)
    for q, (rows, columns) in enumerate(zip(problem.rows, problem.columns, strict=True)):
        row_maxima(maxima[q], rows, columns, problem.offset, True, problem.product)
    return torch.exp2((maxima - 1) * problem.inner) * problem.outer


def relation_kl_backward(
    upstream, students, teachers, losses, student_log_sums, teacher_log_sums, temperature, bandwidth,
    product_precision, needs, student_columns=None, teacher_columns=None, offset=0, column_upstream=None,
    column_losses=None, column_student_log_sums=None, column_teacher_log_sums=None, *, prepared=None,
) -> list[Tensor]:  # fmt: skip
    problem = Problem(students, teachers, temperature, bandwidth, product_precision, student_columns, teacher_columns,
                      offset, prepared)  # fmt: skip
    if len(needs) != len(problem.rows):
        raise ValueError(f"needs must have {len(problem.rows)} entries, got {len(needs)}")
    own = (upstream, losses, student_log_sums, teacher_log_sums)
    other = own if not problem.has_columns else None
    if problem.has_columns and column_upstream is not None:
        if column_student_log_sums is None or column_teacher_log_sums is None:
            raise ValueError("column_upstream needs the columns' log-sums")
        if any(needs[problem.num_students :]) and column_losses is None:
            raise ValueError("a teacher's gradient needs column_losses")
        other = (column_upstream, column_losses, column_student_log_sums, column_teacher_log_sums)
    own, other = ([x if x is None else x.contiguous() for x in side] if side else None for side in (own, other))
    if is_small(problem.row_count, problem.has_columns, problem.widest):
        return small.relation_kl_backward(problem, *own, needs)
    if not any(needs):
        return []
    with on_device(problem.rows[0]):
        scale = power_of(problem, own[0], other and other[0]) if problem.product.scaled else own[0]
        row_factors = column_factors = _factors(problem, own, problem.row_count, scale)
        if problem.has_columns:
            column_factors = _factors(problem, other, problem.column_count, scale)
        gradients_of = _gradients_in_strips if problem.is_wide else _gradients
        gradients = gradients_of(problem, row_factors, column_factors, needs, scale)
    return [x for x, needed in zip(gradients, needs, strict=True) if needed]


def power_of(problem: Problem, upstream: Tensor, column_upstream: Tensor | None, growth: float = 1.0) -> Tensor:
    """The power of two that brings ``growth`` × the entries of M, a few times the largest upstream, into float16."""
    largest = upstream.abs().amax()
    if column_upstream is not None and column_upstream is not upstream:
        largest = torch.maximum(largest, column_upstream.abs().amax())
    return power_of_two(
        largest * (growth * problem.slope * 4 * problem.num_pairs * max(1.0, math.log(problem.column_count)))
    )


@planned
def _row_factors(shape: Shape, has_losses: bool) -> Launch:
    return launch(
        relation_factors, S=shape.num_students, T=shape.num_teachers, HAS_LOSSES=has_losses, OWN_SHIFT=shape.own_shift,
        SCALED=shape.product.scaled, BLOCK_ROWS=STATISTICS_BLOCK, SUM=shape.product.SUM,
    )  # fmt: skip


def _factors(problem: Problem, side, count: int, scale: Tensor) -> Tensor:
    """The row statistics of one side, [pairs, FACTORS, count]; a side without upstream has none."""
    x, shape = problem.rows[0], (problem.num_pairs, FACTORS.value, count)
    if side is None:
        factors = x.new_zeros(*shape)
        # Any shift will do that keeps the weights finite.
        factors[:, -2:] = problem.outer
        return factors
    upstream, losses, student_log_sums, teacher_log_sums = side
    factors = x.new_empty(*shape)
    _row_factors(problem.shape, losses is not None)(
        (cdiv(count, STATISTICS_BLOCK), problem.num_pairs), upstream, upstream if losses is None else losses,
        student_log_sums, teacher_log_sums, factors, scale, count, count, problem.outer, problem.slope,
    )  # fmt: skip
    return factors


def _sides(problem: Shape, needs: Sequence[bool]) -> int:
    """Which sides of the pairs have gradients: bit 0 students, bit 1 teachers."""
    return any(needs[: problem.num_students]) + 2 * any(needs[problem.num_students :])


class Slots(NamedTuple):
    """Where pairs give their stages' gradients.

    stages: those that need one.  counts: the slots of each of them; None: its gradient's own place.  step: so many rows
    at a time.  parts: among how many programs columns are divided.
    """

    stages: list[int]
    counts: list[int] | None
    step: int
    parts: int
    block_rows: int
    gradients: Launch
    add: Launch


@planned
def _slots(shape: Shape, needs: tuple[bool, ...], item_bytes: int) -> Slots:
    S, T, rows = shape.num_students, shape.num_teachers, shape.row_count
    partners = [T] * S + [S] * T
    stages = [q for q, needed in enumerate(needs) if needed]
    row_bytes = sum(partners[q] * shape.dims[q] for q in stages) * item_bytes
    step = min(rows, max(ROW_MULTIPLE, SLOT_BYTES // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE))
    config = shape.tiles("relation_gradients")
    parts = shape.parts(config, step, shape.num_pairs, shape.column_count)
    counts = [partners[q] * parts for q in stages]
    gradients = launch(
        relation_gradients, S=S, T=T, WANTED=_sides(shape, needs), SCALED=shape.product.scaled,
        **shape.constants(config),
    )  # fmt: skip
    one_each = counts.count(1) == len(counts)
    return Slots(
        stages, None if one_each else counts, rows if one_each else step, parts, config.rows, gradients,
        launch(add_slots, BLOCK=SLOT_BLOCK),
    )  # fmt: skip


def _gradients(problem: Problem, row_factors, column_factors, needs, scale: Tensor) -> list[Tensor]:
    """Every pair gives its stages' gradients to slots of their own, which are then added."""
    rows, dims = problem.row_count, problem.dims
    gradients = [torch.empty_like(x) if needed else x for x, needed in zip(problem.rows, needs, strict=True)]
    wanted = bits_of(needs)
    stages, counts, step, parts, block_rows, sum_gradients, add = _slots(
        problem.shape, tuple(needs), problem.rows[0].element_size()
    )
    own, columns = problem.operands
    operand_arguments = _rows_of(own), _numbers_of(own), _rows_of(columns), _numbers_of(columns)
    centres = tuple([x.centre for x in columns])
    for first in range(0, rows, step):
        count = min(step, rows - first)
        slots = list(gradients)
        if counts is not None:
            for q, of_stage in zip(stages, counts, strict=True):
                slots[q] = gradients[q].new_empty(of_stage, count, dims[q])
        sum_gradients(
            (cdiv(count, block_rows), parts, problem.num_pairs), *operand_arguments, centres, dims, tuple(slots),
            row_factors, row_factors, column_factors, scale, first, count, rows, problem.column_count, problem.offset,
            parts, wanted, problem.inner, problem.outer,
        )  # fmt: skip
        if counts is not None:
            here = [gradients[q] if count == rows else gradients[q][first : first + count] for q in stages]
            sizes = [count * dims[q] for q in stages]
            add(
                (cdiv(max(sizes), SLOT_BLOCK), len(stages)), tuple([slots[q] for q in stages]), tuple(here),
                tuple(sizes), tuple(counts),
            )  # fmt: skip
    return gradients


def _gradients_in_strips(problem: Problem, row_factors, column_factors, needs, scale: Tensor) -> list[Tensor]:
    """Of wide rows: a pair after another, whose strips of M cuBLAS multiplies with the columns."""
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(problem.rows, needs, strict=True)]
    for strip in problem.row_strips():
        for pair in range(problem.num_pairs):
            stages = (pair // problem.num_teachers, problem.num_students + pair % problem.num_teachers)
            if any(needs[q] for q in stages):
                _add_strip(problem, strip, stages, row_factors[pair, :, strip].contiguous(), column_factors[pair],
                           gradients, scale)  # fmt: skip
    return gradients


def _add_strip(problem: Problem, strip: slice, stages, row_factors, column_factors, gradients, scale: Tensor):
    """Adds the gradients of one pair's losses at a strip of rows."""
    count, config = strip.stop - strip.start, problem.tiles("relation_gradients")
    rows, columns = ([x[q] for q in stages] for x in problem.operands)
    rows = [x[strip] for x in rows]
    needed = [k for k, q in enumerate(stages) if gradients[q] is not None]
    wanted = sum(1 << k for k in needed)
    dims = tuple([problem.dims[q] for q in stages])
    out = [gradients[stages[k]][strip] for k in needed]
    pieces = problem.pieces(count, len(stages), len(needed))
    parts = problem.parts(config, count, 1, pieces[0].stop)
    for piece in pieces:
        others = [x[aligned(piece)] for x in columns]
        products, width = _products(rows, others, count), piece.stop - piece.start
        weights = [torch.empty_like(products[0], dtype=problem.product.torch_type) for _ in out]
        sums = row_factors.new_empty(parts, len(needed), count)
        launch(
            relation_gradients, S=1, T=1, WANTED=wanted, SCALED=problem.product.scaled, **problem.constants(config)
        )(
            (cdiv(count, config.rows), parts, 1), products, _numbers_of(rows), products, _numbers_of(others),
            products, dims, tuple(weights), sums, row_factors, column_factors[:, piece].contiguous(), scale, 0, count,
            count, width, problem.offset + strip.start - piece.start, parts, wanted, problem.inner, problem.outer,
        )  # fmt: skip
        of_rows = sums.sum(dim=0)
        for place, (k, x) in enumerate(zip(needed, out, strict=True)):
            total = torch.zeros_like(x) if problem.product.scaled else x
            add_products(total, weights[place], others[k].rows)
            total.addcmul_(of_rows[place][:, None], others[k].centre[: dims[k]])
            if problem.product.scaled:
                x += total / scale
        del products, weights  # before the next ones are made
