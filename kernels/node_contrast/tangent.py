"""node_contrast's second order on GPUs: the launches of ``tangent_tiles``, pair after pair."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.log_sums import shifts_and_ratios
from gkd_fast.kernels.common.operands import Operand, centred, operands, stored_width
from gkd_fast.kernels.common.tangents import (
    Directions,
    add_gathered,
    column_pieces_of,
    new_strip,
    rounded,
    row_blocks,
    spread,
    tiling,
)  # fmt: skip
from gkd_fast.kernels.node_contrast.launches import Problem
from gkd_fast.kernels.node_contrast.tangent_tiles import contrast_double_gradients, contrast_tangent_sums


class Pair:
    """The rows x and columns y of one pair, and their tangents, None where they stand still."""

    def __init__(self, rows: Tensor, row_tangents: Tensor | None, columns: Tensor, column_tangents: Tensor | None):
        self.given = rows, row_tangents, columns, column_tangents
        self.row_count, self.column_count = len(rows), len(columns)
        self.rows_move, self.columns_move = row_tangents is not None, column_tangents is not None
        self.moves = self.rows_move or self.columns_move

    def prepare(self, problem: Problem) -> None:
        """Makes the operands: columns about their mean, the others as they are, rows' numbers along that mean. x and y
        themselves stand in the place of tangents that are not read.
        """
        x, x_tangent, y, y_tangent = self.given
        width = [stored_width(problem.dim, True)]
        (self.columns,) = centred([y], problem.product, width)

        def along(z: Tensor) -> Operand:
            return operands([z], problem.product, width, None, others=[self.columns.centre])[0]

        self.rows = along(x)
        self.row_tangents = self.rows if x_tangent is None else along(x_tangent)
        self.column_tangents = self.columns if y_tangent is None else along(y_tangent)

    def launches(self, problem: Problem) -> Iterator[tuple[slice, slice]]:
        """The rows of one strip after another, with the columns of one."""
        for block in row_blocks(self.row_count, problem.dim):
            for piece in column_pieces_of(self.column_count, problem.product, block.stop - block.start, weights=2):
                yield block, piece

    def launch(self, problem: Problem, kernel, block: slice, piece: slice, *arguments, **constants):
        counts = block.stop - block.start, piece.stop - piece.start
        grid, common = tiling(kernel.__name__, problem.arch, problem.product, *counts)
        rows, tangents = self.rows[block], self.row_tangents[block]
        moves = {"ROWS_MOVE": self.rows_move, "COLUMNS_MOVE": self.columns_move}
        launch(kernel, **moves, **common, **constants)(
            grid, rows.rows, tangents.rows, self.columns.rows[piece], self.column_tangents.rows[piece], rows.numbers,
            tangents.numbers, *arguments, rows.rows.shape[1], *counts, problem.scale, 1 / problem.temperature,
        )  # fmt: skip

    def new_sums(self, problem: Problem, kernel, block: slice, piece: slice) -> Tensor:
        """Sums of the rows for every block of columns."""
        blocks = tiling(kernel.__name__, problem.arch, problem.product, 1, piece.stop - piece.start)[0][0]
        return self.rows.numbers.new_empty(blocks, block.stop - block.start)


def node_contrast_tangent(
    students, teachers, tangents, moving, log_sums, weighted, wanted, temperature, product_precision,
    teacher_columns=None, teacher_column_tangents=None, offset=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision)
    S = problem.S
    columns = problem.column_set("teacher_columns", teacher_columns, problem.teachers)
    has_own = problem.owns(teacher_columns, offset)
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
            if weighted.numel() and not pair.columns_move:
                moved = (of_rows[s] * weighted[place]).sum(dim=1) / temperature
            else:
                moved = _moved_log_sums(problem, pair, log_sums[place])
            log_sum_tangents[place] = directions.divided(moved)
            if has_own:
                partner = problem.teachers[t], of_rows[S + t]
                moved = moved - _own_similarities(problem, pair, *partner) / temperature
            losses[:, s, t] = directions.divided(moved)
    return losses, log_sum_tangents


def _column_side(side: str, columns, tangents, moving, stages, of_rows) -> list[Tensor | None]:
    """The tangents of a column set, or of the rows where there is none."""
    if (columns is None) != (tangents is None):
        raise ValueError(f"{side}_columns and {side}_column_tangents go together")
    return of_rows if columns is None else spread(f"{side}_column_tangents", tangents, moving, stages)


def _own_similarities(problem: Problem, pair: Pair, own: Tensor, own_tangents: Tensor | None) -> Tensor:
    """ċ of each row and its own column."""
    rows, row_tangents, _, _ = pair.given
    total = rows.new_zeros(problem.row_count)
    for x, y in ((row_tangents, own), (rows, own_tangents)):
        if x is not None and y is not None:
            total += (x * y).sum(dim=1)
    return total


def _moved_log_sums(problem: Problem, pair: Pair, log_sums: Tensor) -> Tensor:
    """ż_i = (1/τ) Σ_j P_ij ċ_ij."""
    pair.prepare(problem)
    shifts, ratios = shifts_and_ratios(log_sums, pair.given[0], problem.product.SUM)
    total = torch.zeros_like(log_sums)
    for block, piece in pair.launches(problem):
        sums = pair.new_sums(problem, contrast_tangent_sums, block, piece)
        pair.launch(problem, contrast_tangent_sums, block, piece, shifts[block], sums)
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
    has_own_teacher = problem.owns(teacher_columns, offset)
    has_own_student = problem.owns(student_columns, offset)
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
    total = torch.zeros_like(gradient)
    pair.prepare(problem)
    for block, piece in pair.launches(problem):
        vectors = (x[piece if by_column else block].contiguous() for x in (factor, shifts, moved))
        sums = pair.new_sums(problem, contrast_double_gradients, block, piece)
        values = [pair.columns, pair.column_tangents] if pair.columns_move else [pair.columns]
        shape = block.stop - block.start, piece.stop - piece.start
        strips = [new_strip(pair.rows.rows, *shape) for _ in values]
        pair.launch(problem, contrast_double_gradients, block, piece, *vectors, strips[0], strips[-1], sums,
                    BY_COLUMN=by_column)  # fmt: skip
        for weights, columns, of_weights in zip(strips, values, (sums, None), strict=False):
            add_gathered(total[block], weights, columns, piece, of_weights)
    gradient += total if power is None else total / power
