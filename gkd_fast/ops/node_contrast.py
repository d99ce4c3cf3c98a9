"""node_contrast: −log softmax_j(s_i·t_j/τ) at the own column, for the wanted stage pairs.

    node_contrast(students, teachers, wanted, temperature, product_precision, keep_weighted, teacher_columns=None,
                  offset=0) -> (losses, log_sums, weighted)
        students: S unit-row tensors [I, D].  teachers: T of them, [I, D].  float32 or float64, contiguous.
        wanted: S·T bools, pair (s, t) at s·T + t; the P wanted pairs keep that order below.
        product_precision: type of the tile products (``gkd_fast.ops``).
        keep_weighted: also return the weighted sums, which spare the students' gradient its product.
        teacher_columns: the column set, T tensors [J, D]; None: columns = the teachers' rows.
        offset: row i's own column is i + offset; where the own ones are none of the columns (part of a larger set),
        their terms are left out.
        losses: [I, S, T], 0 for pairs not wanted.  log_sums: log Σ_j exp(s_i·t_j/τ), [P, I], in float64: they are of
        the size 1/τ, and rounded to float32 they would move every P by the factor 1 ± ε/τ.
        weighted: W_i = Σ_j P_ij t_j, [P, I, D], or [0] if not kept.
    node_contrast_backward(upstream, students, teachers, log_sums, weighted, wanted, temperature, product_precision,
                  needs, teacher_columns=None, student_columns=None, offset=0, column_upstream=None,
                  column_log_sums=None) -> gradients
        upstream: gradient of the losses, [I, S, T].
        needs: S + T bools, students first: which gradients are wanted; only those come back, in that order.
        A student's gradient reads the teachers' column set and the rows' own upstream and log_sums:
            dS_i = (g_i/τ)(W_i − t_own).
        A teacher's gradient reads the students of all columns, student_columns [J, D], column_upstream [J, S, T]
        (None: zero) and column_log_sums [P, J]:  dT_i = (1/τ)(Σ_j g_j P_ji s_j − g_own s_own).
        gradients: of the ROW set, complete, [I, D] in the unit rows' type.

Second order. Along directions ṡ, ṫ of the stages, ċ_ij = ṡ_i·t_j + s_i·ṫ_j and z_i the log-sums:
ż_i = (1/τ) Σ_j P_ij ċ_ij,  P˙_ij = P_ij (ċ_ij/τ − ż_i).  The derivative of the gradients contracted with cotangents is
their tangent along these cotangents, because second derivatives are symmetric; so the gradient of the upstream is the
tangent of the losses.

    node_contrast_tangent(students, teachers, tangents, moving, log_sums, weighted, wanted, temperature,
                  product_precision, teacher_columns=None, teacher_column_tangents=None, offset=0)
                  -> (loss_tangents, log_sum_tangents)
        moving: S + T bools, students first: which stages have a direction; the others stand still.
        tangents: the directions of the moving stages, [I, D].
        teacher_column_tangents: those of the moving teachers' columns, [J, D], with teacher_columns.
        The tangents of node_contrast's losses [I, S, T] and log_sums [P, I], in their types:  ℓ̇_i = ż_i − ċ_own/τ.
    node_contrast_double_backward(upstream, students, teachers, tangents, moving, log_sums, weighted,
                  log_sum_tangents, wanted, temperature, product_precision, needs, teacher_columns=None,
                  student_columns=None, teacher_column_tangents=None, student_column_tangents=None, offset=0,
                  column_upstream=None, column_log_sums=None, column_log_sum_tangents=None) -> gradients
        The tangents of node_contrast_backward's gradients at a fixed upstream: those that ``needs`` (as there) asks
        for, of the ROW set, complete.  column_*: as there; student_column_tangents: of the moving students' columns.
            dṠ_i = (g_i/τ)(Σ_j (P˙_ij t_j + P_ij ṫ_j) − ṫ_own)
            dṪ_i = (1/τ)(Σ_j g_j (P˙_ji s_j + P_ji ṡ_j) − g_own ṡ_own)
"""

import torch
from torch import Tensor

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
    second_order_precision,
    tangents_of,
)  # fmt: skip
from gkd_fast.ops.columns import Columns
from gkd_fast.ops.joined import Call, Op, on_unit_rows
from gkd_fast.ops.node_contrast_columns import NodeContrast
from gkd_fast.ops.unit_rows import unit_rows

# Weighted sums up to this size are kept for the backward pass; beyond it they are recomputed there.
KEEP_WEIGHTED_BYTES = 256 * 2**20
# On a GPU wider rows go in strips, and gradients that are wanted on both sides come from the same strip of weights:
# keeping spares no product. By the type of products; those of float64 rows are float64's.
WIDEST_TILES = {"float64": 64, "float32": 128, "tf32": 128, "bfloat16": 256, "float16": 256}
# Batches of at most so many rows, at most so wide, have kernels without strips.
SMALL_BATCH, SMALL_WIDTH = 256, 1024

torch.library.define(
    "gkd_fast::node_contrast",
    "(Tensor[] students, Tensor[] teachers, bool[] wanted, float temperature, str product_precision, "
    "bool keep_weighted, Tensor[]? teacher_columns=None, int offset=0) -> (Tensor, Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::node_contrast_backward",
    "(Tensor upstream, Tensor[] students, Tensor[] teachers, Tensor log_sums, Tensor weighted, bool[] wanted, "
    "float temperature, str product_precision, bool[] needs, Tensor[]? teacher_columns=None, "
    "Tensor[]? student_columns=None, int offset=0, Tensor? column_upstream=None, Tensor? column_log_sums=None) "
    "-> Tensor[]",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::node_contrast_tangent",
    "(Tensor[] students, Tensor[] teachers, Tensor[] tangents, bool[] moving, Tensor log_sums, Tensor weighted, "
    "bool[] wanted, float temperature, str product_precision, Tensor[]? teacher_columns=None, "
    "Tensor[]? teacher_column_tangents=None, int offset=0) -> (Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::node_contrast_double_backward",
    "(Tensor upstream, Tensor[] students, Tensor[] teachers, Tensor[] tangents, bool[] moving, Tensor log_sums, "
    "Tensor weighted, Tensor log_sum_tangents, bool[] wanted, float temperature, str product_precision, bool[] needs, "
    "Tensor[]? teacher_columns=None, Tensor[]? student_columns=None, Tensor[]? teacher_column_tangents=None, "
    "Tensor[]? student_column_tangents=None, int offset=0, Tensor? column_upstream=None, "
    "Tensor? column_log_sums=None, Tensor? column_log_sum_tangents=None) -> Tensor[]",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::node_contrast")
def _(students, teachers, wanted, temperature, product_precision, keep_weighted, teacher_columns=None, offset=0):
    x, pairs = students[0], sum(wanted)
    losses = x.new_empty(x.shape[0], len(students), len(teachers))
    weighted = x.new_empty(pairs, *x.shape) if keep_weighted else x.new_empty(0)
    return losses, x.new_empty(pairs, x.shape[0], dtype=torch.float64), weighted


@torch.library.register_fake("gkd_fast::node_contrast_backward")
def _(upstream, students, teachers, log_sums, weighted, wanted, temperature, product_precision, needs,
      *columns, **named_columns):  # fmt: skip
    return needed_like([*students, *teachers], needs)


@torch.library.register_fake("gkd_fast::node_contrast_tangent")
def _(students, teachers, tangents, moving, log_sums, *settings, **named_columns):
    x = students[0]
    return x.new_empty(x.shape[0], len(students), len(teachers)), torch.empty_like(log_sums)


@torch.library.register_fake("gkd_fast::node_contrast_double_backward")
def _(upstream, students, teachers, tangents, moving, log_sums, weighted, log_sum_tangents, wanted, temperature,
      product_precision, needs, *columns, **named_columns):  # fmt: skip
    return needed_like([*students, *teachers], needs)


def _setup_context(ctx, inputs, output):
    students, teachers, ctx.wanted, ctx.temperature, ctx.product_precision, _, teacher_columns, _ = inputs
    refuse_column_gradient("gkd_fast::node_contrast", "gkd_fast::node_contrast_backward", teacher_columns is not None)
    ctx.num_students = len(students)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*students, *teachers, *output[1:])


def _backward(ctx, upstream, *_):
    *stages, log_sums, weighted = ctx.saved_tensors
    needs = flags(ctx.needs_input_grad[0]) + flags(ctx.needs_input_grad[1])
    settings = ctx.num_students, ctx.wanted, ctx.temperature, ctx.product_precision
    results = None, log_sums, weighted
    gradients = _gradients(torch.ops.gkd_fast, upstream.contiguous(), stages, results, settings, needs)
    return gradients[: ctx.num_students], gradients[ctx.num_students :], *[None] * 6


def _results(ops, stages, settings, keep):
    num_students, *settings = settings
    return ops.node_contrast(stages[:num_students], stages[num_students:], *settings, keep)


def _gradients(ops, upstream, stages, results, settings, needs):
    num_students, *settings = settings
    gradients = ops.node_contrast_backward(
        upstream, stages[:num_students], stages[num_students:], *results[1:], *settings, needs
    )
    return scatter(gradients, needs)


register_autograd("gkd_fast::node_contrast", _backward, setup_context=_setup_context)


def _setup_double_context(ctx, inputs, output):
    upstream, students, teachers, log_sums, weighted, *ctx.settings, ctx.needed, teacher_columns, student_columns = (
        inputs[:11]
    )
    refuse_column_gradient(
        "gkd_fast::node_contrast_backward", "gkd_fast::node_contrast_double_backward",
        teacher_columns is not None or student_columns is not None,
    )  # fmt: skip
    ctx.num_students = len(students)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*students, *teachers, upstream, log_sums, weighted)


def _double_backward(ctx, cotangents):
    # Log-sums and weighted sums are functions of the stages: their part of the derivative is in the stages' gradients.
    *stages, upstream, log_sums, weighted = ctx.saved_tensors
    stages = stages[: ctx.num_students], stages[ctx.num_students :]
    tangents, moving = tangents_of(cotangents, ctx.needed)
    wanted, temperature, product_precision = ctx.settings
    precision = second_order_precision(product_precision, upstream)
    if precision != product_precision:
        forward = torch.ops.gkd_fast.node_contrast
        _, log_sums, weighted = forward(*stages, wanted, temperature, precision, weighted.numel() > 0)
    loss_tangents, log_sum_tangents = torch.ops.gkd_fast.node_contrast_tangent(
        *stages, tangents, moving, log_sums, weighted, *ctx.settings
    )
    needs_upstream, needs = ctx.needs_input_grad[0], flags(ctx.needs_input_grad[1]) + flags(ctx.needs_input_grad[2])
    gradients = []
    if any(needs):
        gradients = torch.ops.gkd_fast.node_contrast_double_backward(
            upstream, *stages, tangents, moving, log_sums, weighted, log_sum_tangents, *ctx.settings, needs
        )
    gradients = scatter(gradients, needs)
    students_gradients, teachers_gradients = gradients[: ctx.num_students], gradients[ctx.num_students :]
    return loss_tangents if needs_upstream else None, students_gradients, teachers_gradients, *[None] * 11


register_autograd("gkd_fast::node_contrast_backward", _double_backward, setup_context=_setup_double_context)
refuse_derivative("gkd_fast::node_contrast_tangent")
refuse_derivative("gkd_fast::node_contrast_double_backward")


_OP = Op(_results, _gradients, reads_output=False)


def node_contrast_call(
    students: list[Tensor],
    teachers: list[Tensor],
    dtype: torch.dtype,
    wanted: list[bool],
    temperature: float,
    product_precision: str,
    columns: Columns | None = None,
) -> Call:
    x = students[0]
    # All ranks must do the same.
    rows = x.shape[0] if columns is None else max(columns.shards.counts)
    in_strips = columns is None and x.is_cuda and _in_strips(*x.shape, dtype, product_precision)
    keep = (
        torch.is_grad_enabled()
        and True in [s.requires_grad for s in students]
        and not (in_strips and True in [t.requires_grad for t in teachers])
        and sum(wanted) * rows * x.shape[1] * dtype.itemsize <= KEEP_WEIGHTED_BYTES
    )
    return Call(_OP, (len(students), wanted, temperature, product_precision), keep)


def _in_strips(rows: int, width: int, dtype: torch.dtype, product_precision: str) -> bool:
    """Whether a GPU multiplies a batch that is its own column set in strips."""
    product = "float64" if dtype == torch.float64 else product_precision
    return width > WIDEST_TILES[product] and (rows > SMALL_BATCH or width > SMALL_WIDTH)


def node_contrast(
    students: list[Tensor],
    teachers: list[Tensor],
    dtype: torch.dtype,
    wanted: list[bool],
    temperature: float,
    product_precision: str,
    columns: Columns | None = None,
) -> Tensor:
    """Losses ``[B, S, T]`` of rows that are normalised in ``dtype``, against each other or against ``columns`` (the
    teachers' and, where these have a gradient, the students'); see the head of this file."""
    stages = [*students, *teachers]
    refuse_forward_mode(stages)
    settings = wanted, temperature, product_precision
    call = node_contrast_call(students, teachers, dtype, *settings, columns)
    if columns is None:
        return on_unit_rows([call], stages, [], dtype)[0]
    refuse_transforms("node_contrast over a bank")
    return NodeContrast.apply(columns, len(students), settings, call.keep, *unit_rows(stages, dtype))
