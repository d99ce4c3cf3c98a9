"""neighbor_conv: what the others of a graph say, Y_i = Σ_j≠i A_ij m_j.

x_ij = (e_i·e_j − 1)·v with v = 1/σ², l_i = log Σ_j≠i exp(x_ij), p_ij = exp(x_ij − l_i), and A_ij is

    p_ij                                  "row"
    p_ji                                  "column", the transpose of "row"
    exp(x_ij − (l_i + l_j)/2)             "symmetric", never above 1.

Log-sums are float64, taken relative to the rows' own maxima, so that a node whose neighbours are all far does not
underflow. They are inputs of all ops but the first, each side's own, so that what is summed over blocks of columns adds
up; no exponential of a log-sum stands alone, which might overflow. Columns are nodes; row i's own column, i + offset,
is left out. Without a column set (``column_nodes``) the columns are the rows and no ``column_…`` is given.

    neighbor_sums(nodes, inverse_variance, product_precision, column_nodes=None, offset=0)
               -> (log_sums, sharp_log_sums, means, sharp_means)
        nodes: unit rows [I, D], float32 or float64, contiguous.  inverse_variance: v, a 0-dim tensor of their type.
        column_nodes: [J, D].
        l_i(v), l_i(2v), Σ_j p_ij x_ij and Σ_j q_ij x_ij with q_ij = exp(2 x_ij − l_i(2v)): [I] each, float64; without
        another column −∞, −∞, 0 and 0.  Without gradient.
    neighbor_conv(nodes, messages, log_sums, inverse_variance, normalization, product_precision, column_nodes=None,
               column_messages=None, offset=0, column_log_sums=None) -> output
        messages: [I, K], of the nodes' type, contiguous.  log_sums: l, [I].  column_messages, column_log_sums: the
        columns', which with a column set are read instead of the rows' messages; "column" reads l of the columns alone,
        "row" of the rows alone.
        output: Y, [I, K].  Its derivative by the nodes is that of l too.
    neighbor_conv_keep(nodes, messages, inverse_variance, normalization, product_precision)
               -> (output, log_sums, affinities)
        Both where the columns are the rows.  affinities: their cosines, which spare the passes after the first the
        nodes' product, in an order of the kernels' own; [0] where they are not kept (``gkd_fast.ops.affinities``).
    neighbor_conv_backward(upstream, nodes, messages, log_sums, node_terms, inverse_variance, normalization,
               product_precision, column_nodes=None, column_messages=None, offset=0, column_upstream=None,
               column_log_sums=None, column_node_terms=None) -> nodes' gradient
        upstream: G, [I, K].  normalization: "row" or "symmetric".  node_terms: d, [I], functions of the row alone, see
        below.  With a column set the columns' own, where upstream and terms may be None: zero.  The gradient of the
        ROW set, complete, [I, D]:
        dE_i = Σ_j≠i v (A_ij G_i·m_j + A_ji G_j·m_i + p_ij d_i + p_ji d_j) e_j.
        The messages' gradient dM is Y of the upstream with the transposed normalization.
    neighbor_conv_terms(upstream, messages, output, messages_gradient, product_precision, column_upstream=None,
               column_messages=None) -> node terms
        d_i = −(G_i·Y_i + m_i·dM_i)/2 (symmetric), or without dM −G_i·Y_i (row), of G and m as the products of the op
        above with these columns round them: where a weight is 1, terms and products cancel, and 1/σ² times what
        differs in them would be left.
    neighbor_conv_gradients(upstream, nodes, messages, output, log_sums, inverse_variance, normalization,
               product_precision, needs, affinities=None) -> gradients
        What the ops above make of nodes and messages, in that order, those that ``needs`` asks for. In float64 node
        terms are divided by the Σ_j p_ij that the log-sums give, which are of the size v and rounded as such.

Second order: the tangents of the output and of both gradients along the gradients' cotangents, as in ``graph_conv``.
Along ė and ṁ:  ẋ_ij = v (ė_i·e_j + e_i·ė_j),  l˙_i = Σ_j p_ij ẋ_ij,  A˙_ij = A_ij (ẋ_ij − a˙_i − b˙_j) with (a˙, b˙) =
(l˙_i, 0) (row), (0, l˙_j) (column), (l˙_i/2, l˙_j/2) (symmetric).

    neighbor_sums_tangent(nodes, tangent, log_sums, inverse_variance, product_precision, column_nodes=None,
               column_tangent=None, offset=0) -> l˙ [I], of the nodes' type
    neighbor_conv_tangent(nodes, tangent, messages, messages_tangent, log_sums, log_sum_tangents, inverse_variance,
               normalization, product_precision, column_nodes=None, column_tangent=None, column_messages=None,
               column_messages_tangent=None, offset=0, column_log_sums=None, column_log_sum_tangents=None) -> [I, K]
        Σ_j (A˙_ij m_j + A_ij ṁ_j).  A direction that is None stands still; without one of the nodes
        log_sum_tangents are not read.
    neighbor_conv_double_backward(upstream, nodes, tangent, messages, messages_tangent, log_sums, log_sum_tangents,
               node_terms, node_term_tangents, inverse_variance, normalization, product_precision, column_nodes=None,
               column_tangent=None, column_messages=None, column_messages_tangent=None, offset=0,
               column_upstream=None, column_log_sums=None, column_log_sum_tangents=None, column_node_terms=None,
               column_node_term_tangents=None) -> tangent of the nodes' gradient
        With s_ij = G_i·m_j, ṡ_ij = G_i·ṁ_j, M_ij = v (A_ij s_ij + A_ji s_ji + p_ij d_i + p_ji d_j):
        Σ_j (M˙_ij e_j + M_ij ė_j), [I, D]; the upstream stands still. With a column set all column_* are needed.

CPUs have kernels of all ops of the first order (csrc/cpu/neighbor_conv.cpp). Ops without kernels of a device's own are
computed in strips of rows (``neighbor_conv_strips``).
"""

import torch
from torch import Tensor

from gkd_fast.ops import affinities as kept
from gkd_fast.ops import neighbor_conv_strips as strips
from gkd_fast.ops.autograd import (
    PT2,
    flags,
    needed_like,
    refuse_column_gradient,
    refuse_derivative,
    refuse_forward_mode,
    register_autograd,
    scatter,
)  # fmt: skip
from gkd_fast.ops.backends import has_kernels
from gkd_fast.ops.columns import Columns
from gkd_fast.ops.joined import Call, Op, on_unit_rows
from gkd_fast.ops.neighbor_conv_columns import NeighborConv, gradients_of_rows, second_order
from gkd_fast.ops.unit_rows import unit_rows

_SETTINGS = "Tensor inverse_variance, str normalization, str product_precision"
_SCHEMAS = {
    "neighbor_sums": "(Tensor nodes, Tensor inverse_variance, str product_precision, Tensor? column_nodes=None, "
    "int offset=0) -> (Tensor, Tensor, Tensor, Tensor)",
    "neighbor_conv": f"(Tensor nodes, Tensor messages, Tensor log_sums, {_SETTINGS}, Tensor? column_nodes=None, "
    "Tensor? column_messages=None, int offset=0, Tensor? column_log_sums=None) -> Tensor",
    "neighbor_conv_keep": f"(Tensor nodes, Tensor messages, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    "neighbor_conv_backward": "(Tensor upstream, Tensor nodes, Tensor messages, Tensor log_sums, Tensor node_terms, "
    f"{_SETTINGS}, Tensor? column_nodes=None, Tensor? column_messages=None, int offset=0, "
    "Tensor? column_upstream=None, Tensor? column_log_sums=None, Tensor? column_node_terms=None) -> Tensor",
    "neighbor_conv_terms": "(Tensor upstream, Tensor messages, Tensor output, Tensor? messages_gradient, "
    "str product_precision, Tensor? column_upstream=None, Tensor? column_messages=None) -> Tensor",
    "neighbor_conv_gradients": "(Tensor upstream, Tensor nodes, Tensor messages, Tensor output, Tensor log_sums, "
    f"{_SETTINGS}, bool[] needs, Tensor? affinities=None) -> Tensor[]",
    "neighbor_sums_tangent": "(Tensor nodes, Tensor tangent, Tensor log_sums, Tensor inverse_variance, "
    "str product_precision, Tensor? column_nodes=None, Tensor? column_tangent=None, int offset=0) -> Tensor",
    "neighbor_conv_tangent": "(Tensor nodes, Tensor? tangent, Tensor messages, Tensor? messages_tangent, "
    f"Tensor log_sums, Tensor? log_sum_tangents, {_SETTINGS}, Tensor? column_nodes=None, "
    "Tensor? column_tangent=None, Tensor? column_messages=None, Tensor? column_messages_tangent=None, int offset=0, "
    "Tensor? column_log_sums=None, Tensor? column_log_sum_tangents=None) -> Tensor",
    "neighbor_conv_double_backward": "(Tensor upstream, Tensor nodes, Tensor? tangent, Tensor messages, "
    "Tensor? messages_tangent, Tensor log_sums, Tensor? log_sum_tangents, Tensor node_terms, "
    f"Tensor node_term_tangents, {_SETTINGS}, Tensor? column_nodes=None, Tensor? column_tangent=None, "
    "Tensor? column_messages=None, Tensor? column_messages_tangent=None, int offset=0, Tensor? column_upstream=None, "
    "Tensor? column_log_sums=None, Tensor? column_log_sum_tangents=None, Tensor? column_node_terms=None, "
    "Tensor? column_node_term_tangents=None) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"gkd_fast::{_name}", _schema, tags=PT2)
    if _name not in ("neighbor_conv_keep", "neighbor_conv_gradients"):
        torch.library.impl(f"gkd_fast::{_name}", "CompositeExplicitAutograd", getattr(strips, _name))


@torch.library.register_fake("gkd_fast::neighbor_sums")
def _(nodes, *arguments, **named):
    sums = [nodes.new_empty(nodes.shape[0], dtype=torch.float64) for _ in range(4)]
    return sums[0], sums[1], sums[2], sums[3]


@torch.library.register_fake("gkd_fast::neighbor_conv")
def _(nodes, messages, *arguments, **named):
    return messages.new_empty(messages.shape)


@torch.library.register_fake("gkd_fast::neighbor_conv_keep")
def _(nodes, messages, *settings):
    log_sums = nodes.new_empty(nodes.shape[0], dtype=torch.float64)
    return messages.new_empty(messages.shape), log_sums, kept.like([nodes])


@torch.library.register_fake("gkd_fast::neighbor_conv_backward")
def _(upstream, nodes, *arguments, **named):
    return nodes.new_empty(nodes.shape)


@torch.library.register_fake("gkd_fast::neighbor_conv_terms")
def _(upstream, messages, *arguments, **named):
    return messages.new_empty(messages.shape[0])


@torch.library.register_fake("gkd_fast::neighbor_conv_gradients")
def _(upstream, nodes, messages, output, log_sums, inverse_variance, normalization, product_precision, needs,
      affinities=None):  # fmt: skip
    return needed_like((nodes, messages), needs)


@torch.library.register_fake("gkd_fast::neighbor_sums_tangent")
def _(nodes, *arguments, **named):
    return nodes.new_empty(nodes.shape[0])


@torch.library.register_fake("gkd_fast::neighbor_conv_tangent")
def _(nodes, tangent, messages, *arguments, **named):
    return messages.new_empty(messages.shape)


@torch.library.register_fake("gkd_fast::neighbor_conv_double_backward")
def _(upstream, nodes, *arguments, **named):
    return nodes.new_empty(nodes.shape)


def composed_gradients(
    upstream, nodes, messages, output, log_sums, inverse_variance, normalization, product_precision, needs,
    affinities=None,
):  # fmt: skip
    """``neighbor_conv_gradients`` by the ops above."""
    rows = upstream, nodes, messages, output, log_sums, inverse_variance
    gradients, _ = gradients_of_rows(None, rows, normalization, product_precision, needs)
    # Of an op, no result may be another's alias.
    return [x for x in gradients if x is not None]


torch.library.impl("gkd_fast::neighbor_conv_gradients", "CompositeExplicitAutograd", composed_gradients)


def _setup_context(ctx, inputs, output):
    nodes, messages, log_sums, inverse_variance, ctx.normalization, ctx.product_precision, column_nodes = inputs[:7]
    refuse_column_gradient("gkd_fast::neighbor_conv", "gkd_fast::neighbor_conv_backward", column_nodes is not None)
    if ctx.needs_input_grad[3]:
        raise NotImplementedError("neighbor_conv has no gradient with respect to the bandwidth")
    ctx.save_for_backward(nodes, messages, log_sums, inverse_variance, output)


def _backward(ctx, upstream):
    nodes, messages, log_sums, inverse_variance, output = ctx.saved_tensors
    needs = flags(ctx.needs_input_grad[:2])
    settings = inverse_variance, ctx.normalization, ctx.product_precision
    results = output.detach(), log_sums
    gradients = gradients_of(torch.ops.gkd_fast, upstream.contiguous(), (nodes, messages), results, settings, needs)
    return *gradients, *[None] * 8


register_autograd("gkd_fast::neighbor_conv", _backward, setup_context=_setup_context)


def _setup_double_context(ctx, inputs, output):
    *rows, ctx.normalization, ctx.product_precision, ctx.needed, _ = inputs
    ctx.set_materialize_grads(False)
    messages_gradient = scatter(output, ctx.needed)[1]
    if messages_gradient is not None:
        messages_gradient = messages_gradient.clone()  # The caller holds it.
    ctx.save_for_backward(*rows, messages_gradient)


def _double_backward(ctx, cotangents):
    nodes_tangent, messages_tangent = (x if x is None else x.contiguous() for x in scatter(cotangents, ctx.needed))
    saved = ctx.saved_tensors
    return *second_order(None, saved, ctx, nodes_tangent, messages_tangent, ctx.needs_input_grad[:3]), *[None] * 7


register_autograd("gkd_fast::neighbor_conv_gradients", _double_backward, setup_context=_setup_double_context)
for _name in _SCHEMAS:
    if _name not in ("neighbor_conv", "neighbor_conv_gradients"):
        refuse_derivative(f"gkd_fast::{_name}")


def _results(ops, inputs, settings, keep):
    (nodes, messages), (inverse_variance, _, product_precision) = inputs, settings
    if keep:
        return ops.neighbor_conv_keep(nodes, messages, *settings)
    log_sums = torch.ops.gkd_fast.neighbor_sums(nodes.detach(), inverse_variance, product_precision)[0]
    return torch.ops.gkd_fast.neighbor_conv(nodes, messages, log_sums, *settings), log_sums


def gradients_of(ops, upstream, inputs, results, settings, needs):
    output, log_sums, *affinities = results
    gradients = torch.ops.gkd_fast.neighbor_conv_gradients(
        upstream, *inputs, output, log_sums, *settings, needs, *affinities
    )
    return scatter(gradients, needs)


_OP = Op(_results, gradients_of)


def neighbor_conv(
    nodes: Tensor,
    messages: Tensor,
    dtype: torch.dtype,
    inverse_variance: Tensor,
    normalization: str,
    product_precision: str,
    columns: Columns | None = None,
) -> Tensor:
    """The messages ``[B, K]`` of each node's others: nodes that are normalised in ``dtype``, or ``columns``, nodes and
    messages; see the head. There is more than one node."""
    refuse_forward_mode((nodes, messages))
    messages = messages.to(dtype).contiguous()
    settings = inverse_variance, normalization, product_precision
    if columns is None:
        call = Call(_OP, settings, kept.keeps((nodes, messages)))
        return on_unit_rows([call], [nodes], [messages], dtype)[0]
    if not (columns.whole and has_kernels("neighbor_conv_terms", nodes.device)):
        # Node terms would not be of the rounded rows; and blocks are rounded about centres of their own: what a pair
        # has in common on two ranks would differ.
        settings = inverse_variance, normalization, "float32"
    return NeighborConv.apply(columns, *unit_rows([nodes], dtype), messages, *settings)
