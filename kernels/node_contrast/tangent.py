"""node_contrast's second order on GPUs: the launches of ``tangent_tiles``, pair after pair."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import Piece, on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.log_sums import shifts_and_ratios
from gkd_fast.kernels.common.tangents import (
    Directions,
    add_weighted,
    converted,
    new_strip,
    pieces,
    rounded,
    row_blocks,
    spread,
    tiling,
)  # fmt: skip
from gkd_fast.kernels.node_contrast.launches import Problem
from gkd_fast.kernels.node_contrast.tangent_tiles import contrast_double_gradients, contrast_tangent_sums


@dataclass(frozen=True)
class Pair:
    """The rows x and columns y of one pair, and their tangents, None where they stand still."""

    rows: Tensor
    row_tangents: Tensor | None
    columns: Tensor
    column_tangents: Tensor | None

    @property
    def moves(self) -> bool:
        return self.row_tangents is not None or self.column_tangents is not None

    def blocks(self, problem: Problem) -> Iterator[tuple[slice, "Pair"]]:
        """The rows of one strip after another, in the product's type."""
        for block in row_blocks(len(self.rows), problem.dim):
            of_block = (
                x if x is None else converted(x[block], problem.product) for x in (self.rows, self.row_tangents)
            )
            rows, row_tangents = of_block
            yield block, replace(self, rows=rows, row_tangents=row_tangents)

    def pieces(self, problem: Problem) -> Iterator[Piece]:
        """The columns and, if they move, their tangents."""
        columns = [self.columns] if self.column_tangents is None else [self.columns, self.column_tangents]
        return pieces(columns, problem.product, len(self.rows), weights=2)

    def launch(self, problem: Problem, kernel, piece: Piece, *arguments, **constants):
        """A kernel gets x or y themselves in the place of tangents that it does not read."""
        grid, common = tiling(kernel.__name__, problem.arch, problem.product, len(self.rows), piece.count)
        tangents = self.rows if self.row_tangents is None else self.row_tangents
        moves = {"ROWS_MOVE": self.row_tangents is not None, "COLUMNS_MOVE": self.column_tangents is not None}
        launch(kernel, **moves, **common, **constants)(
            grid, self.rows, tangents, piece.matrices[0], piece.matrices[-1], *arguments, problem.dim, len(self.rows),
            piece.count, problem.scale, 1 / problem.temperature,
        )  # fmt: skip


def node_contrast_tangent(
    students, teachers, tangents, moving, log_sums, weighted, wanted, temperature, product_precision,
    teacher_columns=None, teacher_column_tangents=None, offset=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision)
    S = problem.S
    columns = problem.column_set("teacher_columns", teacher_columns, problem.teachers)
    own = problem.own_rows(teacher_columns, problem.teachers, offset)
    of_rows = spread("tangents", tangents, moving, [*problem.students, *problem.teachers])
    of_columns = _column_side("teacher", teacher_columns, teacher_column_tangents, moving[S:], columns, of_rows[S:])
    directions = Directions(problem.product, of_rows, of_columns)
    of_rows, of_columns = directions.sides
    losses = problem.students[0].new_zeros(problem.row_count, S, problem.T)
    log_sum_tangents = torch.zeros_like(log_sums)
    with on_device(log_sums):
        for place, (s, t) in enumerate(problem.pairs):
            pair = Pair(problem.students[s], of_rows[s], columns[t], of_columns[t])
            if not pair.moves:
                continue
            if weighted.numel() and pair.column_tangents is None:
                moved = (pair.row_tangents * weighted[place]).sum(dim=1) / temperature
            else:
                moved = _moved_log_sums(problem, pair, log_sums[place])
            log_sum_tangents[place] = directions.divided(moved)
            if own is problem.teachers:
                moved = moved - _own_similarities(problem, pair, own[t], of_rows[S + t]) / temperature
            losses[:, s, t] = directions.divided(moved)
    return losses, log_sum_tangents


def _column_side(side: str, columns, tangents, moving, stages, of_rows) -> list[Tensor | None]:
    """The tangents of a column set, or of the rows where there is none."""
    if (columns is None) != (tangents is None):
        raise ValueError(f"{side}_columns and {side}_column_tangents go together")
    return of_rows if columns is None else spread(f"{side}_column_tangents", tangents, moving, stages)


def _own_similarities(problem: Problem, pair: Pair, own: Tensor, own_tangents: Tensor | None) -> Tensor:
    """ċ of each row and its own column, of operands rounded as the tiles' are."""
    total = pair.rows.new_zeros(problem.row_count)
    for x, y in ((pair.row_tangents, own), (pair.rows, own_tangents)):
        if x is not None and y is not None:
            total += (rounded(x, problem.product) * rounded(y, problem.product)).sum(dim=1)
    return total


def _moved_log_sums(problem: Problem, pair: Pair, log_sums: Tensor) -> Tensor:
    """ż_i = (1/τ) Σ_j P_ij ċ_ij."""
    shifts, ratios = shifts_and_ratios(log_sums, pair.rows, problem.product.SUM)
    total = torch.zeros_like(log_sums)
    for block, part in pair.blocks(problem):
        for piece in part.pieces(problem):
            blocks = tiling("contrast_tangent_sums", problem.arch, problem.product, 1, piece.count)[0][0]
            sums = shifts.new_empty(blocks, len(part.rows))
            part.launch(problem, contrast_tangent_sums, piece, shifts[block], sums)
            total[block] += sums.sum(dim=0, dtype=total.dtype)
    return total * ratios


def node_contrast_double_backward(
    upstream, students, teachers, tangents, moving, log_sums, weighted, log_sum_tangents, wanted, temperature,
    product_precision, needs, teacher_columns=None, student_columns=None, teacher_column_tangents=None,
    student_column_tangents=None, offset=0, column_upstream=None, column_log_sums=None, column_log_sum_tangents=None,
) -> list[Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision)
    S, stages = problem.S, [*problem.students, *problem.teachers]
    if len(needs) != len(stages):
        raise ValueError(f"needs must have {len(stages)} entries, got {len(needs)}")
    all_teachers = problem.column_set("teacher_columns", teacher_columns, problem.teachers)
    all_students = problem.column_set("student_columns", student_columns, problem.students)
    of_rows = spread("tangents", tangents, moving, stages)
    of_teachers = _column_side(
        "teacher", teacher_columns, teacher_column_tangents, moving[S:], all_teachers, of_rows[S:]
    )
    of_students = _column_side(
        "student", student_columns, student_column_tangents, moving[:S], all_students, of_rows[:S]
    )
    directions = Directions(problem.product, of_rows, of_teachers, of_students)
    of_rows, of_teachers, of_students = directions.sides
    own_side = other_side = upstream, log_sums, log_sum_tangents
    if teacher_columns is not None or student_columns is not None:
        if column_upstream is not None and (
            student_columns is None or column_log_sums is None or column_log_sum_tangents is None
        ):
            raise ValueError("column_upstream needs student_columns, column_log_sums and column_log_sum_tangents")
        other_side = column_upstream, column_log_sums, column_log_sum_tangents
    has_own_teacher = problem.own_rows(teacher_columns, problem.teachers, offset) is problem.teachers
    has_own_student = problem.own_rows(student_columns, problem.students, offset) is problem.students
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(stages, needs, strict=True)]
    with on_device(upstream):
        for place, (s, t) in enumerate(problem.pairs):
            student = Pair(problem.students[s], of_rows[s], all_teachers[t], of_teachers[t])
            teacher = Pair(problem.teachers[t], of_rows[S + t], all_students[s], of_students[s])
            factor = upstream[:, s, t] / temperature
            for q, pair, side, partner in (
                (s, student, own_side, of_rows[S + t] if has_own_teacher else None),
                (S + t, teacher, other_side, of_rows[s] if has_own_student else None),
            ):
                if gradients[q] is None:
                    continue
                if pair.moves and side[0] is not None:
                    of_pair = side[0][:, s, t], side[1][place], directions.multiplied(side[2][place])
                    _add_sums(problem, pair, of_pair, q >= S, gradients[q])
                if partner is not None:
                    gradients[q] -= factor[:, None] * rounded(partner, problem.product)
    return [directions.divided(x) for x in gradients if x is not None]


def _add_sums(problem: Problem, pair: Pair, side: tuple[Tensor, Tensor, Tensor], by_column: bool, gradient: Tensor):
    """Adds (1/τ) Σ_j g (P˙_ij y_j + P_ij ẏ_j); ``side``: g, log-sums, their tangents, of rows or ``by_column``."""
    upstream, log_sums, log_sum_tangents = side
    shifts, ratios = shifts_and_ratios(log_sums, upstream, problem.product.SUM)
    factor, power = upstream / problem.temperature, None
    if problem.product.scaled:
        # |ċ/τ − ż| ≤ 4/τ along directions of length 1.
        power = power_of_two(factor.abs().amax() * max(1.0, 4 / problem.temperature))
        factor = factor * power
    factor, moved = factor * ratios, log_sum_tangents.to(upstream.dtype)
    for block, part in pair.blocks(problem):
        total = torch.zeros_like(gradient[block])
        for piece in part.pieces(problem):
            here = slice(piece.start, piece.start + piece.count) if by_column else block
            vectors = (x[here].contiguous() for x in (factor, shifts, moved))
            strips = [new_strip(part.rows, len(part.rows), piece.count) for _ in piece.matrices]
            part.launch(problem, contrast_double_gradients, piece, *vectors, strips[0], strips[-1], BY_COLUMN=by_column)
            for weights, columns in zip(strips, piece.matrices, strict=True):
                add_weighted(total, weights, columns)
        gradient[block] += total if power is None else total / power
