"""relation_kl: divergence of the teachers' relations from the students', all stage pairs from S + T similarities.

    relation_kl(students, teachers, temperature, bandwidth, product_precision, student_columns=None,
                teacher_columns=None, offset=0) -> (losses, student_log_sums, teacher_log_sums)
        students: S unit-row tensors [I, D_s].  teachers: T of them, [I, D_t].  float32 or float64, contiguous.
        product_precision: type of the tile products (``gkd_fast.ops``).
        student_columns, teacher_columns: the column set, [J, D_s] and [J, D_t]; None: columns = rows.
        offset: row i's own column is i + offset; there the logit is the constant 0.  Ignored without a column set.
        losses: [I, S, T].  *_log_sums: log Σ_j exp(R_ij/τ), [S, I] and [T, I]; the row statistics of the backward, in
        float64: they are of the size 1/τ, and rounded to float32 they would move every P by the factor 1 ± ε/τ.
    relation_kl_keep(students, teachers, temperature, bandwidth, product_precision) -> (losses, student_log_sums,
                teacher_log_sums, affinities)
        The same where the columns are the rows.  affinities: R for the backward op, which then does not multiply the
        rows again, in an order of the kernels' own; [0] where it is not kept (``gkd_fast.ops.affinities``).
    relation_kl_backward(upstream, students, teachers, losses, student_log_sums, teacher_log_sums, temperature,
                bandwidth, product_precision, needs, student_columns=None, teacher_columns=None, offset=0,
                column_upstream=None, column_losses=None, column_student_log_sums=None,
                column_teacher_log_sums=None, affinities=None) -> gradients
        upstream: gradient of the losses, [I, S, T].
        needs: S + T bools, students first: which gradients are wanted; only those come back, in that order.
        column_upstream: [J, S, T] gradient of the columns' own losses; None: zero (columns without gradient),
        and then the other column_* are not read.  With it column_student_log_sums [S, J] and
        column_teacher_log_sums [T, J] are needed, and column_losses [J, S, T] where a teacher's gradient is wanted.
        gradients: of the ROW set, complete (M is symmetric), [I, D] in the unit rows' type.
    The row set's upstream must be part of column_upstream where the rows are among the columns.

Second order. Along directions of the stages (L = R/τ, dots mark tangents, ċ_ij = ė_i·e_j + e_i·ė_j):
L̇ = L ċ/σ² off the diagonal, (log Z)˙_i = Σ_j P_ij L̇_ij, P˙ = P (L̇ − (log Z)˙). The derivative of the loss's gradients
contracted with cotangents is their tangent along these cotangents, because second derivatives are symmetric; so the
gradient of the upstream is the tangent of the losses.

    relation_kl_tangent(students, teachers, tangents, moving, losses, student_log_sums, teacher_log_sums, temperature,
                bandwidth, product_precision, student_columns=None, teacher_columns=None, column_tangents=None,
                offset=0) -> (loss_tangents, student_log_sum_tangents, teacher_log_sum_tangents)
        moving: S + T bools, students first: which stages have a direction; the others stand still.
        tangents: the directions of the moving stages, [I, D_q].  column_tangents: the columns' own, [J, D_q].
        The tangents of relation_kl's three results, in their shapes and types; P is that of the log-sums, so that with
        column sets that are parts of a larger one, whose log-sums are given, the tangents add up:
            ℓ̇_ist = Σ_j P^t_ij [(log P^t_ij − log P^s_ij − ℓ_ist) L̇^t_ij − L̇^s_ij] + (log Z^s)˙_i.
    relation_kl_double_backward(upstream, students, teachers, tangents, moving, losses, student_log_sums,
                teacher_log_sums, loss_tangents, student_log_sum_tangents, teacher_log_sum_tangents, temperature,
                bandwidth, product_precision, needs, student_columns=None, teacher_columns=None, column_tangents=None,
                offset=0, column_upstream=None, column_losses=None, column_student_log_sums=None,
                column_teacher_log_sums=None, column_loss_tangents=None, column_student_log_sum_tangents=None,
                column_teacher_log_sum_tangents=None) -> gradients
        The tangents of relation_kl_backward's gradients at a fixed upstream: those that ``needs`` (as there) asks
        for, of the ROW set, complete.  column_*: as in relation_kl_backward; column_upstream None: zero.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gkd_fast.ops import affinities as kept
from gkd_fast.ops.autograd import (
    PT2,
    flags,
    last_derivative,
    needed_like,
    refuse_column_gradient,
    refuse_derivative,
    refuse_forward_mode,
    register_autograd,
    scatter,
    tangents_of,
)  # fmt: skip
from gkd_fast.ops.columns import Block, Columns, add, run
from gkd_fast.ops.joined import Op, on_unit_rows
from gkd_fast.ops.unit_rows import unit_rows

torch.library.define(
    "gkd_fast::relation_kl",
    "(Tensor[] students, Tensor[] teachers, float temperature, float bandwidth, str product_precision, "
    "Tensor[]? student_columns=None, Tensor[]? teacher_columns=None, int offset=0) -> (Tensor, Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::relation_kl_keep",
    "(Tensor[] students, Tensor[] teachers, float temperature, float bandwidth, str product_precision) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::relation_kl_backward",
    "(Tensor upstream, Tensor[] students, Tensor[] teachers, Tensor losses, Tensor student_log_sums, "
    "Tensor teacher_log_sums, float temperature, float bandwidth, str product_precision, bool[] needs, "
    "Tensor[]? student_columns=None, Tensor[]? teacher_columns=None, int offset=0, Tensor? column_upstream=None, "
    "Tensor? column_losses=None, Tensor? column_student_log_sums=None, Tensor? column_teacher_log_sums=None, "
    "Tensor? affinities=None) -> Tensor[]",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::relation_kl_tangent",
    "(Tensor[] students, Tensor[] teachers, Tensor[] tangents, bool[] moving, Tensor losses, Tensor student_log_sums, "
    "Tensor teacher_log_sums, float temperature, float bandwidth, str product_precision, "
    "Tensor[]? student_columns=None, Tensor[]? teacher_columns=None, Tensor[]? column_tangents=None, int offset=0) "
    "-> (Tensor, Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::relation_kl_double_backward",
    "(Tensor upstream, Tensor[] students, Tensor[] teachers, Tensor[] tangents, bool[] moving, Tensor losses, "
    "Tensor student_log_sums, Tensor teacher_log_sums, Tensor loss_tangents, Tensor student_log_sum_tangents, "
    "Tensor teacher_log_sum_tangents, float temperature, float bandwidth, str product_precision, bool[] needs, "
    "Tensor[]? student_columns=None, Tensor[]? teacher_columns=None, Tensor[]? column_tangents=None, int offset=0, "
    "Tensor? column_upstream=None, Tensor? column_losses=None, Tensor? column_student_log_sums=None, "
    "Tensor? column_teacher_log_sums=None, Tensor? column_loss_tangents=None, "
    "Tensor? column_student_log_sum_tangents=None, Tensor? column_teacher_log_sum_tangents=None) -> Tensor[]",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::relation_kl")
def _(
    students, teachers, temperature, bandwidth, product_precision, student_columns=None, teacher_columns=None, offset=0
):
    return _like_results(students, teachers)


@torch.library.register_fake("gkd_fast::relation_kl_keep")
def _(students, teachers, temperature, bandwidth, product_precision):
    return *_like_results(students, teachers), kept.like([*students, *teachers])


def _like_results(students, teachers):
    x, s, t = students[0], len(students), len(teachers)
    rows = x.shape[0]  # len() would be a constant to torch.compile
    log_sums = (x.new_empty(stages, rows, dtype=torch.float64) for stages in (s, t))
    return x.new_empty(rows, s, t), *log_sums


@torch.library.register_fake("gkd_fast::relation_kl_backward")
def _(upstream, students, teachers, losses, student_log_sums, teacher_log_sums, temperature, bandwidth,
      product_precision, needs, *columns, **named_columns):  # fmt: skip
    return needed_like([*students, *teachers], needs)


@torch.library.register_fake("gkd_fast::relation_kl_tangent")
def _(students, teachers, tangents, moving, losses, student_log_sums, teacher_log_sums, *settings, **named_columns):
    return tuple(torch.empty_like(x) for x in (losses, student_log_sums, teacher_log_sums))


@torch.library.register_fake("gkd_fast::relation_kl_double_backward")
def _(upstream, students, teachers, tangents, moving, losses, student_log_sums, teacher_log_sums, loss_tangents,
      student_log_sum_tangents, teacher_log_sum_tangents, temperature, bandwidth, product_precision, needs,
      *columns, **named_columns):  # fmt: skip
    return needed_like([*students, *teachers], needs)


def _setup_context(ctx, inputs, output):
    students, teachers, ctx.temperature, ctx.bandwidth, ctx.product_precision, student_columns, _, _ = inputs
    refuse_column_gradient("gkd_fast::relation_kl", "gkd_fast::relation_kl_backward", student_columns is not None)
    ctx.num_students = len(students)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*students, *teachers, *output)


def _backward(ctx, upstream, *_):
    *stages, losses, student_log_sums, teacher_log_sums = ctx.saved_tensors
    needs = flags(ctx.needs_input_grad[0]) + flags(ctx.needs_input_grad[1])
    settings = ctx.num_students, ctx.temperature, ctx.bandwidth, ctx.product_precision
    results = losses, student_log_sums, teacher_log_sums
    gradients = _gradients(upstream.contiguous(), stages, results, settings, needs)
    return gradients[: ctx.num_students], gradients[ctx.num_students :], *[None] * 6


def _results(stages, settings, keep):
    num_students, *settings = settings
    op = torch.ops.gkd_fast.relation_kl_keep if keep else torch.ops.gkd_fast.relation_kl
    return op(stages[:num_students], stages[num_students:], *settings)


def _gradients(upstream, stages, results, settings, needs):
    num_students, *settings = settings
    losses, student_log_sums, teacher_log_sums, *affinities = results
    gradients = torch.ops.gkd_fast.relation_kl_backward(
        upstream, stages[:num_students], stages[num_students:], losses.detach(), student_log_sums, teacher_log_sums,
        *settings, needs, affinities=affinities[0] if affinities else None,
    )  # fmt: skip
    return scatter(gradients, needs)


register_autograd("gkd_fast::relation_kl", _backward, setup_context=_setup_context)


def _setup_double_context(ctx, inputs, output):
    upstream, students, teachers, losses, student_log_sums, teacher_log_sums, *settings, student_columns = inputs[:11]
    refuse_column_gradient(
        "gkd_fast::relation_kl_backward", "gkd_fast::relation_kl_double_backward", student_columns is not None
    )
    ctx.settings, ctx.wanted = settings[:3], settings[3]
    ctx.num_students = len(students)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*students, *teachers, upstream, losses, student_log_sums, teacher_log_sums)


def _double_backward(ctx, cotangents):
    # Losses and log-sums are functions of the stages: their part of the derivative is in the stages' gradients.
    *stages, upstream, losses, student_log_sums, teacher_log_sums = ctx.saved_tensors
    students, teachers = stages[: ctx.num_students], stages[ctx.num_students :]
    statistics = losses, student_log_sums, teacher_log_sums
    tangents, moving = tangents_of(cotangents, ctx.wanted)
    moved = torch.ops.gkd_fast.relation_kl_tangent(students, teachers, tangents, moving, *statistics, *ctx.settings)
    needs_upstream, needs = ctx.needs_input_grad[0], flags(ctx.needs_input_grad[1]) + flags(ctx.needs_input_grad[2])
    gradients = []
    if any(needs):
        gradients = torch.ops.gkd_fast.relation_kl_double_backward(
            upstream, students, teachers, tangents, moving, *statistics, *moved, *ctx.settings, needs
        )
    gradients = scatter(gradients, needs)
    students_gradients, teachers_gradients = gradients[: ctx.num_students], gradients[ctx.num_students :]
    return moved[0] if needs_upstream else None, students_gradients, teachers_gradients, *[None] * 15


register_autograd("gkd_fast::relation_kl_backward", _double_backward, setup_context=_setup_double_context)
refuse_derivative("gkd_fast::relation_kl_keep")
refuse_derivative("gkd_fast::relation_kl_tangent")
refuse_derivative("gkd_fast::relation_kl_double_backward")


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
    losses = mean - log_sums[1].T[:, None, :] + log_sums[0].T[:, :, None]
    return [losses.to(one[0].dtype), *log_sums]


class RelationKl(torch.autograd.Function):
    """Losses of one rank's rows against ``columns``; the other ranks run it at the same time."""

    @staticmethod
    def forward(ctx, columns, num_students, settings, *stages):
        merged = None
        for block in columns.blocks():
            part = run(
                torch.ops.gkd_fast.relation_kl, stages[:num_students], stages[num_students:], *settings,
                **_sides(block, num_students),
            )  # fmt: skip
            merged = part if merged is None else _merge(merged, part)
        losses, student_log_sums, teacher_log_sums = merged
        ctx.columns, ctx.num_students, ctx.settings = columns, num_students, settings
        ctx.save_for_backward(losses.detach(), student_log_sums, teacher_log_sums, *stages)
        return losses

    @staticmethod
    def backward(ctx, upstream):
        needs = flags(ctx.needs_input_grad[3:])
        gradients = RelationKlBackward.apply(
            ctx.columns, ctx.num_students, ctx.settings, needs, *ctx.saved_tensors[:3], upstream.contiguous(),
            *ctx.saved_tensors[3:],
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
        ctx.columns, ctx.num_students, ctx.settings, ctx.needed = columns, num_students, settings, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*statistics, upstream, *stages)
        return tuple(total)

    @staticmethod
    @last_derivative
    def backward(ctx, *cotangents):
        # Losses and log-sums are functions of the stages: their part of the derivative is in the stages' gradients.
        *statistics, upstream = ctx.saved_tensors[:4]
        stages, columns, num_students = ctx.saved_tensors[4:], ctx.columns, ctx.num_students
        tangents, moving = tangents_of(cotangents, ctx.needed)
        along = stages[:num_students], stages[num_students:], tangents, moving

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


_OP = Op(_results, _gradients)


def relation_kl(
    students: list[Tensor],
    teachers: list[Tensor],
    dtype: torch.dtype,
    temperature: float,
    bandwidth: float,
    product_precision: str,
    columns: Columns | None = None,
) -> Tensor:
    """Losses ``[B, S, T]`` of rows that are normalised in ``dtype``, against each other or against ``columns``; see the
    head of this file."""
    stages = [*students, *teachers]
    refuse_forward_mode(stages)
    settings = temperature, bandwidth, product_precision
    if columns is None:
        return on_unit_rows(_OP, stages, [], dtype, (len(students), *settings), kept.keeps(stages))
    return RelationKl.apply(columns, len(students), settings, *unit_rows(stages, dtype))
