"""node_contrast of rows too wide for a program's registers, a wanted pair and a strip of rows at a time.

Where gradients of students and teachers are wanted of one batch, both are made of the same strip of weights, by rows
and by columns.
"""

import math

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.log_sums import shifts_and_ratios
from gkd_fast.kernels.common.operands import Operand
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
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.node_contrast import launches as host
from gkd_fast.kernels.node_contrast.tiles import contrast_losses, contrast_strip

LOG2E = 1 / math.log(2)
# Whose factors weights have.
NONE, ROWS, COLUMNS = range(3)


def _walk(
    problem, rows: Operand, columns: Operand, count: int, offset: int, levels: Tensor, column_levels: Tensor,
    factors: Tensor | None = None, of: int = NONE, total: Tensor | None = None, column_total: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ_j w_ij of ``contrast_strip`` [parts, rows]; Σ_j w_ij ŷ_j is added to ``total``, Σ_i w_ij x_i to
    ``column_total``.
    """
    keep, both = total is not None or column_total is not None, column_total is not None
    config, length = tiles("strip", problem.arch, problem.product.name, 16), len(levels)
    step = strip_columns(length, entry_bytes(problem.product, 1, int(keep)))
    blocks, parts = triton.cdiv(length, config.rows), strip_parts(levels.device, config, length, min(count, step))
    sums = levels.new_empty(parts, length)
    if count == 0:
        return sums.zero_()
    for piece in column_strips(count, step):
        others, width = columns.rows[aligned(piece)], piece.stop - piece.start
        similarities = multiply(rows.rows, others.T)
        weights = torch.empty_like(similarities, dtype=problem.product.torch_type) if keep else similarities
        column_sums = levels.new_empty(blocks, width) if both else sums
        here = levels if factors is None else factors[piece] if of == COLUMNS else factors
        launch(
            contrast_strip, KEEP=keep, FACTORS=of, COLUMN_SUMS=both, BLOCK_ROWS=config.rows,
            BLOCK_COLUMNS=config.columns, TYPE=problem.product.TYPE, SUM=problem.product.SUM,
            num_warps=config.warps, num_stages=config.stages,
        )(
            (blocks, parts), similarities, weights, sums, column_sums, levels, column_levels[piece], here,
            length, width, offset - piece.start, int(piece.start > 0), problem.scale,
        )  # fmt: skip
        if total is not None:
            add_products(total, weights, others)
        if column_total is not None:
            add_products(column_total[piece], weights[:, :width].T, rows.rows)
            column_total[piece].addcmul_(column_sums.sum(dim=0)[:, None], rows.centre[: problem.dim])
        del similarities, weights  # before the next ones are made
    return sums


def node_contrast(problem, columns, owned: bool, offset: int, keep_weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, rows = problem.students[0], problem.row_count
    losses = x.new_zeros(rows, problem.S, problem.T)
    log_sums = x.new_empty(len(problem.pairs), rows, dtype=torch.float64)
    weighted = x.new_zeros(len(problem.pairs), rows, problem.dim) if keep_weighted else x.new_empty(0)
    with on_device(x):
        own_shift, shift, shifts = host.row_shifts(problem, columns)
        sides = problem.sides(problem.students, columns, owned)
        of_pair = x.new_empty(rows)
        for place, (s, t) in enumerate(problem.pairs):
            for strip in row_strips(rows, problem.dim):
                shift_of_strip = shift if shifts is None else shifts[place, strip]
                out = of_pair[strip], log_sums[place, strip], weighted[place, strip] if keep_weighted else None
                _forward(problem, s, t, strip, sides, len(columns[0]), owned, offset, shift_of_strip, out)
            losses[:, s, t] = of_pair
    return losses, log_sums, weighted


def _forward(problem, s, t, strip, sides, count, owned, offset, shift, out):
    """Writes one pair's losses, log-sums and, where they are kept, weighted sums; shift: of all rows, or each row's."""
    losses, log_sums, weighted = out
    own_similarities = sides.own_similarities[s * problem.T + t, strip]
    rows, columns = sides.students[s][strip], sides.teachers[t]
    along, column_numbers = (x[s * problem.T + t] for x in sides.numbers)
    sums = _walk(
        problem, rows, columns, count, offset + strip.start, along[strip] * problem.scale - shift,
        column_numbers * problem.scale, total=weighted,
    )  # fmt: skip
    own_weights = torch.exp2(own_similarities * problem.scale - shift) * owned
    sums = torch.cat([own_weights[None], sums])
    own_shift = isinstance(shift, Tensor)
    constants = {"WIDTH": 16, "BLOCK_ROWS": host.EPILOGUE_ROWS, "SUM": problem.product.SUM}
    launch(contrast_losses, S=1, T=1, KEEP=False, OWN_SHIFT=own_shift, **constants)(
        (triton.cdiv(len(losses), host.EPILOGUE_ROWS), 1), (sums,), own_similarities, sums, sums, sums,
        shift if own_shift else sums, losses, log_sums, problem.dim, len(losses), int(owned), 1, len(sums),
        problem.scale, 0.0 if own_shift else shift,
    )  # fmt: skip
    if weighted is not None:
        # 1/Z in the weights' units.
        centre = columns.centre[: problem.dim]
        weighted *= torch.exp2(shift - log_sums * LOG2E)[:, None]
        weighted += centre
        if owned:
            own_weights = torch.exp2(own_similarities * problem.scale - log_sums * LOG2E).to(weighted.dtype)
            weighted += own_weights[:, None] * (problem.teachers[t][strip] - centre)


def node_contrast_backward(
    problem, teachers, students, owned, offset, own_side, column_side, weighted, needs
) -> list[Tensor]:
    S, is_kept = problem.S, weighted.numel() > 0
    stages = [*problem.students, *problem.teachers]
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(stages, needs, strict=True)]
    upstream, log_sums = own_side
    is_whole = teachers is problem.teachers and students is problem.students
    with on_device(upstream):
        of_students = of_teachers = None
        if any(needs[:S]) and not is_kept:
            of_students = problem.sides(problem.students, teachers, owned[0])
        if any(needs[S:]) and column_side is not None:
            of_teachers = (
                of_students if is_whole and of_students else problem.sides(students, problem.teachers, owned[1])
            )
        for place, (s, t) in enumerate(problem.pairs):
            student, teacher = gradients[s], gradients[S + t]
            of_both = None
            if student is not None and not is_kept:
                of_both = teacher if is_whole and column_side is not None else None
                side = upstream[:, s, t], log_sums[place]
                _add_sums(problem, s, t, of_students, len(teachers[0]), offset, side, student, of_both)
            if teacher is not None and column_side is not None and of_both is None:
                side = column_side[0][:, s, t], column_side[1][place]
                _add_sums(problem, s, t, of_teachers, len(students[0]), offset, side, teacher, by_column=True)
            kept = weighted[place] if is_kept else None
            for strip in row_strips(problem.row_count, problem.dim):
                _add_own(problem, s, t, strip, owned, upstream[strip, s, t], log_sums[place, strip], student, teacher,
                         kept, column_side is not None)  # fmt: skip
    return [x for x in gradients if x is not None]


def _add_own(problem, s, t, strip, owned, upstream, log_sums, student, teacher, kept, has_columns):
    """Adds to a strip of one pair's gradients what is not in the sums of weights: the own columns' terms, of which the
    teachers' sums have no 1 but without columns, and kept weighted sums.
    """
    g = (upstream / problem.temperature)[:, None]
    x, y = problem.students[s][strip], problem.teachers[t][strip]
    # Of the own columns' weights, less 1.
    own_weights = (x * y).sum(dim=1) * problem.scale - log_sums * LOG2E
    own_weights = torch.expm1(own_weights / LOG2E).to(g.dtype)[:, None]
    if student is not None and kept is not None:
        student[strip] += g * (kept[strip] - y * owned[0])
    elif student is not None and owned[0]:
        student[strip] += g * own_weights * y
    if teacher is not None and owned[1]:
        teacher[strip] += g * x * (own_weights if has_columns else -1)


def _add_sums(problem, s, t, sides, count, offset, side, gradient, column_gradient=None, *, by_column=False):
    """Adds (1/τ) Σ_j g P columns_j of one pair to a gradient, but for the own columns i + offset, and with
    ``column_gradient`` (1/τ) Σ_i g P rows_i to that.

    side: the upstream of the pair's losses and their log-sums, of the rows or ``by_column`` of the ``count`` columns.
    """
    shifts, ratios = shifts_and_ratios(side[1], gradient, problem.product.SUM)
    unit, power = 1 / problem.temperature, None
    if problem.product.scaled:
        power = power_of_two(side[0].abs().amax() * unit)
        unit = power * unit
    factors = side[0] * unit * ratios
    rows, columns = sides.students[s], sides.teachers[t]
    levels, column_levels = (x[s * problem.T + t] * problem.scale for x in sides.numbers)
    if by_column:
        rows, columns, levels, column_levels = columns, rows, column_levels, levels
    levels, column_levels = levels[: problem.row_count], column_levels[:count]
    if by_column:
        column_levels = column_levels - shifts
    else:
        levels = levels - shifts
    given = gradient, column_gradient
    # What the power of two of float16 has multiplied lies apart.
    totals = given if power is None else tuple(x if x is None else torch.zeros_like(x) for x in given)
    for strip in row_strips(problem.row_count, problem.dim):
        sums = _walk(
            problem, rows[strip], columns, count, offset + strip.start, levels[strip], column_levels,
            factors if by_column else factors[strip], COLUMNS if by_column else ROWS, totals[0][strip], totals[1],
        )  # fmt: skip
        totals[0][strip].addcmul_(sums.sum(dim=0)[:, None], columns.centre[: problem.dim])
    if power is not None:
        for x, total in zip(given, totals, strict=True):
            if x is not None:
                x += total / power
