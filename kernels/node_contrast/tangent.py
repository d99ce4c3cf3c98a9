"""node_contrast's second order on GPUs: the launches of ``tangent_tiles``, pair after pair."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.log_sums import shifts_and_ratios
from gkd_fast.kernels.common.operands import stored_width
from gkd_fast.kernels.common.strips import new_strip
from gkd_fast.kernels.common.tangents import (
    Directions,
    add_gathered,
    column_pieces_of,
    row_blocks,
    spread,
    tiling,
)  # fmt: skip
from gkd_fast.kernels.node_contrast.launches import Problem, Sides
from gkd_fast.kernels.node_contrast.tangent_tiles import contrast_double_gradients, contrast_tangent_sums


class Pair:
    """The rows x, their own columns and the columns y of one pair, and the tangents of each, None where they stand
    still. The own columns count unrounded: ``similarities`` and ``tangents``, c and ċ of each row and its own one.
    """

    def __init__(self, problem: Problem, rows, partners, columns, owned: bool, offset: int):
        """rows, partners, columns: each matrix and its tangent."""
        self.row_count, self.column_count = len(rows[0]), len(columns[0])
        self.rows_move, self.columns_move = rows[1] is not None, columns[1] is not None
        self.moves = self.rows_move or self.columns_move
        self.given, self.owned, self.offset = (rows, partners, columns), owned, offset

    def prepare(self, problem: Problem) -> None:
        """Makes the operands; x and y themselves stand in the place of tangents that are not read."""
        rows, partners, columns = ([x, x if moving is None else moving] for x, moving in self.given)
        wanted = 1 | self.columns_move << 1 | self.rows_move << 2
        width = stored_width(problem.dim, True)
        sides = Sides(problem.product, width, rows, columns, [*rows, *partners], self.owned, wanted)
        self.rows, self.columns = sides.students, sides.teachers
        self.numbers = [self._of_both(x) for x in sides.numbers]
        self.similarities, self.tangents = self._of_both(sides.own_similarities)

    def _of_both(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Those of c = x·y and ċ = ẋ·y + x·ẏ."""
        still, by_columns, by_rows = numbers[:3]
        if self.rows_move and self.columns_move:
            return still, by_rows + by_columns
        return still, by_rows if self.rows_move else by_columns

    def launches(self, problem: Problem) -> Iterator[tuple[slice, slice]]:
        """The rows of one strip after another, with the columns of one."""
        for block in row_blocks(self.row_count, problem.dim):
            for piece in column_pieces_of(self.column_count, problem.product, block.stop - block.start, weights=2):
                yield block, piece

    def launch(self, problem: Problem, kernel, block: slice, piece: slice, *arguments, **constants):
        counts = block.stop - block.start, piece.stop - piece.start
        grid, common = tiling(kernel.__name__, problem.arch, problem.product, *counts)
        moves = {"ROWS_MOVE": self.rows_move, "COLUMNS_MOVE": self.columns_move}
        numbers = (x[here] for side, here in zip(self.numbers, (block, piece), strict=True) for x in side)
        launch(kernel, **moves, **common, **constants)(
            grid, *(x.rows[block] for x in self.rows), *(y.rows[piece] for y in self.columns), *numbers, *arguments,
            self.rows[0].rows.shape[1], *counts, self.offset + block.start - piece.start, problem.scale,
            1 / problem.temperature,
        )  # fmt: skip

    def new_sums(self, problem: Problem, kernel, block: slice, piece: slice, *sums: int) -> Tensor:
        """Sums of the rows for every block of columns."""
        blocks = tiling(kernel.__name__, problem.arch, problem.product, 1, piece.stop - piece.start)[0][0]
        return self.similarities.new_empty(blocks, *sums, block.stop - block.start)


def node_contrast_tangent(
    students, teachers, tangents, moving, log_sums, weighted, wanted, temperature, product_precision,
    teacher_columns=None, teacher_column_tangents=None, offset=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision)
    S = problem.S
    columns = problem.column_set("teacher_columns", teacher_columns, problem.teachers)
    owned = problem.owns(teacher_columns, offset)
    offset = 0 if teacher_columns is None else offset
    of_rows = spread("tangents", tangents, moving, [*problem.students, *problem.teachers])
    of_columns = _column_side("teacher", teacher_columns, teacher_column_tangents, moving[S:], columns, of_rows[S:])
    directions = Directions(problem.product, of_rows, of_columns)
    of_rows, of_columns = directions.sides
    losses = problem.students[0].new_zeros(problem.row_count, S, problem.T)
    log_sum_tangents = torch.zeros_like(log_sums)
    with on_device(log_sums):
        for place, (s, t) in enumerate(problem.pairs):
            student, teacher = problem.students[s], problem.teachers[t]
            partner = teacher, of_rows[S + t] if owned else None
            pair = Pair(problem, (student, of_rows[s]), partner, (columns[t], of_columns[t]), owned, offset)
            if not pair.moves:
                continue
            if weighted.numel() and not pair.columns_move:
                moved = (of_rows[s] * weighted[place]).sum(dim=1) / temperature
                loss = (of_rows[s] * (weighted[place] - teacher * owned)).sum(dim=1) / temperature
            else:
                moved, loss = _moved_log_sums(problem, pair, log_sums[place])
            log_sum_tangents[place] = directions.divided(moved)
            losses[:, s, t] = directions.divided(loss)
    return losses, log_sum_tangents


def _column_side(side: str, columns, tangents, moving, stages, of_rows) -> list[Tensor | None]:
    """The tangents of a column set, or of the rows where there is none."""
    if (columns is None) != (tangents is None):
        raise ValueError(f"{side}_columns and {side}_column_tangents go together")
    return of_rows if columns is None else spread(f"{side}_column_tangents", tangents, moving, stages)


def _own_weights(problem: Problem, pair: Pair, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """P of the own columns and P − 1; 0 and 0 where they are no columns."""
    exponents = pair.similarities.double() / problem.temperature - log_sums
    return torch.exp(exponents) * pair.owned, torch.expm1(exponents) * pair.owned


def _moved_log_sums(problem: Problem, pair: Pair, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """ż_i = (1/τ) Σ_j P_ij ċ_ij, and the losses' tangents, less ċ/τ of the own columns."""
    pair.prepare(problem)
    shifts, ratios = shifts_and_ratios(log_sums, pair.similarities, problem.product.SUM)
    total = torch.zeros_like(log_sums)
    for block, piece in pair.launches(problem):
        sums = pair.new_sums(problem, contrast_tangent_sums, block, piece)
        pair.launch(problem, contrast_tangent_sums, block, piece, shifts[block], sums)
        total[block] += sums.sum(dim=0, dtype=total.dtype)
    total *= ratios
    weights, rests = _own_weights(problem, pair, log_sums)
    return total + weights * pair.tangents / problem.temperature, total + rests * pair.tangents / problem.temperature


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
    owned = problem.owns(teacher_columns, offset), problem.owns(student_columns, offset)
    offset = 0 if teacher_columns is None and student_columns is None else offset
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(stages, needs, strict=True)]
    with on_device(upstream):
        for place, (s, t) in enumerate(problem.pairs):
            student, teacher = (problem.students[s], of_rows[s]), (problem.teachers[t], of_rows[S + t])
            own = upstream[:, s, t], log_sums[place], directions.multiplied(log_sum_tangents[place])
            for q, rows, partners, columns, side, has_own in (
                (s, student, teacher, (all_teachers[t], of_teachers[t]), own_side, owned[0]),
                (S + t, teacher, student, (all_students[s], of_students[s]), other_side, owned[1]),
            ):
                if gradients[q] is None:
                    continue
                pair = Pair(problem, rows, partners, columns, has_own, offset)
                if pair.moves and side[0] is not None:
                    of_pair = side[0][:, s, t], side[1][place], directions.multiplied(side[2][place])
                    _add_sums(problem, pair, of_pair, q >= S, gradients[q])
                    _add_own(problem, pair, own, gradients[q])
                elif has_own and partners[1] is not None:
                    gradients[q] -= own[0][:, None] / temperature * partners[1]
    return [directions.divided(x) for x in gradients if x is not None]


def _add_own(problem: Problem, pair: Pair, own: tuple[Tensor, Tensor, Tensor], gradient: Tensor):
    """Adds (g/τ) (P˙ y + (P − 1) ẏ) of the rows' own columns y; ``own``: g, log-sums and their tangents of the rows."""
    upstream, log_sums, log_sum_tangents = own
    if not pair.owned:
        return
    weights, rests = _own_weights(problem, pair, log_sums)
    factor = upstream.double() / problem.temperature
    moving = factor * weights * (pair.tangents / problem.temperature - log_sum_tangents)
    partners, partner_tangents = pair.given[1]
    gradient += moving.to(gradient.dtype)[:, None] * partners
    if partner_tangents is not None:
        gradient += (factor * rests).to(gradient.dtype)[:, None] * partner_tangents


def _add_sums(problem: Problem, pair: Pair, side: tuple[Tensor, Tensor, Tensor], by_column: bool, gradient: Tensor):
    """Adds (1/τ) Σ_j g (P˙_ij y_j + P_ij ẏ_j) but for the own columns; ``side``: g, log-sums, their tangents, of rows
    or ``by_column``.
    """
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
        sums = pair.new_sums(problem, contrast_double_gradients, block, piece, 2)
        values = pair.columns if pair.columns_move else pair.columns[:1]
        shape = block.stop - block.start, piece.stop - piece.start
        strips = [new_strip(pair.rows[0].rows, *shape) for _ in values]
        pair.launch(problem, contrast_double_gradients, block, piece, *vectors, strips[0], strips[-1], sums,
                    BY_COLUMN=by_column)  # fmt: skip
        for k, (weights, columns) in enumerate(zip(strips, values, strict=True)):
            add_gathered(total[block], weights, columns, piece, sums[:, k])
    gradient += total if power is None else total / power
