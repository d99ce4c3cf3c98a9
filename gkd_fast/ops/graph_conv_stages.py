"""graph_conv of all stages at once: what several stages' graph_conv would cost apart, the host pays once.

    graph_inverse_variances(nodes, share, least) -> inverse_variances [stages]
        nodes: unit rows [B, D_k].  1/σ² of each stage, σ² = share · mean over i ≠ j of (1 − c_ij), at least least²; 1
        for a single row.  Without gradient.
    graph_conv_stages(nodes, messages, inverse_variances, normalization, product_precision) -> (outputs, degrees)
    graph_conv_stages_backward(upstream, nodes, messages, outputs, degrees, inverse_variances, normalization,
               product_precision, needs) -> gradients
        As ``graph_conv``'s, a tensor of each stage in the place of each tensor; stages may differ in width.  needs: of
        the nodes, then of the messages.  Messages and upstream may be of shorter types than the nodes; outputs and
        gradients are of the nodes' type.

Triton kernels alone implement them. Second derivatives are those of the stages' own ``graph_conv``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.ops.autograd import PT2, asked_for, needed_like, refuse_derivative, refuse_forward_mode, saveable, scatter
from gkd_fast.ops.backends import implementation, kept_by
from gkd_fast.ops.graph_conv import gradients_of
from gkd_fast.ops.unit_rows import row_gradients, unit_rows_and_norms

torch.library.define(
    "gkd_fast::graph_inverse_variances", "(Tensor[] nodes, float share, float least) -> Tensor", tags=PT2
)
torch.library.define(
    "gkd_fast::graph_conv_stages",
    "(Tensor[] nodes, Tensor[] messages, Tensor inverse_variances, str normalization, str product_precision) "
    "-> (Tensor[], Tensor[])",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::graph_conv_stages_backward",
    "(Tensor[] upstream, Tensor[] nodes, Tensor[] messages, Tensor[] outputs, Tensor[] degrees, "
    "Tensor inverse_variances, str normalization, str product_precision, bool[] needs) -> Tensor[]",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::graph_inverse_variances")
def _(nodes, share, least):
    return nodes[0].new_empty(len(nodes))


@torch.library.register_fake("gkd_fast::graph_conv_stages")
def _(nodes, messages, inverse_variances, normalization, product_precision):
    return [nodes[0].new_empty(x.shape) for x in messages], [x.new_empty(x.shape[0]) for x in nodes]


@torch.library.register_fake("gkd_fast::graph_conv_stages_backward")
def _(upstream, nodes, messages, outputs, degrees, inverse_variances, normalization, product_precision, needs):
    return [nodes[0].new_empty(x.shape) for x in needed_like((*nodes, *messages), needs)]


for _op in ("inverse_variances", "conv_stages", "conv_stages_backward"):
    refuse_derivative(f"gkd_fast::graph_{_op}")


class GraphConvStages(torch.autograd.Function):
    """The first ``count`` tensors are the nodes, the others the messages.

    settings: [stages] variances, or the numbers that ``graph_inverse_variances`` takes; normalization, precision.
    """

    @staticmethod
    def forward(ctx, count: int, dtype: torch.dtype, settings: tuple, *tensors: Tensor):
        variances, *settings = settings
        nodes, messages = tensors[:count], tensors[count:]
        ops = implementation(tensors)
        with torch._C._AutoDispatchBelowAutograd():
            unit, inverse_norms = ops.unit_rows(nodes, dtype)
            if not isinstance(variances, Tensor):
                variances = ops.graph_inverse_variances(unit, *variances)
            outputs, degrees = ops.graph_conv_stages(unit, messages, variances, *settings)
            # The caller may change in place what it gets: never what the gradients read.
            found = _copies(outputs, messages[0].dtype)
        needs = ctx.needs_input_grad[3:]
        if True in needs:
            ctx.count, ctx.dtype, ctx.settings = count, dtype, settings
            ctx.dtypes = [x.dtype for x in nodes]
            # Of frozen nodes the unit rows are enough.
            raw = [x if needed else None for x, needed in zip(nodes, needs)]
            ctx.prepared, prepared = kept_by(ops)
            ctx.save_for_backward(variances, *raw, *messages, *unit, *inverse_norms, *outputs, *degrees, *prepared)
        return tuple(found)

    @staticmethod
    def backward(ctx, *upstream):
        count, needs = ctx.count, asked_for(ctx, 3)
        variances, *saved = ctx.saved_tensors
        nodes, messages, unit, inverse_norms, outputs, degrees = (
            saved[k * count : (k + 1) * count] for k in range(6)
        )  # fmt: skip
        upstream = [g.contiguous() for g in upstream]
        if torch.is_grad_enabled():
            own = nodes, messages, unit, inverse_norms, outputs, degrees
            of_nodes, of_messages = _differentiable(ctx, upstream, own, variances, needs)
        else:
            ops = implementation(unit, (ctx.prepared, saved[6 * count :]))
            with torch._C._AutoDispatchBelowAutograd():
                found = ops.graph_conv_stages_backward(
                    upstream, unit, messages, outputs, degrees, variances, *ctx.settings, needs
                )
                moved = sum(needs[:count])
                of_nodes = scatter(found[:moved], needs[:count])
                of_messages = scatter(_in_type(found[moved:], messages[0].dtype), needs[count:])
                of_nodes = row_gradients(of_nodes, unit, inverse_norms, ctx.dtypes, ops=ops)
        return None, None, None, *of_nodes, *of_messages


def _differentiable(ctx, upstream, own, variances, needs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of nodes and messages with a derivative: those of each stage's ``graph_conv``."""
    nodes, messages, unit, inverse_norms, outputs, degrees = own
    count = len(nodes)
    live = [k for k, x in enumerate(nodes) if x is not None]
    again = unit_rows_and_norms([nodes[k] for k in live], ctx.dtype) if live else ([], [])
    for k, e, inverse in zip(live, *again, strict=True):
        unit[k], inverse_norms[k] = e, inverse
    gradients: list[Tensor | None] = [None] * (2 * count)
    for k, variance in enumerate(variances):
        of_stage = slice(k, None, count)
        inputs, results = (unit[k], messages[k].to(ctx.dtype)), (outputs[k].detach(), degrees[k])
        gradients[of_stage] = gradients_of(
            torch.ops.gkd_fast, upstream[k].to(ctx.dtype), inputs, results, (variance, *ctx.settings), needs[of_stage]
        )
    of_nodes = row_gradients(gradients[:count], unit, inverse_norms, ctx.dtypes)
    return of_nodes, [x if x is None else x.to(h.dtype) for x, h in zip(gradients[count:], messages)]


def graph_conv_stages(
    nodes: Sequence[Tensor],
    messages: Sequence[Tensor],
    dtype: torch.dtype,
    variances: Tensor | tuple[float, float],
    normalization: str,
    product_precision: str,
) -> list[Tensor]:
    """The convolutions ``[B, K]`` of all stages, in the messages' type; see the head."""
    refuse_forward_mode((*nodes, *messages))
    settings = variances, normalization, product_precision
    own = [x.dtype for x in messages]
    if len(set(own)) > 1:  # which autocast allows
        messages = [x.to(dtype) for x in messages]
    outputs = GraphConvStages.apply(len(nodes), dtype, settings, *nodes, *[saveable(x) for x in messages])
    return [x if x.dtype == t else x.to(t) for x, t in zip(outputs, own, strict=True)]


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Copies in ``dtype``, all in one go."""
    copies = [x.new_empty(x.shape, dtype=dtype) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _in_type(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    return tensors if not tensors or tensors[0].dtype == dtype else _copies(tensors, dtype)
