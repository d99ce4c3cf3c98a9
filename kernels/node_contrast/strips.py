"""node_contrast of rows too wide for a program's registers, a wanted pair and a strip of rows at a time."""

import math

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import column_pieces, on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.log_sums import shifts_and_ratios
from gkd_fast.kernels.common.strips import multiply, row_strips, strip_columns
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.node_contrast import launches as host
from gkd_fast.kernels.node_contrast.tiles import contrast_gradients, contrast_sums

LOG2E = 1 / math.log(2)


def _launch(problem, rows: int) -> tuple[tuple[int, int], dict]:
    config = tiles("strip", problem.arch, problem.product.name, 16)
    constants = problem.constants(config) | {"WIDTH": 16, "ALIGNED": False}
    return (triton.cdiv(rows, config.rows), 1), constants


def _pieces(problem, columns: Tensor, rows: int):
    return column_pieces([columns], problem.product.torch_type, most=strip_columns(rows, 2))


def node_contrast(problem, columns, own, keep_weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, rows, S, T = problem.students[0], problem.row_count, problem.S, problem.T
    losses = x.new_zeros(rows, S, T)
    log_sums = x.new_empty(len(problem.pairs), rows, dtype=torch.float64)
    weighted = x.new_zeros(len(problem.pairs), rows, problem.dim) if keep_weighted else x.new_empty(0)
    with on_device(x):
        own_shift, shift, shifts = host.row_shifts(problem, columns)
        for place, (s, t) in enumerate(problem.pairs):
            for strip in row_strips(rows, problem.dim):
                shift_of_strip = None if shifts is None else shifts[place, strip]
                out = losses[strip], log_sums[place, strip], weighted[place, strip] if keep_weighted else None
                _forward(problem, s, t, strip, columns[t], own[t][strip], shift, shift_of_strip, out)
    return losses, log_sums, weighted


def _forward(problem, s, t, strip, columns, own, shift, shifts, out):
    losses, log_sums, weighted = out
    student = problem.students[s][strip].to(problem.product.torch_type)
    rows, pair = len(student), s * problem.T + t
    own = own.to(problem.product.torch_type)
    own_similarities = (student.to(losses.dtype) * own.to(losses.dtype)).sum(dim=1)
    sums = losses.new_empty(rows)
    grid, constants = _launch(problem, rows)
    for piece in _pieces(problem, columns, rows):
        similarities = multiply(student, piece.matrices[0].T)
        weights = torch.empty_like(similarities, dtype=problem.product.torch_type)
        launch(
            contrast_sums, S=problem.S, T=problem.T, KEEP=weighted is not None, OWN_SHIFT=shifts is not None,
            **constants,
        )(
            grid, (student,) * problem.S, (similarities,) * problem.T, (own_similarities,) * problem.T, sums, weights,
            sums if shifts is None else shifts, losses, log_sums, problem.dim, rows, piece.count, 1 << pair, 1,
            int(piece.start > 0), int(piece.is_last), problem.scale, shift,
        )  # fmt: skip
        if weighted is not None:
            weighted += multiply(weights, piece.matrices[0])
    if weighted is not None:
        # 1/Z in the weights' units.
        weighted *= torch.exp2((shift if shifts is None else shifts) - log_sums * LOG2E)[:, None]


def node_contrast_backward(
    problem, teachers, students, own_teachers, own_students, own_side, column_side, weighted, needs
) -> list[Tensor]:
    rows, S = problem.row_count, problem.S
    stages = [*problem.students, *problem.teachers]
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(stages, needs, strict=True)]
    upstream, log_sums = own_side
    with on_device(upstream):
        for place, (s, t) in enumerate(problem.pairs):
            for strip in row_strips(rows, problem.dim):
                g = (upstream[strip, s, t] / problem.temperature)[:, None]
                if needs[s]:
                    own = own_teachers[t][strip]
                    gradient = gradients[s][strip]
                    gradient -= g * own.to(problem.product.torch_type).to(own.dtype)
                    if weighted.numel():
                        gradient += g * weighted[place, strip]
                    else:
                        side = upstream[strip].contiguous(), log_sums[place : place + 1, strip].contiguous()
                        _add_sums(problem, s, t, problem.students[s][strip], teachers[t], side, gradient, False)
                if needs[S + t]:
                    own = own_students[s][strip]
                    gradient = gradients[S + t][strip]
                    gradient -= g * own.to(problem.product.torch_type).to(own.dtype)
                    if column_side is not None:
                        column_upstream, column_log_sums = column_side
                        side = column_upstream, column_log_sums[place : place + 1]
                        _add_sums(problem, s, t, problem.teachers[t][strip], students[s], side, gradient, True)
    return [x for x in gradients if x is not None]


def _add_sums(problem, s, t, rows, columns, side, gradient, by_column):
    """Adds (1/τ) Σ_j g P columns_j of one pair to the gradient of a strip of rows."""
    upstream, log_sums = side
    vectors = shifts_and_ratios(log_sums, upstream, problem.product.SUM)
    power = power_of_two(upstream.abs().amax() / problem.temperature) if problem.product.scaled else upstream
    rows = rows.to(problem.product.torch_type)
    grid, constants = _launch(problem, len(rows))
    stages, partners = (problem.T, problem.S) if by_column else (problem.S, problem.T)
    for piece in _pieces(problem, columns, len(rows)):
        similarities = multiply(rows, piece.matrices[0].T)
        weights = torch.empty_like(similarities, dtype=problem.product.torch_type)
        here = slice(piece.start, piece.start + piece.count)
        launch(
            contrast_gradients, STAGES=stages, PARTNERS=partners, BY_COLUMN=by_column, SCALED=problem.product.scaled,
            **constants,
        )(
            grid, (rows,) * stages, (similarities,) * partners, (rows,) * partners,
            upstream[here] if by_column else upstream, upstream,
            *(x[:, here].contiguous() if by_column else x for x in vectors), (weights,), power, problem.dim,
            len(rows), piece.count, 1 << (s * problem.T + t), 1 << (t if by_column else s), 1, 0,
            1 if by_column else problem.T, problem.T if by_column else 1, problem.scale, 1 / problem.temperature,
        )  # fmt: skip
        product = multiply(weights, piece.matrices[0])
        gradient += product / power if problem.product.scaled else product
