"""rkd_angle: differences of the angles between all triples of rows of two graphs with the same nodes.

    rkd_angle(students, teachers) -> sums
        students, teachers: rows [B, D_s] and [B, D_t], float32 or float64, contiguous; multiplied in their own type.
        sums: Σ_jk ρ(cos^s_ijk − cos^t_ijk), [B] in float64, ρ Huber's function and cos_ijk the cosine of the angle at i
        between j and k, 0 where one of them lies at i.
    rkd_angle_backward(upstream, students, teachers, needs) -> gradients
        upstream: gradient of the sums, [B], in the rows' type.  needs: two bools; only those gradients come back.

    batched_rkd_angle(students, teachers, counts) -> sums
    batched_rkd_angle_backward(upstream, students, teachers, needs, counts) -> gradients
        The same of many graphs, one per sample: rows [G, B, D], of which the first counts[g] ([G], int64) of graph g
        are its own and the others nothing, with results of 0; sums and upstream [G, B].

There is no second order.
"""

import torch
from torch import Tensor

from gkd_fast.ops.autograd import PT2, flags, needed_like, refuse_forward_mode, register_autograd, scatter

torch.library.define("gkd_fast::rkd_angle", "(Tensor students, Tensor teachers) -> Tensor", tags=PT2)
torch.library.define(
    "gkd_fast::rkd_angle_backward",
    "(Tensor upstream, Tensor students, Tensor teachers, bool[] needs) -> Tensor[]",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::batched_rkd_angle", "(Tensor students, Tensor teachers, Tensor counts) -> Tensor", tags=PT2
)
torch.library.define(
    "gkd_fast::batched_rkd_angle_backward",
    "(Tensor upstream, Tensor students, Tensor teachers, bool[] needs, Tensor counts) -> Tensor[]",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::rkd_angle")
@torch.library.register_fake("gkd_fast::batched_rkd_angle")
def _(students, teachers, counts=None):
    return students.new_empty(students.shape[:-1], dtype=torch.float64)


@torch.library.register_fake("gkd_fast::rkd_angle_backward")
@torch.library.register_fake("gkd_fast::batched_rkd_angle_backward")
def _(upstream, students, teachers, needs, counts=None):
    return needed_like((students, teachers), needs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, upstream):
    students, teachers, *counts = ctx.saved_tensors
    needs = flags(ctx.needs_input_grad[:2])
    op = torch.ops.gkd_fast.batched_rkd_angle_backward if counts else torch.ops.gkd_fast.rkd_angle_backward
    own = upstream.to(students.dtype).contiguous()
    return *scatter(op(own, students, teachers, needs, *counts), needs), *[None] * len(counts)


def _refuse(ctx, *cotangents):
    raise NotImplementedError(
        'rkd_angle has first derivatives alone on the fused backends; use backend="reference", which is differentiable '
        "any number of times"
    )


for _name in ("rkd_angle", "batched_rkd_angle"):
    register_autograd(f"gkd_fast::{_name}", _backward, setup_context=_setup_context)
    register_autograd(f"gkd_fast::{_name}_backward", _refuse)


def rkd_angle(students: Tensor, teachers: Tensor, counts: Tensor | None = None) -> Tensor:
    """The sums ``[B]`` in float64, with ``counts`` those of many graphs, ``[G, B]``; see the head of this file."""
    refuse_forward_mode((students, teachers))
    rows = students.contiguous(), teachers.contiguous()
    if counts is None:
        return torch.ops.gkd_fast.rkd_angle(*rows)
    return torch.ops.gkd_fast.batched_rkd_angle(*rows, counts)
