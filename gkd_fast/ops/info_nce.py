"""info_nce: the contrast of students with teachers and of teachers with students, of one product.

    info_nce(students, teachers, temperature, product_precision) -> (losses, log_sums)
        students, teachers: unit rows [B, D], float32 or float64, contiguous.
        With z_ij = s_i·t_j/τ:  losses: (log Σ_j exp z_ij + log Σ_j exp z_ji)/2 − z_ii, [B].
        log_sums: log Σ_j exp z_ij and log Σ_j exp z_ji, [2, B], in float64.
    info_nce_backward(upstream, students, teachers, log_sums, temperature, product_precision, needs) -> gradients
        upstream: g, the gradient of the losses, [B].  needs: two bools; only those gradients come back.
        dS_i = Σ_j w_ij t_j and dT_j = Σ_i w_ij s_i with P and P' the softmaxes by row and by column and
        w_ij = (g_i P_ij + g_j P'_ij)/2τ − [i = j] g_i/τ.

node_contrast is the one-sided form, and with a column set two of them are the whole: their products differ. The second
order is that of the two one-sided forms.
"""

import torch
from torch import Tensor

from gkd_fast.ops.autograd import (
    PT2,
    flags,
    needed_like,
    refuse_forward_mode,
    register_autograd,
    scatter,
    tangents_of,
)
from gkd_fast.ops.columns import Columns
from gkd_fast.ops.node_contrast import node_contrast
from gkd_fast.ops.node_contrast_columns import NodeContrast
from gkd_fast.ops.unit_rows import unit_rows

torch.library.define(
    "gkd_fast::info_nce",
    "(Tensor students, Tensor teachers, float temperature, str product_precision) -> (Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::info_nce_backward",
    "(Tensor upstream, Tensor students, Tensor teachers, Tensor log_sums, float temperature, str product_precision, "
    "bool[] needs) -> Tensor[]",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::info_nce")
def _(students, teachers, temperature, product_precision):
    count = students.shape[0]
    return students.new_empty(count), students.new_empty(2, count, dtype=torch.float64)


@torch.library.register_fake("gkd_fast::info_nce_backward")
def _(upstream, students, teachers, log_sums, temperature, product_precision, needs):
    return needed_like((students, teachers), needs)


def _setup_context(ctx, inputs, output):
    students, teachers, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(students, teachers, output[1])


def _backward(ctx, upstream, _):
    needs = flags(ctx.needs_input_grad[:2])
    gradients = torch.ops.gkd_fast.info_nce_backward(upstream.contiguous(), *ctx.saved_tensors, *ctx.settings, needs)
    return *scatter(gradients, needs), None, None


def _setup_double_context(ctx, inputs, output):
    upstream, students, teachers, log_sums, *ctx.settings, ctx.needed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(students, teachers, upstream, log_sums)


def _double_backward(ctx, cotangents):
    # The log-sums are functions of the rows: their part of the derivative is in the rows' gradients.
    students, teachers, upstream, log_sums = ctx.saved_tensors
    tangents, moving = tangents_of(cotangents, ctx.needed)
    needs_upstream, *needs = flags(ctx.needs_input_grad[:3])
    half = (upstream / 2)[:, None, None].contiguous()
    none = upstream.new_empty(0)
    loss_tangents: Tensor | None = None
    total: list[Tensor] | None = None
    for sides, z, backwards in (
        ((students, teachers), log_sums[:1], False),
        ((teachers, students), log_sums[1:], True),
    ):
        turn = reversed if backwards else iter
        moves, wanted = list(turn(moving)), list(turn(needs))
        along = ([sides[0]], [sides[1]], list(turn(tangents)), moves, z.contiguous(), none)
        moved = torch.ops.gkd_fast.node_contrast_tangent(*along, [True], *ctx.settings)
        part = moved[0].flatten() / 2
        loss_tangents = part if loss_tangents is None else loss_tangents + part
        if any(needs):
            gradients = torch.ops.gkd_fast.node_contrast_double_backward(
                half, *along, moved[1], [True], *ctx.settings, wanted
            )
            gradients = list(turn(gradients))
            total = gradients if total is None else [x + y for x, y in zip(total, gradients, strict=True)]
    return loss_tangents if needs_upstream else None, *scatter(total or [], needs), None, None, None, None


register_autograd("gkd_fast::info_nce", _backward, setup_context=_setup_context)
register_autograd("gkd_fast::info_nce_backward", _double_backward, setup_context=_setup_double_context)


def info_nce(students: Tensor, teachers: Tensor, temperature: float, scale: Tensor | None, precision: str) -> Tensor:
    """Losses ``[B]`` of rows in float32 or float64 that are normalised here; ``scale``: 1, as a function of what the
    temperature is a function of, by which the logits are multiplied."""
    refuse_forward_mode((students, teachers))
    s, t = unit_rows([students, teachers], students.dtype)
    return torch.ops.gkd_fast.info_nce(s if scale is None else s * scale, t, temperature, precision)[0]


def one_sided(
    students: Tensor,
    teachers: Tensor,
    temperature: float,
    scale: Tensor | None,
    precision: str,
    columns: Columns | None = None,
) -> Tensor:
    """The students' half of the losses, ``[B]``, against the teachers or ``columns`` (the teachers' and, where these
    have a gradient, the students')."""
    if scale is None:
        losses = node_contrast([students], [teachers], students.dtype, [True], temperature, precision, columns)
        return losses.flatten()
    refuse_forward_mode((students, teachers))
    s, t = unit_rows([students, teachers], students.dtype)
    settings = [True], temperature, precision
    if columns is None:
        return torch.ops.gkd_fast.node_contrast([s * scale], [t], *settings, False)[0].flatten()
    return NodeContrast.apply(columns, 1, settings, False, s * scale, t).flatten()
