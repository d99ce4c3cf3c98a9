"""relation_kl on GPUs: the launches of ``tiles`` and ``gradient_tiles``, all pairs of stages in one."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    PRODUCTS,
    architecture,
    divide,
    matrices,
    multiprocessors,
    on_device,
    padded_width,
    power_of_two,
    product_of,
    walk_product_of,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import launch
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
        bandwidth: float, product: str, arch: str,
    ):  # fmt: skip
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


_shape = planned(Shape)


class Problem(Shape):
    """Rows, columns and constants of one call."""

    def __init__(self, students, teachers, temperature, bandwidth, product_precision, student_columns,
                 teacher_columns, offset, prepared=None):  # fmt: skip
        self.prepared: Prepared = prepared or Prepared()
        self.rows = matrices("stages", [*students, *teachers])
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
        shape = _shape(
            tuple([y.shape[1] for y in self.rows]), len(students), x.shape[0], self.columns[0].shape[0], temperature,
            bandwidth, product_of(product_precision, x).name, architecture(x.device),
        )  # fmt: skip
        self.__dict__.update(shape.__dict__)

    @property
    def num_pairs(self) -> int:
        return self.num_students * self.num_teachers

    def stored_widths(self) -> list[int]:
        """Columns of the stages' operands: of all alike, as one launch has them, or as cuBLAS takes them."""
        return [stored_width(dim, True) for dim in self.dims] if self.is_wide else [self.width] * len(self.dims)

    @cached_property
    def operands(self) -> tuple[list[Operand], list[Operand]]:
        """The rows and the columns as products take them, about the columns' means."""
        widths = self.stored_widths()
        if not self.has_columns:
            return (self.prepared.centred(range(len(self.rows)), self.rows, self.walk_product, widths),) * 2
        columns = centred(self.columns, self.walk_product, widths)
        rows = operands(self.rows, self.walk_product, widths, [x.centre for x in columns])
        return rows, columns

    def tiles(self, kernel: str) -> Tiles:
        return tiles("strip" if self.is_wide else kernel, self.arch, self.walk_product.name, self.width)

    def parts(self, config: Tiles, rows: int, programs: int, columns: int) -> int:
        """Among how many programs ``columns`` of a row block are divided, of which ``programs`` work on each."""
        if self.is_wide:
            return strip_parts(self.rows[0], config, rows, columns, programs)
        row_blocks = triton.cdiv(rows, config.rows) * programs
        return divide(row_blocks, columns, config.columns, multiprocessors(self.rows[0].device))

    def row_strips(self) -> Iterator[slice]:
        """All rows, or of wide ones a strip after another."""
        return row_strips(self.row_count, self.widest) if self.is_wide else iter([slice(0, self.row_count)])

    def pieces(self, rows: int, similarities: int, weights: int = 0) -> list[slice]:
        """All columns, or of wide ones as many at a time as so many strips of so many rows may have."""
        step = self.column_count
        if self.is_wide:
            step = strip_columns(rows, entry_bytes(self.product, similarities, weights))
        return list(column_strips(self.column_count, step))

    def constants(self, config: Tiles) -> dict:
        """Compile-time arguments of the two kernels that walk tiles."""
        return {
            "OWN_SHIFT": self.own_shift, "STRIP": self.is_wide, "WIDTH": self.width, "BLOCK_ROWS": config.rows,
            "BLOCK_COLUMNS": config.columns, "POLYNOMIALS": self.polynomials, "num_warps": config.warps,
            "num_stages": config.stages, **self.walk_product.constants(),
        }  # fmt: skip


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


def _forward(problem: Problem, strip: slice, shifts: Tensor, losses: Tensor, *log_sums: Tensor):
    """The losses and log-sums of a strip of rows, written to their places."""
    count, teachers = len(losses), problem.num_teachers
    product = problem.walk_product
    shared = 1 if problem.is_wide else teachers_at_once(problem.arch, product.name, problem.width, teachers)
    groups = problem.num_students * triton.cdiv(teachers, shared)
    config = sharing(problem.tiles("relation_sums"), shared)
    rows, columns = problem.operands
    pieces = problem.pieces(count, len(rows))
    parts = problem.parts(config, count, groups, pieces[0].stop)
    sums = losses.new_empty(parts, groups, num_sums(shared), count)
    common = {"S": problem.num_students, "T": teachers, "TEACHERS": shared}
    if problem.is_wide:
        rows = [x[strip] for x in rows]
    own = _rows_of(rows), _numbers_of(rows)
    for piece in pieces:
        others = [x[aligned(piece)] for x in columns] if problem.is_wide else columns
        products = _products(rows, others, count) if problem.is_wide else _rows_of(others)
        launch(relation_sums, **common, **problem.constants(config))(
            (triton.cdiv(count, config.rows), parts, groups), products if problem.is_wide else own[0], own[1],
            products, _numbers_of(others), sums, shifts, losses, *log_sums, count, piece.stop - piece.start,
            problem.offset + strip.start - piece.start, parts, int(piece.start > 0),
            int(piece.stop == problem.column_count), problem.row_count, problem.inner, problem.outer,
        )  # fmt: skip
        del products  # before the next ones are made
    if parts > 1:
        launch(
            relation_losses, **common, OWN_SHIFT=problem.own_shift, BLOCK_ROWS=STATISTICS_BLOCK,
            SUM=problem.product.SUM,
        )(
            (triton.cdiv(count, STATISTICS_BLOCK), groups), sums, shifts, losses, *log_sums, count, parts,
            problem.row_count, problem.outer,
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


def _factors(problem: Problem, side, count: int, scale: Tensor) -> Tensor:
    """The row statistics of one side, [pairs, FACTORS, count]; a side without upstream has none."""
    x, shape = problem.rows[0], (problem.num_pairs, FACTORS.value, count)
    if side is None:
        factors = x.new_zeros(shape)
        # Any shift will do that keeps the weights finite.
        factors[:, -2:] = problem.outer
        return factors
    upstream, losses, student_log_sums, teacher_log_sums = side
    factors = x.new_empty(shape)
    launch(
        relation_factors, S=problem.num_students, T=problem.num_teachers, HAS_LOSSES=losses is not None,
        OWN_SHIFT=problem.own_shift, SCALED=problem.product.scaled, BLOCK_ROWS=STATISTICS_BLOCK,
        SUM=problem.product.SUM,
    )(
        (triton.cdiv(count, STATISTICS_BLOCK), problem.num_pairs), upstream, upstream if losses is None else losses,
        student_log_sums, teacher_log_sums, factors, scale, count, count, problem.outer, problem.slope,
    )  # fmt: skip
    return factors


def _sides(problem: Problem, needs: Sequence[bool]) -> int:
    """Which sides of the pairs have gradients: bit 0 students, bit 1 teachers."""
    return any(needs[: problem.num_students]) + 2 * any(needs[problem.num_students :])


def _gradients(problem: Problem, row_factors, column_factors, needs, scale: Tensor) -> list[Tensor]:
    """Every pair gives its stages' gradients to slots of their own, which are then added."""
    S, T, rows = problem.num_students, problem.num_teachers, problem.row_count
    partners = [T] * S + [S] * T
    gradients = [torch.empty_like(x) if needed else x for x, needed in zip(problem.rows, needs, strict=True)]
    wanted = sum(1 << q for q, needed in enumerate(needs) if needed)
    stages = [q for q, needed in enumerate(needs) if needed]
    row_bytes = sum(partners[q] * problem.dims[q] for q in stages) * gradients[0].element_size()
    step = min(rows, max(ROW_MULTIPLE, SLOT_BYTES // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE))
    config = problem.tiles("relation_gradients")
    parts = problem.parts(config, step, problem.num_pairs, problem.column_count)
    one_each = parts == 1 and all(partners[q] == 1 for q in stages)
    if one_each:
        step = rows
    own, columns = problem.operands
    operand_arguments = _rows_of(own), _numbers_of(own), _rows_of(columns), _numbers_of(columns)
    centres = tuple([x.centre for x in columns])
    for first in range(0, rows, step):
        count = min(step, rows - first)
        slots = list(gradients)
        if not one_each:
            for q in stages:
                slots[q] = gradients[q].new_empty(partners[q] * parts, count, problem.dims[q])
        launch(
            relation_gradients, S=S, T=T, WANTED=_sides(problem, needs), SCALED=problem.product.scaled,
            **problem.constants(config),
        )(
            (triton.cdiv(count, config.rows), parts, problem.num_pairs), *operand_arguments, centres, problem.dims,
            tuple(slots), row_factors, row_factors, column_factors, scale, first, count, rows, problem.column_count,
            problem.offset, parts, wanted, problem.inner, problem.outer,
        )  # fmt: skip
        if not one_each:
            here = [gradients[q][first : first + count] for q in stages]
            largest = max(x.numel() for x in here)
            launch(add_slots, BLOCK=SLOT_BLOCK)(
                (triton.cdiv(largest, SLOT_BLOCK), len(stages)), tuple([slots[q] for q in stages]), tuple(here),
                tuple([x.numel() for x in here]), tuple([partners[q] * parts for q in stages]),
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
            (triton.cdiv(count, config.rows), parts, 1), products, _numbers_of(rows), products, _numbers_of(others),
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
