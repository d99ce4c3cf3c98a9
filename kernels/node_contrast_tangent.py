"""node_contrast's second order on GPUs: the launches of ``node_contrast_tangent_tiles``, pair after pair."""

from dataclasses import dataclass

import torch
from gkd_fast.kernels.launch import on_device, power_of_two
from gkd_fast.kernels.node_contrast import Problem
from gkd_fast.kernels.node_contrast_tangent_tiles import contrast_double_gradients, contrast_tangent_sums
from gkd_fast.kernels.strips import multiply
from gkd_fast.kernels.tangents import Directions, Walk, complete, is_wide, rounded, row_blocks, spread
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """The rows x and columns y of one pair, and their tangents, None where they stand still.

    A kernel gets x or y themselves in the place of tangents that it does not read.
    """

    rows: Tensor
    row_tangents: Tensor | None
    columns: Tensor
    column_tangents: Tensor | None

    @property
    def moves(self) -> bool:
        return self.row_tangents is not None or self.column_tangents is not None

    def of(self, block: slice) -> "Pair":
        """The same with a few of the rows."""
        tangents = self.row_tangents
        return Pair(
            self.rows[block], tangents if tangents is None else tangents[block], self.columns, self.column_tangents
        )

    def walk(self, problem: Problem, kernel: str):
        """(Walk, compile-time arguments, rows, and for every piece its matrices and what the kernel takes of it)."""
        x, y = self.rows, self.columns
        rows = x, x if self.row_tangents is None else self.row_tangents
        walk = Walk(kernel, problem.arch, problem.product, len(x), len(y), x.device, problem.dim)
        constants = walk.constants | {
            "ROWS_MOVE": self.row_tangents is not None, "COLUMNS_MOVE": self.column_tangents is not None,
        }  # fmt: skip

        def pieces():
            columns = [y] if self.column_tangents is None else [y, self.column_tangents]
            for piece in walk.pieces(columns, strips=4):
                matrices = piece.matrices if self.column_tangents is not None else (*piece.matrices, None)
                taken = (
                    walk.strips(x, self.row_tangents, *matrices) if walk.is_wide else (matrices[0], piece.matrices[-1])
                )
                yield piece, matrices, taken

        return walk, constants, rows, pieces()


def node_contrast_tangent(
    students, teachers, tangents, moving, log_sums, weighted, wanted, temperature, product_precision,
    teacher_columns=None, teacher_column_tangents=None, offset=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision)
    S = problem.S
    columns = problem.column_set("teacher_columns", teacher_columns, problem.teachers, offset)
    own = slice(offset, offset + problem.row_count) if teacher_columns is not None else slice(None)
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
            losses[:, s, t] = directions.divided(moved - _own_similarities(problem, pair, own) / temperature)
    return losses, log_sum_tangents


def _column_side(side: str, columns, tangents, moving, stages, of_rows) -> list[Tensor | None]:
    """The tangents of a column set, or of the rows where there is none."""
    if (columns is None) != (tangents is None):
        raise ValueError(f"{side}_columns and {side}_column_tangents go together")
    return of_rows if columns is None else spread(f"{side}_column_tangents", tangents, moving, stages)


def _own_similarities(problem: Problem, pair: Pair, own: slice) -> Tensor:
    """ċ of each row and its own column, of operands rounded as the tiles' are."""
    total = pair.rows.new_zeros(problem.row_count)
    rows, columns = pair.rows, pair.columns[own]
    tangents = None if pair.column_tangents is None else pair.column_tangents[own]
    for x, y in ((pair.row_tangents, columns), (rows, tangents)):
        if x is not None and y is not None:
            total += (rounded(x, problem.product) * rounded(y, problem.product)).sum(dim=1)
    return total


def _moved_log_sums(problem: Problem, pair: Pair, log_sums: Tensor) -> Tensor:
    """ż_i = (1/τ) Σ_j P_ij ċ_ij."""
    wide, results = is_wide(problem.arch, problem.product, problem.dim), []
    for block in row_blocks(wide, len(pair.rows), problem.dim):
        part = pair.of(block)
        walk, constants, rows, pieces = part.walk(problem, "contrast_tangent_sums")
        sums = pair.rows.new_empty(walk.parts, len(part.rows))
        for piece, _, columns in pieces:
            contrast_tangent_sums[walk.grid](
                *rows, *columns, log_sums[block], sums, problem.dim, walk.rows, piece.count, walk.parts,
                int(piece.start > 0), problem.scale, 1 / problem.temperature, **constants,
            )  # fmt: skip
        results.append(complete(sums))
    return torch.cat(results)


def node_contrast_double_backward(
    upstream, students, teachers, tangents, moving, log_sums, weighted, log_sum_tangents, wanted, temperature,
    product_precision, needs, teacher_columns=None, student_columns=None, teacher_column_tangents=None,
    student_column_tangents=None, offset=0, column_upstream=None, column_log_sums=None, column_log_sum_tangents=None,
) -> list[Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision)
    S, stages = problem.S, [*problem.students, *problem.teachers]
    if len(needs) != len(stages):
        raise ValueError(f"needs must have {len(stages)} entries, got {len(needs)}")
    all_teachers = problem.column_set("teacher_columns", teacher_columns, problem.teachers, offset)
    all_students = problem.column_set("student_columns", student_columns, problem.students, offset)
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
    own = slice(offset, offset + problem.row_count) if teacher_columns is not None else slice(None)
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(stages, needs, strict=True)]
    with on_device(upstream):
        for place, (s, t) in enumerate(problem.pairs):
            student = Pair(problem.students[s], of_rows[s], all_teachers[t], of_teachers[t])
            teacher = Pair(problem.teachers[t], of_rows[S + t], all_students[s], of_students[s])
            factor = upstream[:, s, t] / temperature
            for q, pair, side, partner in (
                (s, student, own_side, None if of_teachers[t] is None else of_teachers[t][own]),
                (S + t, teacher, other_side, of_rows[s]),
            ):
                if gradients[q] is None:
                    continue
                if pair.moves and side[0] is not None:
                    of_pair = side[0][:, s, t], side[1][place], directions.multiplied(side[2][place])
                    gradients[q] += _sums(problem, pair, of_pair, by_column=q >= S)
                if partner is not None:
                    gradients[q] -= factor[:, None] * rounded(partner, problem.product)
    return [directions.divided(x) for x in gradients if x is not None]


def _sums(problem: Problem, pair: Pair, side: tuple[Tensor, Tensor, Tensor], by_column: bool) -> Tensor:
    """(1/τ) Σ_j g (P˙_ij y_j + P_ij ẏ_j); ``side``: g, log-sums, their tangents, of rows or ``by_column``."""
    upstream, log_sums, log_sum_tangents = side
    factor, unscale = upstream / problem.temperature, None
    if problem.product.scaled:
        # |ċ/τ − ż| ≤ 4/τ along directions of length 1.
        power = power_of_two(factor.abs().amax() * max(1.0, 4 / problem.temperature))
        factor, unscale = factor * power, 1 / power
    vectors = factor, log_sums, log_sum_tangents
    wide, results = is_wide(problem.arch, problem.product, problem.dim), []
    for block in row_blocks(wide, len(pair.rows), problem.dim):
        part = pair.of(block)
        walk, constants, rows, pieces = part.walk(problem, "contrast_double_gradients")
        out = pair.rows.new_empty(walk.parts, walk.rows, problem.dim)
        if walk.is_wide:
            out.zero_()
        for piece, values, columns in pieces:
            here = slice(piece.start, piece.start + piece.count) if by_column else block
            moving = still = out
            if walk.is_wide:
                moving, still = walk.weights(piece.count, out), walk.weights(piece.count, out)
            contrast_double_gradients[walk.grid](
                *rows, *columns, *(x[here].contiguous() for x in vectors), moving, still, problem.dim, walk.rows,
                piece.count, walk.parts, int(piece.start > 0), problem.scale, 1 / problem.temperature,
                BY_COLUMN=by_column, **constants,
            )  # fmt: skip
            if walk.is_wide:
                for weights, matrix in zip((moving, still), values, strict=True):
                    if matrix is not None:
                        out[0] += multiply(weights, matrix)
        results.append(complete(out))
    total = results[0] if len(results) == 1 else torch.cat(results)
    return total if unscale is None else total * unscale
