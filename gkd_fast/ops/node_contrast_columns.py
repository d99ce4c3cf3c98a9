"""node_contrast of rows that meet a column set: how the results of its blocks make one, and its derivatives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.ops.autograd import flags, last_derivative, scatter, tangents_of
from gkd_fast.ops.columns import Columns, add, run


def _merge(one: Sequence[Tensor], other: Sequence[Tensor], places) -> list[Tensor]:
    """Losses, log-sums and weighted sums of two sets of columns, the own ones among the first, as those of both."""
    losses, log_sums, weighted = one
    total = torch.logaddexp(log_sums, other[1])
    if weighted.numel():
        weighted = sum((z - total).exp().to(w)[..., None] * w for _, z, w in (one, other))
    losses = losses.clone()
    for place, growth in zip(places, total - log_sums):
        losses.flatten(1)[:, place] += growth
    return [losses, total, weighted]


class NodeContrast(torch.autograd.Function):
    """Losses of one rank's rows against ``columns``, the teachers' and then the students'; the other ranks run it at
    the same time."""

    @staticmethod
    def forward(ctx, columns, num_students, settings, keep_weighted, *stages):
        sides = stages[:num_students], stages[num_students:]
        num_teachers, wanted = len(sides[1]), settings[0]
        places = [p for p, is_wanted in enumerate(wanted) if is_wanted]
        merged = None
        for block in columns.blocks(only=num_teachers):
            part = run(
                torch.ops.gkd_fast.node_contrast, *sides, *settings, keep_weighted, teacher_columns=block.columns,
                offset=block.offset,
            )  # fmt: skip
            merged = part if merged is None else _merge(merged, part, places)
        losses, log_sums, weighted = merged
        ctx.num_students, ctx.settings, ctx.keeps = num_students, settings, keep_weighted
        columns.save(ctx, log_sums, weighted, *stages)
        return losses

    @staticmethod
    def backward(ctx, upstream):
        columns, (log_sums, weighted, *stages) = Columns.saved(ctx)
        needs = flags(ctx.needs_input_grad[4:])
        gradients = NodeContrastBackward.apply(
            columns, ctx.num_students, ctx.settings, ctx.keeps, needs, log_sums, weighted, upstream.contiguous(),
            *stages,
        )  # fmt: skip
        return *[None] * 4, *scatter(gradients, needs)


class NodeContrastBackward(torch.autograd.Function):
    """The gradients that ``needs`` asks for."""

    @staticmethod
    def forward(ctx, columns, num_students, settings, keeps, needs, log_sums, weighted, upstream, *stages):
        sides = stages[:num_students], stages[num_students:]
        arguments = upstream, *sides, log_sums, weighted, *settings
        of_students, of_teachers = _halves(needs, num_students)
        gradients = []
        if any(of_students) and keeps:
            gradients += run(torch.ops.gkd_fast.node_contrast_backward, *arguments, of_students)
        elif any(of_students):
            total = None
            for block in columns.blocks(only=len(sides[1])):
                part = run(
                    torch.ops.gkd_fast.node_contrast_backward, *arguments, of_students, teacher_columns=block.columns,
                    offset=block.offset,
                )  # fmt: skip
                total = add(total, part)
            gradients += total
        if any(of_teachers):
            total = None
            for block in columns.blocks(upstream, log_sums.T):
                if block.trained:
                    part = run(
                        torch.ops.gkd_fast.node_contrast_backward, *arguments, of_teachers,
                        student_columns=block.columns[len(sides[1]) :], offset=block.offset,
                        column_upstream=block.extra[0], column_log_sums=block.extra[1].T.contiguous(),
                    )  # fmt: skip
                    total = add(total, part)
            gradients += total
        ctx.num_students, ctx.settings, ctx.needed = num_students, settings, needs
        ctx.set_materialize_grads(False)
        columns.save(ctx, log_sums, weighted, upstream, *stages)
        return tuple(gradients)

    @staticmethod
    @last_derivative
    def backward(ctx, *cotangents):
        # Log-sums and weighted sums are functions of the stages: their part of the derivative is in the stages'
        # gradients.
        columns, (log_sums, weighted, upstream, *stages) = Columns.saved(ctx)
        num_students = ctx.num_students
        sides = stages[:num_students], stages[num_students:]
        num_teachers = len(sides[1])
        tangents, moving = tangents_of(cotangents, ctx.needed)
        student_tangents = tangents[: sum(moving[:num_students])]
        teacher_tangents = tangents[len(student_tangents) :]
        # Several blocks would each add the kept sums.
        kept = weighted if columns.whole else weighted.new_empty(0)
        arguments = *sides, tangents, moving, log_sums, kept

        def teacher_columns(block):
            moved = block.extra
            if not block.trained:
                moved = [torch.zeros_like(x) for x, moves in zip(block.columns, moving[num_students:]) if moves]
            return {"teacher_columns": block.columns, "teacher_column_tangents": moved, "offset": block.offset}

        moved = None
        for block in columns.blocks(*teacher_tangents, only=num_teachers):
            part = run(torch.ops.gkd_fast.node_contrast_tangent, *arguments, *ctx.settings, **teacher_columns(block))
            moved = add(moved, part)
        loss_tangents, log_sum_tangents = moved
        needs = flags(ctx.needs_input_grad[8:])
        of_students, of_teachers = _halves(needs, num_students)
        second = torch.ops.gkd_fast.node_contrast_double_backward
        arguments = upstream, *arguments, log_sum_tangents, *ctx.settings
        gradients = []
        if any(of_students):
            total = None
            for block in columns.blocks(*teacher_tangents, only=num_teachers):
                total = add(total, run(second, *arguments, of_students, **teacher_columns(block)))
            gradients += total
        if any(of_teachers):
            total = None
            for block in columns.blocks(*student_tangents, upstream, log_sums.T, log_sum_tangents.T):
                if block.trained:
                    *student_moved, g, z, z_moved = block.extra
                    part = run(
                        second, *arguments, of_teachers, student_columns=block.columns[num_teachers:],
                        student_column_tangents=student_moved, offset=block.offset, column_upstream=g,
                        column_log_sums=z.T.contiguous(), column_log_sum_tangents=z_moved.T.contiguous(),
                    )  # fmt: skip
                    total = add(total, part)
            gradients += total
        needs_upstream = ctx.needs_input_grad[7]
        return *[None] * 7, loss_tangents if needs_upstream else None, *scatter(gradients, needs)


def _halves(needs: list[bool], num_students: int) -> tuple[list[bool], list[bool]]:
    """The students' needs alone and the teachers' alone."""
    students = [needed and k < num_students for k, needed in enumerate(needs)]
    return students, [needed and k >= num_students for k, needed in enumerate(needs)]
