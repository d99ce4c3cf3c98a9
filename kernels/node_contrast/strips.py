"""node_contrast of rows too wide for a program's registers, a wanted pair and a strip of rows at a time."""

import math

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.log_sums import shifts_and_ratios
from gkd_fast.kernels.common.strips import column_strips, multiply, row_strips, strip_columns
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.node_contrast import launches as host
from gkd_fast.kernels.node_contrast.tiles import contrast_gradients, contrast_sums

LOG2E = 1 / math.log(2)


def _launch(problem, rows: int) -> tuple[tuple[int, int], dict]:
    config = tiles("strip", problem.arch, problem.product.name, 16)
    return (triton.cdiv(rows, config.rows), 1), problem.constants(config) | {"WIDTH": 16}


def node_contrast(problem, columns, owned: bool, offset: int, keep_weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, rows, S, T = problem.students[0], problem.row_count, problem.S, problem.T
    losses = x.new_zeros(rows, S, T)
    log_sums = x.new_empty(len(problem.pairs), rows, dtype=torch.float64)
    weighted = x.new_zeros(len(problem.pairs), rows, problem.dim) if keep_weighted else x.new_empty(0)
    with on_device(x):
        own_shift, shift, shifts = host.row_shifts(problem, columns)
        sides, count = problem.sides(problem.students, columns, owned), len(columns[0])
        for place, (s, t) in enumerate(problem.pairs):
            for strip in row_strips(rows, problem.dim):
                shift_of_strip = None if shifts is None else shifts[place, strip]
                out = losses[strip], log_sums[place, strip], weighted[place, strip] if keep_weighted else None
                _forward(problem, s, t, strip, sides, count, owned, offset, shift, shift_of_strip, out)
    return losses, log_sums, weighted


def _forward(problem, s, t, strip, sides, count, owned, offset, shift, shifts, out):
    losses, log_sums, weighted = out
    own_similarities = sides.own_similarities[s * problem.T + t, strip]
    rows, columns = sides.students[s].rows[strip], sides.teachers[t]
    along, column_numbers = (x[s * problem.T + t] for x in sides.numbers)
    sums = torch.empty_like(own_similarities)
    grid, constants = _launch(problem, len(rows))
    for piece in column_strips(count, strip_columns(len(rows), 2)):
        similarities = multiply(rows, columns.rows[piece].T)
        weights = torch.empty_like(similarities, dtype=problem.product.torch_type)
        launch(
            contrast_sums, S=problem.S, T=problem.T, KEEP=weighted is not None, OWN_SHIFT=shifts is not None,
            **constants,
        )(
            grid, (rows,) * problem.S, (similarities,) * problem.T, (rows,) * problem.T, (rows,) * problem.T,
            along[strip], column_numbers[piece], own_similarities, sums, weights, sums if shifts is None else shifts,
            losses, log_sums, problem.dim, len(rows), piece.stop - piece.start, offset + strip.start - piece.start,
            int(owned), 1 << (s * problem.T + t), 1, int(piece.start > 0), int(piece.stop == count), problem.scale,
            shift,
        )  # fmt: skip
        if weighted is not None:
            weighted += multiply(weights, columns.rows[piece])[:, : problem.dim]
    if weighted is not None:
        # 1/Z in the weights' units.
        centre = columns.centre[: problem.dim]
        weighted *= torch.exp2((shift if shifts is None else shifts) - log_sums * LOG2E)[:, None]
        weighted += centre
        if owned:
            own_weights = torch.exp2(own_similarities * problem.scale - log_sums * LOG2E).to(weighted.dtype)
            weighted += own_weights[:, None] * (problem.teachers[t][strip] - centre)


def node_contrast_backward(
    problem, teachers, students, owned, offset, own_side, column_side, weighted, needs
) -> list[Tensor]:
    S = problem.S
    stages = [*problem.students, *problem.teachers]
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(stages, needs, strict=True)]
    upstream, log_sums = own_side
    counts = len(teachers[0]), len(students[0])
    is_whole = teachers is problem.teachers and students is problem.students
    with on_device(upstream):
        of_students = of_teachers = None
        if any(needs[:S]) and not weighted.numel():
            of_students = problem.sides(problem.students, teachers, owned[0])
        if any(needs[S:]) and column_side is not None:
            of_teachers = (
                of_students if is_whole and of_students else problem.sides(students, problem.teachers, owned[1])
            )
        for place, (s, t) in enumerate(problem.pairs):
            for strip in row_strips(problem.row_count, problem.dim):
                g = (upstream[strip, s, t] / problem.temperature)[:, None]
                student, teacher = problem.students[s][strip], problem.teachers[t][strip]
                # Of the own columns' weights, less 1.
                own_weights = (student * teacher).sum(dim=1) * problem.scale - log_sums[place, strip] * LOG2E
                own_weights = torch.expm1(own_weights / LOG2E).to(g.dtype)[:, None]
                first = offset + strip.start
                gradient = gradients[s][strip] if needs[s] else None
                if needs[s] and weighted.numel():
                    gradient += g * (weighted[place, strip] - teacher * owned[0])
                elif needs[s]:
                    side = upstream[strip].contiguous(), log_sums[place : place + 1, strip].contiguous()
                    _add_sums(problem, s, t, strip, of_students, counts[0], first, side, gradient, False)
                    if owned[0]:
                        gradient += g * own_weights * teacher
                if needs[S + t]:
                    gradient = gradients[S + t][strip]
                    if column_side is not None:
                        column_upstream, column_log_sums = column_side
                        side = column_upstream, column_log_sums[place : place + 1]
                        _add_sums(problem, s, t, strip, of_teachers, counts[1], first, side, gradient, True)
                    if owned[1]:
                        gradient += g * student * (own_weights if column_side is not None else -1)
    return [x for x in gradients if x is not None]


def _add_sums(problem, s, t, strip, sides, count, offset, side, gradient, by_column):
    """Adds (1/τ) Σ_j g P columns_j of one pair to the gradient of a strip, but for the own columns i + offset."""
    upstream, log_sums = side
    vectors = shifts_and_ratios(log_sums, upstream, problem.product.SUM)
    power = power_of_two(upstream.abs().amax() / problem.temperature) if problem.product.scaled else None
    operands, numbers = (sides.students[s], sides.teachers[t]), [x[s * problem.T + t] for x in sides.numbers]
    if by_column:
        operands, numbers = operands[::-1], numbers[::-1]
    rows, columns = operands[0].rows[strip], operands[1]
    total, sums = torch.zeros_like(gradient), gradient.new_empty(len(rows))
    grid, constants = _launch(problem, len(rows))
    stages, partners = (problem.T, problem.S) if by_column else (problem.S, problem.T)
    for piece in column_strips(count, strip_columns(len(rows), 2)):
        similarities = multiply(rows, columns.rows[piece].T)
        weights = torch.empty_like(similarities, dtype=problem.product.torch_type)
        vectors_here = upstream, *vectors
        if by_column:
            vectors_here = upstream[piece], *(x[:, piece].contiguous() for x in vectors)
        launch(
            contrast_gradients, STAGES=stages, PARTNERS=partners, BY_COLUMN=by_column, SCALED=problem.product.scaled,
            **constants,
        )(
            grid, (rows,) * stages, (similarities,) * partners, (rows,) * partners, (rows,) * partners,
            numbers[0][strip], numbers[1][piece], sums, *vectors_here, *vectors_here, (weights,), sums,
            sums if power is None else power, problem.dim, len(rows), piece.stop - piece.start, offset - piece.start, 0,
            1 << (s * problem.T + t), 1 << (t if by_column else s), 1, int(piece.start > 0),
            1 if by_column else problem.T, problem.T if by_column else 1, problem.scale, 1 / problem.temperature,
        )  # fmt: skip
        total += multiply(weights, columns.rows[piece])[:, : problem.dim]
    total.addcmul_(sums[:, None], columns.centre[: problem.dim])
    gradient += total if power is None else total / power
