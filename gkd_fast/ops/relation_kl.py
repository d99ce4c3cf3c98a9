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

import torch
from torch import Tensor

from gkd_fast.ops import affinities as kept
from gkd_fast.ops.autograd import (
    PT2,
    flags,
    needed_like,
    refuse_column_gradient,
    refuse_derivative,
    refuse_forward_mode,
    refuse_transforms,
    register_autograd,
    scatter,
    tangents_of,
)  # fmt: skip
from gkd_fast.ops.columns import Columns
from gkd_fast.ops.joined import Call, Op, on_unit_rows
from gkd_fast.ops.relation_kl_columns import RelationKl
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
    results = losses.detach(), student_log_sums, teacher_log_sums
    gradients = _gradients(torch.ops.gkd_fast, upstream.contiguous(), stages, results, settings, needs)
    return gradients[: ctx.num_students], gradients[ctx.num_students :], *[None] * 6


def _results(ops, stages, settings, keep):
    num_students, *settings = settings
    op = ops.relation_kl_keep if keep else ops.relation_kl
    return op(stages[:num_students], stages[num_students:], *settings)


def _gradients(ops, upstream, stages, results, settings, needs):
    num_students, *settings = settings
    losses, student_log_sums, teacher_log_sums, *affinities = results
    gradients = ops.relation_kl_backward(
        upstream, stages[:num_students], stages[num_students:], losses, student_log_sums, teacher_log_sums,
        *settings, needs, **({"affinities": affinities[0]} if affinities else {}),
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


_OP = Op(_results, _gradients)


def relation_kl_call(
    students: list[Tensor], teachers: list[Tensor], temperature: float, bandwidth: float, product_precision: str
) -> Call:
    keep = kept.keeps((*students, *teachers))
    return Call(_OP, (len(students), temperature, bandwidth, product_precision), keep)


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
        return on_unit_rows([relation_kl_call(students, teachers, *settings)], stages, [], dtype)[0]
    refuse_transforms("relation_kl over a bank")
    return RelationKl.apply(columns, len(students), settings, *unit_rows(stages, dtype))
