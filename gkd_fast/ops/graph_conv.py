"""graph_conv: the normalised adjacency of the nodes times the messages.

K_ij = exp((e_i·e_j − 1)·v) with v = 1/σ², K_ii = 1, degrees = row sums of K.

    graph_degrees(nodes, inverse_variance, product_precision, column_nodes=None, offset=0) -> degrees
        nodes: unit rows [I, D], float32 or float64, contiguous.  inverse_variance: v, a 0-dim tensor of their type.
        column_nodes: the column set [J, D]; None: columns = rows.  offset: row i's own column is i + offset.
        degrees: [I].  Without gradient.
    graph_conv(nodes, messages, inverse_variance, normalization, product_precision, column_nodes=None,
               column_messages=None, offset=0, degrees=None, column_degrees=None) -> (output, degrees)
        messages: [I, K], of the nodes' type, contiguous.  normalization: "symmetric" or "row".
        column_nodes [J, D], column_messages [J, K]: the column set, both or none.
        degrees [I], column_degrees [J]: needed for "symmetric" with a column set (``graph_degrees``), else computed.
        output: [I, K].  degrees: [I].
    graph_conv_keep(nodes, messages, inverse_variance, normalization, product_precision)
               -> (output, degrees, affinities)
        The same where the columns are the rows.  affinities: K for the backward op, which then does not multiply the
        nodes again, in an order of the kernels' own; [0] where it is not kept (``gkd_fast.ops.affinities``).
    graph_conv_backward(upstream, nodes, messages, output, degrees, inverse_variance, normalization,
               product_precision, needs, column_nodes=None, column_messages=None, offset=0, column_upstream=None,
               column_degrees=None, node_terms=None, column_node_terms=None, affinities=None) -> gradients
        upstream: gradient of the output, [I, K].  needs: two bools, for nodes and messages; only the wanted
        gradients come back, in that order, of the ROW set, complete.
        With a column set: column_upstream [J, K] (None: zero) and column_degrees [J], the columns' own; and for
        the nodes' gradient also node_terms [I] and column_node_terms [J] (None: zero), the functions of the row
        alone that ``graph_conv_columns.node_terms`` gives (for "symmetric" it reads the messages' gradient, so that
        one is asked for first).

row: Y_i = Σ_j K_ij H_j/deg_i.  symmetric: r = deg^-1/2, Y = r ⊙ K (r ⊙ H).  With G' = G/deg, H' = H (row) or
G' = r ⊙ G, H' = r ⊙ H (symmetric):  dE_i = Σ_j≠i v K_ij (G'_i·H'_j + G'_j·H'_i + d_i + d_j) e_j,
dH = K G' (row) or r ⊙ K G' (symmetric), and d are the node terms.

Second order. The derivative of the gradients contracted with cotangents is their tangent along these cotangents,
because second derivatives are symmetric; so the gradient of the upstream is the tangent of the output. Along ė and ḣ,
K˙_ij = v K_ij (ė_i·e_j + e_i·ė_j) for i ≠ j, deg˙_i = Σ_j K˙_ij, and with deg^-p, deg^-q the factors of G' and H'
(row: p, q = 1, 0; symmetric: ½, ½) and λ = deg˙/deg:  Ġ' = −pλ G',  Ḣ' = −qλ H' + deg^-q ḣ.  Three passes over tiles
remain, each an op of its own; what lies between them is in ``graph_conv_columns.second_order``.

    graph_degrees_tangent(nodes, tangent, inverse_variance, product_precision, column_nodes=None,
               column_tangent=None, offset=0) -> degree tangents [I]
        tangent: ė, [I, D].  column_tangent: the columns' own, [J, D], with column_nodes.
    graph_conv_tangent(nodes, tangent, values, rates, extra, inverse_variance, product_precision, column_nodes=None,
               column_tangent=None, offset=0) -> sums
        tangent: ė, or None: K stands still, and the rates are 0 and not read.
        values: tensors x [J, K] of the columns; rates: for each, a [J] with ẋ_j = a_j x_j, to which for the first
        comes extra [J, K] (None: zero).
        sums: for each of the values  Σ_j (K˙_ij x_j + K_ij ẋ_j), [I, K], of the ROW set.
    graph_conv_double_backward(nodes, tangent, left, right, left_rates, right_rates, extra, terms, term_tangents,
               inverse_variance, product_precision, column_nodes=None, column_tangent=None, column_left=None,
               column_right=None, column_left_rates=None, column_right_rates=None, column_extra=None,
               column_terms=None, column_term_tangents=None, offset=0) -> tangent of the nodes' gradient
        tangent: as above.  left, right: G', H', [I, K]; left_rates, right_rates [I] and extra [I, K] (or None):
        Ġ'_i = a_i G'_i,  Ḣ'_i = b_i H'_i + extra_i.  terms, term_tangents: the node terms d and ḋ, [I].
        With a column set all column_* are needed, the columns' own (column_extra where there is extra).
        With m_ij = G'_i·H'_j + G'_j·H'_i + d_i + d_j:  Σ_j≠i v [(K˙_ij m_ij + K_ij ṁ_ij) e_j + K_ij m_ij ė_j], [I, D].
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
    register_autograd,
    scatter,
)  # fmt: skip
from gkd_fast.ops.columns import Columns
from gkd_fast.ops.graph_conv_columns import GraphConv, second_order
from gkd_fast.ops.joined import Call, Op, on_unit_rows
from gkd_fast.ops.unit_rows import unit_rows

torch.library.define(
    "gkd_fast::graph_degrees",
    "(Tensor nodes, Tensor inverse_variance, str product_precision, Tensor? column_nodes=None, int offset=0) -> Tensor",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::graph_conv",
    "(Tensor nodes, Tensor messages, Tensor inverse_variance, str normalization, str product_precision, "
    "Tensor? column_nodes=None, Tensor? column_messages=None, int offset=0, Tensor? degrees=None, "
    "Tensor? column_degrees=None) -> (Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::graph_conv_keep",
    "(Tensor nodes, Tensor messages, Tensor inverse_variance, str normalization, str product_precision) "
    "-> (Tensor, Tensor, Tensor)",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::graph_conv_backward",
    "(Tensor upstream, Tensor nodes, Tensor messages, Tensor output, Tensor degrees, Tensor inverse_variance, "
    "str normalization, str product_precision, bool[] needs, Tensor? column_nodes=None, "
    "Tensor? column_messages=None, int offset=0, Tensor? column_upstream=None, Tensor? column_degrees=None, "
    "Tensor? node_terms=None, Tensor? column_node_terms=None, Tensor? affinities=None) -> Tensor[]",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::graph_degrees_tangent",
    "(Tensor nodes, Tensor tangent, Tensor inverse_variance, str product_precision, Tensor? column_nodes=None, "
    "Tensor? column_tangent=None, int offset=0) -> Tensor",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::graph_conv_tangent",
    "(Tensor nodes, Tensor? tangent, Tensor[] values, Tensor[] rates, Tensor? extra, Tensor inverse_variance, "
    "str product_precision, Tensor? column_nodes=None, Tensor? column_tangent=None, int offset=0) -> Tensor[]",
    tags=PT2,
)
torch.library.define(
    "gkd_fast::graph_conv_double_backward",
    "(Tensor nodes, Tensor? tangent, Tensor left, Tensor right, Tensor left_rates, Tensor right_rates, Tensor? extra, "
    "Tensor terms, Tensor term_tangents, Tensor inverse_variance, str product_precision, Tensor? column_nodes=None, "
    "Tensor? column_tangent=None, Tensor? column_left=None, Tensor? column_right=None, "
    "Tensor? column_left_rates=None, Tensor? column_right_rates=None, Tensor? column_extra=None, "
    "Tensor? column_terms=None, Tensor? column_term_tangents=None, int offset=0) -> Tensor",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::graph_degrees")
def _(nodes, inverse_variance, product_precision, column_nodes=None, offset=0):
    return nodes.new_empty(nodes.shape[0])


@torch.library.register_fake("gkd_fast::graph_conv")
def _(nodes, messages, inverse_variance, normalization, product_precision, *columns, **named_columns):
    return messages.new_empty(messages.shape), nodes.new_empty(nodes.shape[0])


@torch.library.register_fake("gkd_fast::graph_conv_keep")
def _(nodes, messages, inverse_variance, normalization, product_precision):
    return messages.new_empty(messages.shape), nodes.new_empty(nodes.shape[0]), kept.like([nodes])


@torch.library.register_fake("gkd_fast::graph_conv_backward")
def _(upstream, nodes, messages, output, degrees, inverse_variance, normalization, product_precision, needs,
      *columns, **named_columns):  # fmt: skip
    return needed_like((nodes, messages), needs)


@torch.library.register_fake("gkd_fast::graph_degrees_tangent")
def _(nodes, tangent, inverse_variance, product_precision, *columns, **named_columns):
    return nodes.new_empty(nodes.shape[0])


@torch.library.register_fake("gkd_fast::graph_conv_tangent")
def _(nodes, tangent, values, rates, extra, inverse_variance, product_precision, *columns, **named_columns):
    return [x.new_empty(nodes.shape[0], x.shape[1]) for x in values]


@torch.library.register_fake("gkd_fast::graph_conv_double_backward")
def _(nodes, *arguments, **named_columns):
    return nodes.new_empty(nodes.shape)


def _setup_context(ctx, inputs, output):
    nodes, messages, inverse_variance, ctx.normalization, ctx.product_precision, column_nodes, *_ = inputs
    refuse_column_gradient("gkd_fast::graph_conv", "gkd_fast::graph_conv_backward", column_nodes is not None)
    if ctx.needs_input_grad[2]:
        raise NotImplementedError("graph_conv has no gradient with respect to the bandwidth")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(nodes, messages, inverse_variance, *output)


def _backward(ctx, upstream, _):
    nodes, messages, inverse_variance, output, degrees = ctx.saved_tensors
    results = output.detach(), degrees
    needs = flags(ctx.needs_input_grad[:2])
    settings = inverse_variance, ctx.normalization, ctx.product_precision
    gradients = gradients_of(torch.ops.gkd_fast, upstream.contiguous(), (nodes, messages), results, settings, needs)
    return *gradients, *[None] * 8


def _results(ops, inputs, settings, keep):
    op = ops.graph_conv_keep if keep else ops.graph_conv
    return op(*inputs, *settings)


def gradients_of(ops, upstream, inputs, results, settings, needs):
    output, degrees, *affinities = results
    kept_ones = {"affinities": affinities[0]} if affinities else {}
    gradients = ops.graph_conv_backward(upstream, *inputs, output, degrees, *settings, needs, **kept_ones)
    return scatter(gradients, needs)


register_autograd("gkd_fast::graph_conv", _backward, setup_context=_setup_context)


def _setup_double_context(ctx, inputs, output):
    upstream, nodes, messages, y, degrees, inverse_variance, *settings, ctx.needed, column_nodes = inputs[:10]
    refuse_column_gradient(
        "gkd_fast::graph_conv_backward", "gkd_fast::graph_conv_double_backward", column_nodes is not None
    )
    ctx.normalization, ctx.product_precision = settings
    ctx.set_materialize_grads(False)
    messages_gradient = scatter(output, ctx.needed)[1]
    if messages_gradient is not None:
        messages_gradient = messages_gradient.clone()  # The caller holds it.
    ctx.save_for_backward(upstream, nodes, messages, y, degrees, inverse_variance, messages_gradient)


def _double_backward(ctx, cotangents):
    nodes_tangent, messages_tangent = (x if x is None else x.contiguous() for x in scatter(cotangents, ctx.needed))
    saved = ctx.saved_tensors
    return *second_order(None, saved, ctx, nodes_tangent, messages_tangent, ctx.needs_input_grad[:3]), *[None] * 14


register_autograd("gkd_fast::graph_conv_backward", _double_backward, setup_context=_setup_double_context)
for _op in ("degrees", "conv_keep", "degrees_tangent", "conv_tangent", "conv_double_backward"):
    refuse_derivative(f"gkd_fast::graph_{_op}")


_OP = Op(_results, gradients_of)


def graph_conv(
    nodes: Tensor,
    messages: Tensor,
    dtype: torch.dtype,
    inverse_variance: Tensor,
    normalization: str,
    product_precision: str,
    columns: Columns | None = None,
) -> Tensor:
    """The convolution ``[B, K]`` of nodes that are normalised in ``dtype``, over each other or ``columns``, nodes and
    messages; see the head."""
    refuse_forward_mode((nodes, messages))
    messages = messages.to(dtype)
    settings = inverse_variance, normalization, product_precision
    if columns is None:
        call = Call(_OP, settings, kept.keeps((nodes, messages)))
        return on_unit_rows([call], [nodes], [messages], dtype)[0]
    return GraphConv.apply(columns, *unit_rows([nodes], dtype), messages, *settings)
