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
    neighbor_bandwidths_stages(nodes, starts, neighbors, passes, product_precision) -> (bandwidths, inverse_variances)
        starts: σ of each stage, 0-dim, of the nodes' type; none: their adaptive bandwidths.  neighbors: below B − 1.
        σ and 1/σ² of each stage as ``gkd_fast._neighbors.search`` has them, [stages], 16 bytes apart.  Without
        gradient.
    neighbor_conv_stages(nodes, messages, inverse_variances, normalization, product_precision) -> (outputs, log_sums)
    neighbor_conv_stages_backward(upstream, nodes, messages, outputs, log_sums, inverse_variances, normalization,
               product_precision, needs) -> gradients
        As ``neighbor_conv`` with the log-sums that it takes, and ``neighbor_conv_gradients``; all of the nodes' type
        but the float64 sums.

Triton kernels alone implement them. Second derivatives are those of the stages' own ``graph_conv``, ``neighbor_conv``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.ops.autograd import PT2, asked_for, needed_like, refuse_derivative, refuse_forward_mode, saveable, scatter
from gkd_fast.ops.backends import implementation, kept_by
from gkd_fast.ops.graph_conv import gradients_of as gradients_of_graph_conv
from gkd_fast.ops.neighbor_conv import gradients_of as gradients_of_neighbor_conv
from gkd_fast.ops.unit_rows import row_gradients, unit_rows_and_norms

torch.library.define(
    "gkd_fast::graph_inverse_variances", "(Tensor[] nodes, float share, float least) -> Tensor", tags=PT2
)
torch.library.define(
    "gkd_fast::neighbor_bandwidths_stages",
    "(Tensor[] nodes, Tensor[] starts, float neighbors, int passes, str product_precision) -> (Tensor, Tensor)",
    tags=PT2,
)
for _op, _sums in (("graph_conv_stages", "degrees"), ("neighbor_conv_stages", "log_sums")):
    torch.library.define(
        f"gkd_fast::{_op}",
        "(Tensor[] nodes, Tensor[] messages, Tensor inverse_variances, str normalization, str product_precision) "
        "-> (Tensor[], Tensor[])",
        tags=PT2,
    )
    torch.library.define(
        f"gkd_fast::{_op}_backward",
        f"(Tensor[] upstream, Tensor[] nodes, Tensor[] messages, Tensor[] outputs, Tensor[] {_sums}, "
        "Tensor inverse_variances, str normalization, str product_precision, bool[] needs) -> Tensor[]",
        tags=PT2,
    )


@torch.library.register_fake("gkd_fast::graph_inverse_variances")
def _(nodes, share, least):
    return nodes[0].new_empty(len(nodes))


@torch.library.register_fake("gkd_fast::graph_conv_stages")
def _(nodes, messages, inverse_variances, normalization, product_precision):
    return [nodes[0].new_empty(x.shape) for x in messages], [x.new_empty(x.shape[0]) for x in nodes]


@torch.library.register_fake("gkd_fast::neighbor_bandwidths_stages")
def _(nodes, starts, neighbors, passes, product_precision):
    apart = len(nodes), 16 // nodes[0].element_size()
    return nodes[0].new_empty(apart)[:, 0], nodes[0].new_empty(apart)[:, 0]


@torch.library.register_fake("gkd_fast::neighbor_conv_stages")
def _(nodes, messages, inverse_variances, normalization, product_precision):
    log_sums = [x.new_empty(x.shape[0], dtype=torch.float64) for x in nodes]
    return [x.new_empty(x.shape) for x in messages], log_sums


@torch.library.register_fake("gkd_fast::graph_conv_stages_backward")
@torch.library.register_fake("gkd_fast::neighbor_conv_stages_backward")
def _(upstream, nodes, messages, outputs, sums, inverse_variances, normalization, product_precision, needs):
    return [nodes[0].new_empty(x.shape) for x in needed_like((*nodes, *messages), needs)]


OPS = (
    "graph_inverse_variances", "graph_conv_stages", "graph_conv_stages_backward", "neighbor_bandwidths_stages",
    "neighbor_conv_stages", "neighbor_conv_stages_backward",
)  # fmt: skip
for _op in OPS:
    refuse_derivative(f"gkd_fast::{_op}")

# Of a stage alone.
_GRADIENTS_OF = {"graph_conv_stages": gradients_of_graph_conv, "neighbor_conv_stages": gradients_of_neighbor_conv}


class UnitStages:
    """The unit rows of a call's stages in ``dtype``, without gradient, and what has the ops of all that is made of them
    and of ``messages``."""

    def __init__(self, nodes: Sequence[Tensor], messages: Sequence[Tensor], dtype: torch.dtype):
        self.ops = implementation((*nodes, *messages))
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            self.rows, self.inverse_norms = self.ops.unit_rows(nodes, dtype)

    def bandwidths(
        self, starts: Sequence[Tensor], neighbors: float, passes: int, product_precision: str
    ) -> tuple[Tensor, Tensor]:
        """``neighbor_bandwidths_stages``."""
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return self.ops.neighbor_bandwidths_stages(self.rows, starts, neighbors, passes, product_precision)


class GraphConvStages(torch.autograd.Function):
    """``op`` of nodes, the first ``count`` tensors, and messages, the others.

    settings: [stages] variances, or the numbers that ``graph_inverse_variances`` takes; normalization, precision; the
    own message's share ρ of the outputs, or None; the unit rows, where they are made.
    """

    @staticmethod
    def forward(ctx, op: str, count: int, dtype: torch.dtype, settings: tuple, *tensors: Tensor):
        variances, *settings, own_share, units = settings
        nodes, messages = tensors[:count], tensors[count:]
        units = units or UnitStages(nodes, messages, dtype)
        ops, unit, inverse_norms = units.ops, units.rows, units.inverse_norms
        with torch._C._AutoDispatchBelowAutograd():
            if not isinstance(variances, Tensor):
                variances = ops.graph_inverse_variances(unit, *variances)
            # Beside an own message the sum of its two gradients is rounded once.
            values = messages if own_share is None else _in_type(messages, dtype)
            outputs, sums = getattr(ops, op)(unit, values, variances, *settings)
            # The caller may change in place what it gets: never what the gradients read.
            if own_share is None:
                found = _copies(outputs, messages[0].dtype)
            else:
                found = _in_type(torch._foreach_lerp(outputs, values, own_share), messages[0].dtype)
        needs = ctx.needs_input_grad[4:]
        if True in needs:
            ctx.op, ctx.count, ctx.dtype, ctx.settings, ctx.own_share = op, count, dtype, settings, own_share
            ctx.dtypes = [x.dtype for x in nodes]
            # Of frozen nodes the unit rows are enough.
            raw = [x if needed else None for x, needed in zip(nodes, needs)]
            ctx.prepared, prepared = kept_by(ops)
            ctx.save_for_backward(variances, *raw, *messages, *unit, *inverse_norms, *outputs, *sums, *prepared)
        return tuple(found)

    @staticmethod
    def backward(ctx, *upstream):
        count, needs = ctx.count, asked_for(ctx, 4)
        variances, *saved = ctx.saved_tensors
        nodes, messages, unit, inverse_norms, outputs, sums = (
            saved[k * count : (k + 1) * count] for k in range(6)
        )  # fmt: skip
        upstream = [g.contiguous() for g in upstream]
        if torch.is_grad_enabled():
            own = nodes, messages, unit, inverse_norms, outputs, sums
            of_nodes, of_messages = _differentiable(ctx, upstream, own, variances, needs)
        else:
            ops, share, values = implementation(unit, (ctx.prepared, saved[6 * count :])), ctx.own_share, messages
            with torch._C._AutoDispatchBelowAutograd():
                if share is not None:
                    values, given = _in_type(messages, ctx.dtype), _in_type(upstream, ctx.dtype)
                    upstream = torch._foreach_mul(given, 1 - share)
                found = getattr(ops, f"{ctx.op}_backward")(
                    upstream, unit, values, outputs, sums, variances, *ctx.settings, needs
                )
                moved = sum(needs[:count])
                of_messages = found[moved:]
                if share is not None and of_messages:
                    own = [g for g, needed in zip(given, needs[count:]) if needed]
                    of_messages = torch._foreach_add(of_messages, own, alpha=share)
                of_nodes = scatter(found[:moved], needs[:count])
                of_messages = scatter(_in_type(of_messages, messages[0].dtype), needs[count:])
                of_nodes = row_gradients(of_nodes, unit, inverse_norms, ctx.dtypes, ops=ops)
        return None, None, None, None, *of_nodes, *of_messages


def _differentiable(ctx, upstream, own, variances, needs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of nodes and messages with a derivative: those of each stage's own op."""
    nodes, messages, unit, inverse_norms, outputs, sums = own
    count = len(nodes)
    live = [k for k, x in enumerate(nodes) if x is not None]
    again = unit_rows_and_norms([nodes[k] for k in live], ctx.dtype) if live else ([], [])
    for k, e, inverse in zip(live, *again, strict=True):
        unit[k], inverse_norms[k] = e, inverse
    gradients: list[Tensor | None] = [None] * (2 * count)
    for k, variance in enumerate(variances):
        of_stage, g = slice(k, None, count), upstream[k].to(ctx.dtype)
        inputs, results = (unit[k], messages[k].to(ctx.dtype)), (outputs[k].detach(), sums[k])
        of_graph = g if ctx.own_share is None else g * (1 - ctx.own_share)
        of_node, of_message = _GRADIENTS_OF[ctx.op](
            torch.ops.gkd_fast, of_graph, inputs, results, (variance, *ctx.settings), needs[of_stage]
        )
        if ctx.own_share is not None and of_message is not None:
            of_message = of_message + g * ctx.own_share
        gradients[of_stage] = of_node, of_message
    of_nodes = row_gradients(gradients[:count], unit, inverse_norms, ctx.dtypes)
    return of_nodes, [x if x is None else x.to(h.dtype) for x, h in zip(gradients[count:], messages)]


def graph_conv_stages(
    nodes: Sequence[Tensor],
    messages: Sequence[Tensor],
    dtype: torch.dtype,
    variances: Tensor | tuple[float, float],
    normalization: str,
    product_precision: str,
    self_weight: float | None = None,
    units: UnitStages | None = None,
) -> list[Tensor]:
    """The convolutions ``[B, K]`` of all stages, in the messages' type; see the head. With a ``self_weight`` the graphs
    are over the others, of which there are some. units: of these nodes and messages, where they are made."""
    refuse_forward_mode((*nodes, *messages))
    settings = variances, normalization, product_precision, self_weight, units
    own = [x.dtype for x in messages]
    if len(set(own)) > 1:  # which autocast allows
        messages = [x.to(dtype) for x in messages]
    messages = [saveable(x) for x in messages]
    op = "graph_conv_stages" if self_weight is None else "neighbor_conv_stages"
    outputs = GraphConvStages.apply(op, len(nodes), dtype, settings, *nodes, *messages)
    return [x if x.dtype == t else x.to(t) for x, t in zip(outputs, own, strict=True)]


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Copies in ``dtype``, all in one go."""
    copies = [x.new_empty(x.shape, dtype=dtype) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _in_type(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    return tensors if not tensors or tensors[0].dtype == dtype else _copies(tensors, dtype)
