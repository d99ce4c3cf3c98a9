"""relation_kl's second order on GPUs: the launches of ``tangent_tiles``, in groups of stages."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.operands import Operand, operands
from gkd_fast.kernels.common.strips import new_strip
from gkd_fast.kernels.common.tangents import (
    Directions,
    add_gathered,
    column_pieces_of,
    row_blocks,
    spread,
    tiling,
)
from gkd_fast.kernels.relation_kl.launches import LOG2E, Problem, power_of
from gkd_fast.kernels.relation_kl.tangent_tiles import relation_double_gradients, relation_tangent_sums


class MovingProblem(Problem):
    """Rows, columns and their tangents (None where a stage stands still), and the constants of one call."""

    def __init__(self, *arguments, tangents, moving, column_tangents):
        super().__init__(*arguments)
        self.walk_product = self.product
        of_rows = of_columns = spread("tangents", tangents, moving, self.rows)
        if self.has_columns != (column_tangents is not None):
            raise ValueError("a column set and column_tangents go together")
        if self.has_columns:
            of_columns = spread("column_tangents", column_tangents, moving, self.columns)
        self.directions = Directions(self.product, of_rows, of_columns)
        self.row_tangents, self.column_tangents = self.directions.sides

    def groups(self) -> Iterator[tuple[list[int], list[int]]]:
        """The student and the teacher of every pair."""
        for pair in range(self.num_pairs):
            yield [pair // self.num_teachers], [pair % self.num_teachers]

    def stages(self, students: list[int], teachers: list[int]) -> list[int]:
        return students + [self.num_students + t for t in teachers]

    def moving(self, stages: list[int]) -> list[int]:
        return [q for q in stages if self.row_tangents[q] is not None]

    @cached_property
    def moving_operands(self) -> tuple[dict[int, Operand], dict[int, Operand]]:
        """The tangents of rows and of columns, as they are, with their products with the columns' centres."""
        rows = columns = self._along(self.column_tangents)
        if self.has_columns:
            rows = self._along(self.row_tangents)
        return rows, columns

    def _along(self, tangents: Sequence[Tensor | None]) -> dict[int, Operand]:
        moving, widths = self.moving(range(len(self.rows))), self.stored_widths()
        centres = [self.operands[1][q].centre for q in moving]
        made = operands([tangents[q] for q in moving], self.product, [widths[q] for q in moving], None, others=centres)
        return dict(zip(moving, made, strict=True))

    def blocks(self) -> list[slice]:
        """The rows of one strip after another."""
        return row_blocks(self.row_count, self.widest)

    def columns_of(self, block: slice, weights: int) -> Iterator[slice]:
        """As many columns at a time as ``weights`` strips of a block of rows may have."""
        return column_pieces_of(self.column_count, self.product, block.stop - block.start, weights)

    def column_blocks(self, kernel, piece: slice) -> int:
        """Blocks of columns, each of which has sums of its own."""
        return tiling(kernel.__name__, self.arch, self.product, 1, piece.stop - piece.start)[0][0]

    def launch(self, kernel, students, teachers, block: slice, piece: slice, *arguments, **constants):
        stages = self.stages(students, teachers)
        moving = self.moving(stages)
        counts = block.stop - block.start, piece.stop - piece.start
        grid, common = tiling(kernel.__name__, self.arch, self.product, *counts)
        moves = sum(1 << k for k, q in enumerate(stages) if q in moving)
        rows, columns = ([x[q][here] for q in stages] for x, here in zip(self.operands, (block, piece), strict=True))
        row_tangents, column_tangents = (
            [x[q][here] for q in moving] for x, here in zip(self.moving_operands, (block, piece), strict=True)
        )
        sets = rows, row_tangents, columns, column_tangents
        launch(
            kernel, S=len(students), T=len(teachers), MOVING=moves, OWN_SHIFT=self.own_shift, **common, **constants
        )(
            grid, *(tuple(x.rows for x in of) for of in sets), *(tuple(x.numbers for x in of) for of in sets),
            tuple(x.rows.shape[1] for x in rows), *arguments, *counts, self.offset + block.start - piece.start,
            self.inner, self.outer,
        )  # fmt: skip


def relation_kl_tangent(
    students, teachers, tangents, moving, losses, student_log_sums, teacher_log_sums, temperature, bandwidth,
    product_precision, student_columns=None, teacher_columns=None, column_tangents=None, offset=0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = MovingProblem(
        students, teachers, temperature, bandwidth, product_precision, student_columns, teacher_columns, offset,
        tangents=tangents, moving=moving, column_tangents=column_tangents,
    )  # fmt: skip
    log_sums = torch.cat([student_log_sums, teacher_log_sums])
    # h = ℓ + log Z^t/Z^s, [I, S, T]
    levels = losses + (teacher_log_sums.T[:, None, :] - student_log_sums.T[:, :, None])
    moved = torch.zeros_like(losses), torch.zeros_like(student_log_sums), torch.zeros_like(teacher_log_sums)
    with on_device(losses):
        for group in problem.groups():
            if problem.moving(problem.stages(*group)):
                for block in problem.blocks():
                    _move_group(problem, *group, block, log_sums[:, block], losses[block], levels[block], [
                        moved[0][block], moved[1][:, block], moved[2][:, block]
                    ])  # fmt: skip
    return tuple(problem.directions.divided(x) for x in moved)


def _span(stages: list[int]) -> slice:
    """Neighbouring stages as a slice: a list of numbers would be copied to the device."""
    return slice(stages[0], stages[-1] + 1)


def _move_group(problem: MovingProblem, students, teachers, block, log_sums, losses, levels, out):
    """Writes the tangents of one group's losses and log-sums at a block of rows."""
    stages, S, T = problem.stages(students, teachers), len(students), len(teachers)
    of_stages = torch.cat([log_sums[_span(students)], log_sums[_span(stages[S:])]])
    shifts = (of_stages * LOG2E).to(losses.dtype)
    of_pairs = levels[:, _span(students), _span(teachers)].permute(2, 1, 0).to(losses.dtype).contiguous()
    sums = log_sums.new_zeros(2 * (S + T) + S * T, block.stop - block.start)
    for piece in problem.columns_of(block, weights=1):
        partial = losses.new_empty(problem.column_blocks(relation_tangent_sums, piece), *sums.shape)
        problem.launch(relation_tangent_sums, students, teachers, block, piece, partial, shifts, of_pairs)
        sums += partial.sum(dim=0, dtype=torch.float64)
    moved_losses, student_log_sums, teacher_log_sums = out
    if problem.has_columns:
        # Columns that may be part of a larger set: Z of the log-sums, so that tangents add up.
        shift = shifts.double() if problem.own_shift else problem.outer
        of_shifts = torch.exp(of_stages - shift / LOG2E)
        sums[: 2 * S : 2] = of_shifts[:S]
        sums[2 * S :: 2 + S] = of_shifts[S:]
    of_students = [sums[2 * k + 1] / sums[2 * k] for k in range(S)]
    for s, moved in zip(students, of_students, strict=True):
        student_log_sums[s] = moved
    for k, t in enumerate(teachers):
        total, moved, *of_pairs = sums[2 * S + k * (2 + S) :][: 2 + S]
        teacher_log_sums[t] = moved / total
        for s, of_pair, of_student in zip(range(S), of_pairs, of_students, strict=True):
            place = (slice(None), students[s], t)
            if not problem.has_columns:
                # h of these very sums, whose roundings are the tangents', in place of the forward pass's.
                shift = (shifts[S + k].double() - shifts[s]) / LOG2E if problem.own_shift else 0
                level = losses[place] + (total / sums[2 * s]).log() + shift
                of_pair = of_pair + (levels[place] - level) * moved
            moved_losses[place] = of_pair / total + of_student


def relation_kl_double_backward(
    upstream, students, teachers, tangents, moving, losses, student_log_sums, teacher_log_sums, loss_tangents,
    student_log_sum_tangents, teacher_log_sum_tangents, temperature, bandwidth, product_precision, needs,
    student_columns=None, teacher_columns=None, column_tangents=None, offset=0, column_upstream=None,
    column_losses=None, column_student_log_sums=None, column_teacher_log_sums=None, column_loss_tangents=None,
    column_student_log_sum_tangents=None, column_teacher_log_sum_tangents=None,
) -> list[Tensor]:  # fmt: skip
    problem = MovingProblem(
        students, teachers, temperature, bandwidth, product_precision, student_columns, teacher_columns, offset,
        tangents=tangents, moving=moving, column_tangents=column_tangents,
    )  # fmt: skip
    if len(needs) != len(problem.rows):
        raise ValueError(f"needs must have {len(problem.rows)} entries, got {len(needs)}")
    own = (upstream, losses, student_log_sums, teacher_log_sums)
    own_moved = (loss_tangents, student_log_sum_tangents, teacher_log_sum_tangents)
    other = (column_upstream, column_losses, column_student_log_sums, column_teacher_log_sums)
    other_moved = (column_loss_tangents, column_student_log_sum_tangents, column_teacher_log_sum_tangents)
    if not problem.has_columns:
        other, other_moved = own, own_moved
    elif column_upstream is None:
        other = None
    elif any(x is None for x in (*other, *other_moved)):
        raise ValueError("column_upstream needs the columns' losses and log-sums and the tangents of these")
    sides = [
        None if side is None else ([x.contiguous() for x in side], [problem.directions.multiplied(x) for x in moved])
        for side, moved in ((own, own_moved), (other, other_moved))
    ]
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(problem.rows, needs, strict=True)]
    with on_device(upstream):
        power = 1.0
        if problem.product.scaled:
            # Beside M's entries, M˙'s: υ ≤ 2/σ² and ρ ≤ υ/τ along directions of length 1.
            growth = max(1.0, 2 / bandwidth**2 * (1 + 3 / temperature))
            power = power_of(problem, own[0], other and other[0], growth)
        for group in problem.groups():
            stages = problem.stages(*group)
            if not problem.moving(stages):
                continue
            # Students and teachers apart: each side alone leaves the other's tiles fewer registers.
            for side in (group[0], stages[len(group[0]) :]):
                wanted = [q for q in side if gradients[q] is not None]
                if wanted:
                    _add_gradients(problem, *group, wanted, sides, gradients, power)
    if problem.product.scaled:
        gradients = [x if x is None else x / power for x in gradients]
    return [problem.directions.divided(x) for x in gradients if x is not None]


def _moving_factors(problem, students, teachers, side, count: int, power: Tensor | float) -> Tensor:
    """α, β, η and the shifts of one side for one group of pairs, as ``relation_factors`` has them, and the tangents of
    the first three. Differences of factors times weights nearly cancel where stages are alike: so in float64.
    """
    S, T = len(students), len(teachers)
    dtype = problem.columns[0].dtype
    if side is None:
        factors = torch.zeros(2 * (S + T * S + T) + S + T, count, dtype=dtype, device=problem.columns[0].device)
        # Any shift will do that keeps the weights finite.
        factors[S + T * S + T :][: S + T] = problem.outer
        return factors
    of_pairs, of_losses, loss_tangents = (
        x[:, _span(students), _span(teachers)].permute(2, 1, 0).double() for x in (side[0][0], side[0][1], side[1][0])
    )  # [T, S, count]
    student_log_sums, teacher_log_sums, student_tangents, teacher_tangents = (
        x[_span(stages)].double()
        for x, stages in zip((*side[0][2:], *side[1][1:]), (students, teachers, students, teachers), strict=True)
    )
    log_sums = torch.cat([student_log_sums, teacher_log_sums])
    shifts = (log_sums * LOG2E).to(dtype) if problem.own_shift else torch.full_like(log_sums, problem.outer)
    # P over U, also what a shift was rounded by.
    inverse = torch.exp(shifts.double() / LOG2E - log_sums)
    of_pairs = of_pairs * (power * problem.slope)
    alpha, beta = of_pairs.sum(dim=0) * inverse[:S], of_pairs * inverse[S:, None]
    # α̇ = −α (log Z^s)˙,  β̇ = −β (log Z^t)˙,  η = Σ_s β_s h_s with h = ℓ + log Z^t/Z^s
    levels = of_losses + teacher_log_sums[:, None] - student_log_sums
    rates = loss_tangents + teacher_tangents[:, None] * (1 - levels) - student_tangents
    rows = (
        alpha, beta.flatten(0, 1), (beta * levels).sum(dim=1), shifts, -alpha * student_tangents,
        (-beta * teacher_tangents[:, None]).flatten(0, 1), (beta * rates).sum(dim=1),
    )  # fmt: skip
    return torch.cat([x.to(dtype) for x in rows])


def _add_gradients(problem: MovingProblem, students, teachers, needed, sides, gradients, power):
    """Adds the tangents of one group's gradients to the stages ``needed``, students or teachers."""
    stages = problem.stages(students, teachers)
    wanted = sum(1 << k for k, q in enumerate(stages) if q in needed)
    row_factors = _moving_factors(problem, students, teachers, sides[0], problem.row_count, power)
    column_factors = row_factors
    if problem.has_columns:
        column_factors = _moving_factors(problem, students, teachers, sides[1], problem.column_count, power)
    for block in problem.blocks():
        _add_block(problem, students, teachers, needed, wanted, block, row_factors[:, block].contiguous(),
                   column_factors, [gradients[q][block] for q in needed])  # fmt: skip


def _add_block(problem: MovingProblem, students, teachers, needed, wanted, block, row_factors, column_factors, out):
    moved = problem.moving(needed)
    columns, tangents = problem.operands[1], problem.moving_operands[1]
    for piece in problem.columns_of(block, weights=len(needed) + len(moved)):
        shape = block.stop - block.start, piece.stop - piece.start
        strips, still = (tuple(new_strip(columns[q].rows, *shape) for q in of) for of in (needed, moved))
        sums = row_factors.new_empty(
            problem.column_blocks(relation_double_gradients, piece), len(needed), block.stop - block.start
        )
        problem.launch(
            relation_double_gradients, students, teachers, block, piece, strips, still or strips, sums, row_factors,
            column_factors[:, piece].contiguous(), WANTED=wanted,
        )  # fmt: skip
        for k, (q, weights) in enumerate(zip(needed, strips, strict=True)):
            add_gathered(out[k], weights, columns[q], piece, sums[:, k])
        for q, weights in zip(moved, still, strict=True):
            add_gathered(out[needed.index(q)], weights, tangents[q], piece)
