"""graph_conv of all stages at once: what several stages' graph_conv would cost apart, the host pays once.

    graph_inverse_variances(nodes, share, least) -> inverse_variances [stages]
        nodes: unit rows [B, D_k].  1/σ² of each stage, σ² = share · mean over i ≠ j of (1 − c_ij), at least least²; 1
        for a single row.  Without gradient.
    graph_conv_stages(nodes, messages, inverse_variances, normalization, product_precision) -> (outputs, degrees)
    graph_conv_stages_backward(upstream, nodes, messages, outputs, degrees, inverse_variances, normalization,
               product_precision, needs) -> gradients
        As ``graph_conv``'s, a tensor of each stage in the place of each tensor; stages may differ in width.  needs: of
        the nodes, then of the messages.

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
    return [x.new_empty(x.shape) for x in messages], [x.new_empty(x.shape[0]) for x in nodes]


@torch.library.register_fake("gkd_fast::graph_conv_stages_backward")
def _(upstream, nodes, messages, outputs, degrees, inverse_variances, normalization, product_precision, needs):
    return needed_like((*nodes, *messages), needs)


for _op in ("inverse_variances", "conv_stages", "conv_stages_backward"):
    refuse_derivative(f"gkd_fast::graph_{_op}")


class GraphConvStages(torch.autograd.Function):
    """The first ``count`` tensors are the nodes, the others the messages.

    settings: [stages] variances, or the numbers that ``graph_inverse_variances`` takes; normalization, precision.
    held: whether the caller, who may change them in place, gets these outputs.
    """

    @staticmethod
    def forward(ctx, count: int, dtype: torch.dtype, settings: tuple, held: bool, *tensors: Tensor):
        variances, *settings = settings
        nodes, messages = tensors[:count], tensors[count:]
        ops = implementation(tensors)
        with torch._C._AutoDispatchBelowAutograd():
            unit, inverse_norms = ops.unit_rows(nodes, dtype)
            if not isinstance(variances, Tensor):
                variances = ops.graph_inverse_variances(unit, *variances)
            outputs, degrees = ops.graph_conv_stages(unit, messages, variances, *settings)
            if not any(ctx.needs_input_grad):
                return tuple(outputs)
            kept = _copies(outputs) if held else outputs
        ctx.count, ctx.dtype, ctx.settings = count, dtype, settings
        ctx.dtypes = [x.dtype for x in nodes]
        # Of frozen nodes the unit rows are enough.
        raw = [x if needed else None for x, needed in zip(nodes, ctx.needs_input_grad[4:])]
        ctx.prepared, prepared = kept_by(ops)
        ctx.save_for_backward(variances, *raw, *messages, *unit, *inverse_norms, *kept, *degrees, *prepared)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *upstream):
        count, needs = ctx.count, asked_for(ctx, 4)
        variances, *saved = ctx.saved_tensors
        nodes, messages, unit, inverse_norms, outputs, degrees = (
            saved[k * count : (k + 1) * count] for k in range(6)
        )  # fmt: skip
        upstream = [g.contiguous() for g in upstream]
        if torch.is_grad_enabled():
            live = [k for k, x in enumerate(nodes) if x is not None]
            again = unit_rows_and_norms([nodes[k] for k in live], ctx.dtype) if live else ([], [])
            for k, e, inverse in zip(live, *again, strict=True):
                unit[k], inverse_norms[k] = e, inverse
            gradients: list[Tensor | None] = [None] * (2 * count)
            for k, variance in enumerate(variances):
                of_stage = slice(k, None, count)
                results = outputs[k].detach(), degrees[k]
                gradients[of_stage] = gradients_of(
                    torch.ops.gkd_fast, upstream[k], (unit[k], messages[k]), results, (variance, *ctx.settings),
                    needs[of_stage],
                )  # fmt: skip
            of_nodes = row_gradients(gradients[:count], unit, inverse_norms, ctx.dtypes)
        else:
            ops = implementation(unit, (ctx.prepared, saved[6 * count :]))
            with torch._C._AutoDispatchBelowAutograd():
                found = ops.graph_conv_stages_backward(
                    upstream, unit, messages, outputs, degrees, variances, *ctx.settings, needs
                )
                gradients = scatter(found, needs)
                of_nodes = row_gradients(gradients[:count], unit, inverse_norms, ctx.dtypes, ops=ops)
        return *[None] * 4, *of_nodes, *gradients[count:]


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
    own = messages[0].dtype
    outputs = GraphConvStages.apply(
        len(nodes), dtype, (variances, normalization, product_precision), own == dtype, *nodes,
        *_in_type([saveable(x) for x in messages], dtype),
    )  # fmt: skip
    return list(_in_type(outputs, own))


def _copies(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies, of tensors of one shape in one go."""
    if len({x.shape for x in tensors}) == 1:
        return torch.stack(list(tensors)).unbind()
    return [x.clone() for x in tensors]


def _in_type(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """All in ``dtype``, those of one shape in one go."""
    if all(x.dtype == dtype for x in tensors):
        return tensors
    if len({(x.shape, x.dtype) for x in tensors}) == 1:
        return torch.stack(list(tensors)).to(dtype).unbind()
    return [x.to(dtype) for x in tensors]
