"""relation_kl on GPUs: the launches of ``tiles``, in groups of stages that fit a program's registers."""

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    Piece,
    Product,
    architecture,
    column_pieces,
    divide,
    matrices,
    multiprocessors,
    on_device,
    padded_width,
    power_of_two,
    product_of,
    row_and_column_pieces,
    row_blocks_at_a_time,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.row_maxima import row_maxima
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.strips import multiply, row_strips, strip_columns, strip_rows
from gkd_fast.kernels.common.table import Tiles, largest_width, polynomials, relation_group, tiles
from gkd_fast.kernels.relation_kl import small
from gkd_fast.kernels.relation_kl.gradient_tiles import num_factors, relation_factors, relation_gradients
from gkd_fast.kernels.relation_kl.tiles import num_sums, relation_losses, relation_sums

LOG2E = 1.4426950408889634
# Up to this 2·log2(e)/σ², and for similarities that rounding leaves beyond ±1, a polynomial can give 2^((c − 1)·inner).
LARGEST_POLYNOMIAL_RANGE = 124
# Up to this 1/τ the sums of exp(L − 1/τ) cannot underflow in float32.
LARGEST_SHARED_SHIFT = 80
STATISTICS_BLOCK = 256


class Problem:
    """Rows, columns and constants of one call."""

    def __init__(self, students, teachers, temperature, bandwidth, product_precision, student_columns,
                 teacher_columns, offset):  # fmt: skip
        self.num_students, self.num_teachers = len(students), len(teachers)
        self.rows = matrices("students", students) + matrices("teachers", teachers, students[0].shape[0])
        if (student_columns is None) != (teacher_columns is None):
            raise ValueError("student_columns and teacher_columns go together")
        self.has_columns = student_columns is not None
        self.columns, self.offset = self.rows, 0
        if self.has_columns:
            count = student_columns[0].shape[0]
            self.columns = matrices("student_columns", student_columns) + matrices(
                "teacher_columns", teacher_columns, count
            )
            self.offset = offset
            if [x.shape[1] for x in self.columns] != [x.shape[1] for x in self.rows]:
                raise ValueError("rows and columns of a stage must share a width")
        self.product: Product = product_of(product_precision, self.rows[0])
        self.arch = architecture(self.rows[0].device)
        self.inner, self.outer = LOG2E / bandwidth**2, LOG2E / temperature
        bounded = 2 * self.inner <= LARGEST_POLYNOMIAL_RANGE
        self.polynomials = polynomials(self.arch, self.product.name) if bounded else 0
        self.slope = 1 / (bandwidth**2 * temperature)
        self.own_shift = 1 / temperature > LARGEST_SHARED_SHIFT
        self.row_count, self.column_count = len(self.rows[0]), len(self.columns[0])
        self.dims = tuple(x.shape[1] for x in self.rows)
        self.widest = max(self.dims)
        self.is_wide = padded_width(self.widest) > largest_width(self.arch, self.product.name)

    def groups(self, kernel: str) -> Iterator[tuple[list[int], list[int]]]:
        """Blocks of stage pairs: the students and the teachers that share a launch."""
        most_students, most_teachers = relation_group(
            kernel, self.arch, self.product.name, self.width(range(len(self.rows)))
        )
        for s in range(0, self.num_students, most_students):
            for t in range(0, self.num_teachers, most_teachers):
                yield (
                    list(range(s, min(s + most_students, self.num_students))),
                    list(range(t, min(t + most_teachers, self.num_teachers))),
                )

    def width(self, stages) -> int:
        """The padded width of a launch; strips hold no rows."""
        return 16 if self.is_wide else padded_width(*(self.rows[q].shape[1] for q in stages))

    def tiles(self, kernel: str, stages) -> Tiles:
        return tiles("strip" if self.is_wide else kernel, self.arch, self.product.name, self.width(stages))

    def parts(self, config: Tiles) -> int:
        """Among how many programs the columns of a row block are divided."""
        row_blocks = row_blocks_at_a_time(self.row_count, config.rows)
        processors = multiprocessors(self.rows[0].device)
        return divide(row_blocks, self.column_count, config.columns, processors)

    def stages(self, students: list[int], teachers: list[int]) -> list[int]:
        return students + [self.num_students + t for t in teachers]

    def pieces(self, stages: list[int], config: Tiles) -> Iterator[tuple[Piece, Piece]]:
        """Pieces of the rows with pieces of the columns."""
        rows = [self.rows[q] for q in stages]
        columns = rows if not self.has_columns else [self.columns[q] for q in stages]
        if not self.is_wide:
            yield from row_and_column_pieces(rows, columns, self.product.torch_type, self.width(stages),
                                             max(config.rows, config.columns))  # fmt: skip
            return
        own = Piece(0, self.row_count, tuple(x.to(self.product.torch_type) for x in rows), True)
        for piece in column_pieces(columns, self.product.torch_type, most=strip_columns(self.row_count, len(stages))):
            yield own, piece

    def similarities(self, own: Piece, piece: Piece) -> tuple[Tensor, ...]:
        """The strips of similarities of wide rows."""
        if not self.is_wide:
            return ()
        return tuple(multiply(x, columns.T) for x, columns in zip(own.matrices, piece.matrices, strict=True))

    def constants(self, students, teachers, config, piece: Piece) -> dict:
        """Compile-time arguments of the two kernels that walk tiles."""
        return {
            "S": len(students), "T": len(teachers), "OWN_SHIFT": self.own_shift, "STRIP": self.is_wide,
            "ALIGNED": piece.aligned, "WIDTH": self.width(self.stages(students, teachers)), "BLOCK_ROWS": config.rows,
            "BLOCK_COLUMNS": config.columns, "POLYNOMIALS": self.polynomials, "num_warps": config.warps,
            "num_stages": config.stages, **self.product.constants(),
        }  # fmt: skip


def relation_kl(
    students, teachers, temperature, bandwidth, product_precision, student_columns=None, teacher_columns=None, offset=0
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(students, teachers, temperature, bandwidth, product_precision, student_columns, teacher_columns,
                      offset)  # fmt: skip
    x, rows = problem.rows[0], problem.row_count
    if problem.is_wide and rows > strip_rows(problem.widest):
        return _forward_in_strips(problem, temperature, bandwidth, product_precision)
    losses = x.new_empty(rows, problem.num_students, problem.num_teachers)
    counts = problem.num_students, problem.num_teachers
    log_sums = [x.new_empty(count, rows, dtype=torch.float64) for count in counts]
    if is_small(rows, problem.has_columns, problem.widest):
        small.relation_kl(problem, losses, *log_sums)
        return losses, *log_sums
    with on_device(x):
        for group in problem.groups("relation_sums"):
            _forward(problem, *group, losses, *log_sums)
    return losses, *log_sums


def _forward_in_strips(problem: Problem, *options) -> tuple[Tensor, Tensor, Tensor]:
    sides = problem.num_students
    columns = problem.columns[:sides], problem.columns[sides:]
    results = []
    for strip in row_strips(problem.row_count, problem.widest):
        rows = [x[strip] for x in problem.rows]
        results.append(relation_kl(rows[:sides], rows[sides:], *options, *columns, problem.offset + strip.start))
    losses, student_log_sums, teacher_log_sums = zip(*results, strict=True)
    return torch.cat(losses), torch.cat(student_log_sums, dim=1), torch.cat(teacher_log_sums, dim=1)


def _forward(problem, students, teachers, losses, student_log_sums, teacher_log_sums):
    """The losses of one group of stage pairs, written to their places."""
    stages = problem.stages(students, teachers)
    x, rows = problem.rows[0], problem.row_count
    config = problem.tiles("relation_sums", stages)
    parts = problem.parts(config)
    dims = tuple(problem.rows[q].shape[1] for q in stages)
    sums = x.new_empty(parts, num_sums(len(students), len(teachers)), rows)
    shifts = _own_shifts(problem, stages) if problem.own_shift else losses
    out = (losses[:, students[0] :, teachers[0] :], student_log_sums[students[0] :], teacher_log_sums[teachers[0] :])
    strides = losses.stride(0), losses.stride(1)
    for own, piece in problem.pieces(stages, config):
        launch(relation_sums, **problem.constants(students, teachers, config, piece))(
            (triton.cdiv(own.count, config.rows), parts), own.matrices,
            problem.similarities(own, piece) or piece.matrices, dims, sums, shifts, *out, own.start, rows, piece.count,
            problem.offset - piece.start, parts, int(piece.start > 0), int(piece.is_last), *strides,
            problem.inner, problem.outer,
        )  # fmt: skip
    if parts > 1:
        launch(
            relation_losses, S=len(students), T=len(teachers), OWN_SHIFT=problem.own_shift,
            BLOCK_ROWS=STATISTICS_BLOCK, SUM=problem.product.SUM,
        )(
            (triton.cdiv(rows, STATISTICS_BLOCK),), sums, shifts, *out, rows, parts, *strides, problem.outer,
        )  # fmt: skip


def _own_shifts(problem: Problem, stages: list[int]) -> Tensor:
    """Each row's largest logit in base 2, per stage; the diagonal's logit 0 is the least that there is."""
    maxima = problem.rows[0].new_empty(len(stages), problem.row_count)
    for k, q in enumerate(stages):
        row_maxima(maxima[k], problem.rows[q], problem.columns[q], problem.offset, True, problem.product)
    return torch.exp2((maxima - 1) * problem.inner) * problem.outer


def relation_kl_backward(
    upstream, students, teachers, losses, student_log_sums, teacher_log_sums, temperature, bandwidth,
    product_precision, needs, student_columns=None, teacher_columns=None, offset=0, column_upstream=None,
    column_losses=None, column_student_log_sums=None, column_teacher_log_sums=None,
) -> list[Tensor]:  # fmt: skip
    problem = Problem(students, teachers, temperature, bandwidth, product_precision, student_columns, teacher_columns,
                      offset)  # fmt: skip
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
    if problem.is_wide and problem.row_count > strip_rows(problem.widest):
        return _backward_in_strips(problem, own, other, temperature, bandwidth, product_precision, needs)
    groups = list(problem.groups("relation_gradients"))
    adds = problem.is_wide or len(groups) > 1
    new = torch.zeros_like if adds else torch.empty_like
    gradients = [new(x) if needed else None for x, needed in zip(problem.rows, needs, strict=True)]
    with on_device(problem.rows[0]):
        scale = power_of(problem, own[0], other and other[0]) if problem.product.scaled else own[0]
        for group in groups:
            _backward(problem, *group, own, other, gradients, scale, adds)
    return [g for g in gradients if g is not None]


def _backward_in_strips(problem: Problem, own, other, temperature, bandwidth, product_precision, needs) -> list[Tensor]:
    sides = problem.num_students
    columns = problem.columns[:sides], problem.columns[sides:]
    gradients = [x.new_empty(x.shape) for x, needed in zip(problem.rows, needs, strict=True) if needed]
    upstream, losses, student_log_sums, teacher_log_sums = own
    for strip in row_strips(problem.row_count, problem.widest):
        rows = [x[strip] for x in problem.rows]
        of_strip = relation_kl_backward(
            upstream[strip], rows[:sides], rows[sides:], losses[strip], student_log_sums[:, strip],
            teacher_log_sums[:, strip], temperature, bandwidth, product_precision, needs, *columns,
            problem.offset + strip.start, *(other or ()),
        )  # fmt: skip
        for gradient, part in zip(gradients, of_strip, strict=True):
            gradient[strip] = part
    return gradients


def power_of(problem: Problem, upstream: Tensor, column_upstream: Tensor | None, growth: float = 1.0) -> Tensor:
    """The power of two that brings ``growth`` × the entries of M, a few times the largest upstream, into float16."""
    largest = upstream.abs().amax()
    if column_upstream is not None and column_upstream is not upstream:
        largest = torch.maximum(largest, column_upstream.abs().amax())
    pairs = problem.num_students * problem.num_teachers
    return power_of_two(largest * (growth * problem.slope * 4 * pairs * max(1.0, math.log(problem.column_count))))


def _factors(problem, students, teachers, side, count: int, wanted: int, scale: Tensor) -> Tensor:
    """The row statistics of one side for one group of pairs; a side without upstream has none."""
    x, num_stages = problem.rows[0], len(students) + len(teachers)
    shape = num_factors(len(students), len(teachers)), count
    if side is None:
        factors = x.new_zeros(shape)
        # Any shift will do that keeps the weights finite.
        factors[-num_stages:] = problem.outer
        return factors
    upstream, losses, student_log_sums, teacher_log_sums = side
    factors = x.new_empty(shape)
    s, t = students[0], teachers[0]
    launch(
        relation_factors, S=len(students), T=len(teachers), WANTED=wanted, OWN_SHIFT=problem.own_shift,
        SCALED=problem.product.scaled, BLOCK_ROWS=STATISTICS_BLOCK, SUM=problem.product.SUM,
    )(
        (triton.cdiv(count, STATISTICS_BLOCK),), upstream[:, s:, t:],
        upstream if losses is None else losses[:, s:, t:], student_log_sums[s:], teacher_log_sums[t:], factors, scale,
        count, upstream.stride(0), upstream.stride(1), problem.outer, problem.slope,
    )  # fmt: skip
    return factors


def _backward(problem, students, teachers, own, other, gradients, scale, adds: bool):
    """The gradients of one group's losses, written or, with ``adds``, added to what is there."""
    stages = problem.stages(students, teachers)
    wanted = sum(1 << k for k, q in enumerate(stages) if gradients[q] is not None)
    if not wanted:
        return
    rows = problem.row_count
    config = problem.tiles("relation_gradients", stages)
    parts = problem.parts(config)
    dims = tuple(problem.rows[q].shape[1] for q in stages)
    row_factors = _factors(problem, students, teachers, own, rows, wanted, scale)
    column_factors = row_factors
    if problem.has_columns:
        column_factors = _factors(problem, students, teachers, other, problem.column_count, wanted, scale)
    out = [gradients[q] for q in stages if gradients[q] is not None]
    divided = parts > 1 and not problem.is_wide
    partial = [x.new_empty(parts, *x.shape) for x in out] if divided else out
    for block, piece in problem.pieces(stages, config):
        strips = problem.similarities(block, piece)
        if strips:
            partial = [x.new_empty(rows, piece.count, dtype=problem.product.torch_type) for x in out]
        constants = problem.constants(students, teachers, config, piece)
        launch(relation_gradients, WANTED=wanted, SCALED=problem.product.scaled, **constants)(
            (triton.cdiv(block.count, config.rows), parts), block.matrices, strips or piece.matrices, dims,
            tuple(partial), row_factors, _piece_of(column_factors, piece), scale, block.start, rows, piece.count,
            problem.offset - piece.start,
            parts, int(piece.start > 0 or (adds and not divided)), problem.inner, problem.outer,
        )  # fmt: skip
        if strips:
            needed = [c for c, q in zip(piece.matrices, stages, strict=True) if gradients[q] is not None]
            for x, weights, values in zip(out, partial, needed, strict=True):
                product = multiply(weights, values)
                x += product / scale if problem.product.scaled else product
    if divided:
        for x, pieces in zip(out, partial, strict=True):
            x.copy_(x + pieces.sum(dim=0) if adds else pieces.sum(dim=0))


def _piece_of(factors: Tensor, piece: Piece) -> Tensor:
    """The columns' statistics of one piece, contiguous."""
    return factors[:, piece.start : piece.start + piece.count].contiguous()
