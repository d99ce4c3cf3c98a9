"""relation_kl of rows that meet a column set: how the results of its blocks make one, and its derivatives."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gkd_fast.ops.autograd import flags, last_derivative, scatter, second_order_precision, tangents_of
from gkd_fast.ops.columns import Block, Columns, add, run


def _sides(block: Block, num_students: int, extra: tuple[str, ...] = ()) -> dict:
    """The block as column arguments; ``extra``: names of what came with it, log-sums and their tangents transposed."""
    named = {"student_columns": block.columns[:num_students], "teacher_columns": block.columns[num_students:]}
    named |= {name: x.T.contiguous() if "log_sum" in name else x for name, x in zip(extra, block.extra)}
    return named | {"offset": block.offset}


def _merge(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Losses and log-sums of two sets of columns as those of both: with q = ℓ + log Z^t − log Z^s, which is Q/Z^t, that
    is a mean of q by Z^t, and Z adds up."""
    log_sums = [torch.logaddexp(x, y) for x, y in zip(one[1:], other[1:])]
    mean = torch.zeros_like(one[0], dtype=torch.float64)
    for losses, students, teachers in (one, other):
        share = (teachers - log_sums[1]).exp().T[:, None, :]
        mean += share * (losses + teachers.T[:, None, :] - students.T[:, :, None])
    losses = (mean - log_sums[1].T[:, None, :] + log_sums[0].T[:, :, None]).clamp(min=0)
    return [losses.to(one[0].dtype), *log_sums]


def _statistics(
    columns: Columns, num_students: int, settings, stages: Sequence[Tensor], exact: bool = False
) -> Sequence[Tensor]:
    """Losses and log-sums of the rows with all columns; ``exact``: computed in float64."""
    dtype = stages[0].dtype
    if exact:
        stages, settings = _widened(stages), (*settings[:-1], "float64")
    merged = None
    for block in columns.blocks():
        if exact:
            block = replace(block, columns=_widened(block.columns))
        part = run(
            torch.ops.gkd_fast.relation_kl, stages[:num_students], stages[num_students:], *settings,
            **_sides(block, num_students),
        )  # fmt: skip
        merged = part if merged is None else _merge(merged, part)
    losses, *log_sums = merged
    return losses.to(dtype), *log_sums


def _widened(rows: Sequence[Tensor]) -> list[Tensor]:
    """Unit rows in float64, of length 1 there too."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.gkd_fast.unit_rows([x.double() for x in rows], torch.float64)[0]


class RelationKl(torch.autograd.Function):
    """Losses of one rank's rows against ``columns``; the other ranks run it at the same time."""

    @staticmethod
    def forward(ctx, columns, num_students, settings, *stages):
        losses, student_log_sums, teacher_log_sums = _statistics(columns, num_students, settings, stages)
        ctx.num_students, ctx.settings = num_students, settings
        columns.save(ctx, losses.clone(), student_log_sums, teacher_log_sums, *stages)  # The caller holds the losses.
        return losses

    @staticmethod
    def backward(ctx, upstream):
        columns, (losses, student_log_sums, teacher_log_sums, *stages) = Columns.saved(ctx)
        needs = flags(ctx.needs_input_grad[3:])
        gradients = RelationKlBackward.apply(
            columns, ctx.num_students, ctx.settings, needs, losses, student_log_sums, teacher_log_sums,
            upstream.contiguous(), *stages,
        )  # fmt: skip
        return None, None, None, *scatter(gradients, needs)


class RelationKlBackward(torch.autograd.Function):
    """The gradients that ``needs`` asks for."""

    STATISTICS = ("column_losses", "column_student_log_sums", "column_teacher_log_sums")
    TANGENTS = ("column_loss_tangents", "column_student_log_sum_tangents", "column_teacher_log_sum_tangents")

    @staticmethod
    def forward(ctx, columns, num_students, settings, needs, losses, student_log_sums, teacher_log_sums, upstream,
                *stages):  # fmt: skip
        sides = stages[:num_students], stages[num_students:]
        statistics = losses, student_log_sums, teacher_log_sums
        total = None
        for block in columns.blocks(upstream, *_by_row(statistics)):
            part = run(
                torch.ops.gkd_fast.relation_kl_backward, upstream, *sides, *statistics, *settings, needs,
                **_sides(block, num_students, ("column_upstream", *RelationKlBackward.STATISTICS)),
            )  # fmt: skip
            total = add(total, part)
        ctx.num_students, ctx.settings, ctx.needed = num_students, settings, needs
        ctx.set_materialize_grads(False)
        columns.save(ctx, *statistics, upstream, *stages)
        return tuple(total)

    @staticmethod
    @last_derivative
    def backward(ctx, *cotangents):
        # Losses and log-sums are functions of the stages: their part of the derivative is in the stages' gradients.
        columns, saved = Columns.saved(ctx)
        statistics, upstream, stages, num_students = saved[:3], saved[3], saved[4:], ctx.num_students
        tangents, moving = tangents_of(cotangents, ctx.needed)
        along = stages[:num_students], stages[num_students:], tangents, moving
        if second_order_precision(ctx.settings[-1], upstream) != ctx.settings[-1]:
            # The C++ kernels' cosines less 1 are exact to a float32 rounding of themselves there.
            statistics = _statistics(columns, num_students, ctx.settings, stages, exact=True)

        def column_tangents(block):
            """A bank's columns stand still."""
            moved = block.extra[: len(tangents)]
            return moved if block.trained else [torch.zeros_like(x) for x, m in zip(block.columns, moving) if m]

        total = None
        for block in columns.blocks(*tangents):
            part = run(
                torch.ops.gkd_fast.relation_kl_tangent, *along, *statistics, *ctx.settings,
                column_tangents=column_tangents(block), **_sides(block, num_students),
            )  # fmt: skip
            total = add(total, part)
        moved = total
        needs = flags(ctx.needs_input_grad[8:])
        gradients = None
        names = ("column_upstream", *RelationKlBackward.STATISTICS, *RelationKlBackward.TANGENTS)
        if any(needs):
            sent = (*tangents, upstream, *_by_row(statistics), *_by_row(moved))
            for block in columns.blocks(*sent):
                rest = replace(block, extra=block.extra[len(tangents) :])
                part = run(
                    torch.ops.gkd_fast.relation_kl_double_backward, upstream, *along, *statistics, *moved,
                    *ctx.settings, needs, column_tangents=column_tangents(block),
                    **_sides(rest, num_students, names),
                )  # fmt: skip
                gradients = add(gradients, part)
        needs_upstream = ctx.needs_input_grad[7]
        return *[None] * 7, moved[0] if needs_upstream else None, *scatter(gradients or [], needs)


def _by_row(statistics: Sequence[Tensor]) -> list[Tensor]:
    """Losses ``[I, S, T]`` and log-sums, or their tangents, with the rows first."""
    losses, student_log_sums, teacher_log_sums = statistics
    return [losses, student_log_sums.T, teacher_log_sums.T]
