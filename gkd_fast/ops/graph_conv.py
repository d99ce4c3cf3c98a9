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
    graph_conv_backward(upstream, nodes, messages, output, degrees, inverse_variance, normalization,
               product_precision, needs, column_nodes=None, column_messages=None, offset=0, column_upstream=None,
               column_degrees=None, node_terms=None, column_node_terms=None) -> gradients
        upstream: gradient of the output, [I, K].  needs: two bools, for nodes and messages; only the wanted
        gradients come back, in that order, of the ROW set, complete.
        With a column set: column_upstream [J, K] (None: zero) and column_degrees [J], the columns' own; and for
        the nodes' gradient also node_terms [I] and column_node_terms [J] (None: zero), the functions of the row
        alone that ``node_terms`` below gives (for "symmetric" it reads the messages' gradient, so that one is
        asked for first).

row: Y_i = Σ_j K_ij H_j/deg_i.  symmetric: r = deg^-1/2, Y = r ⊙ K (r ⊙ H).  With G' = G/deg, H' = H (row) or
G' = r ⊙ G, H' = r ⊙ H (symmetric):  dE_i = Σ_j≠i v K_ij (G'_i·H'_j + G'_j·H'_i + d_i + d_j) e_j,
dH = K G' (row) or r ⊙ K G' (symmetric), and d are the node terms.
"""

import torch
from torch import Tensor

from gkd_fast.ops.autograd import PT2, flags, refuse_column_gradient, refuse_forward_mode, refuse_second_order, scatter

torch.library.define(
    "gkd_fast::graph_degrees",
    "(Tensor nodes, Tensor inverse_variance, str product_precision, Tensor? column_nodes=None, int offset=0) "
    "-> Tensor",
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
    "gkd_fast::graph_conv_backward",
    "(Tensor upstream, Tensor nodes, Tensor messages, Tensor output, Tensor degrees, Tensor inverse_variance, "
    "str normalization, str product_precision, bool[] needs, Tensor? column_nodes=None, "
    "Tensor? column_messages=None, int offset=0, Tensor? column_upstream=None, Tensor? column_degrees=None, "
    "Tensor? node_terms=None, Tensor? column_node_terms=None) -> Tensor[]",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::graph_degrees")
def _(nodes, inverse_variance, product_precision, column_nodes=None, offset=0):
    return nodes.new_empty(nodes.shape[0])


@torch.library.register_fake("gkd_fast::graph_conv")
def _(nodes, messages, inverse_variance, normalization, product_precision, *columns, **named_columns):
    return messages.new_empty(messages.shape), nodes.new_empty(nodes.shape[0])


@torch.library.register_fake("gkd_fast::graph_conv_backward")
def _(upstream, nodes, messages, output, degrees, inverse_variance, normalization, product_precision, needs,
      *columns, **named_columns):  # fmt: skip
    return [x.new_empty(x.shape) for x, needed in zip((nodes, messages), needs, strict=True) if needed]


def _setup_context(ctx, inputs, output):
    nodes, messages, inverse_variance, ctx.normalization, ctx.product_precision, column_nodes, *_ = inputs
    refuse_column_gradient("gkd_fast::graph_conv", column_nodes is not None)
    if ctx.needs_input_grad[2]:
        raise NotImplementedError("graph_conv has no gradient with respect to the bandwidth")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(nodes, messages, inverse_variance, *output)


def _backward(ctx, upstream, _):
    nodes, messages, inverse_variance, output, degrees = ctx.saved_tensors
    needs = flags(ctx.needs_input_grad[:2])
    gradients = torch.ops.gkd_fast.graph_conv_backward(
        upstream.contiguous(), nodes, messages, output, degrees, inverse_variance, ctx.normalization,
        ctx.product_precision, needs,
    )  # fmt: skip
    return *scatter(gradients, needs), *[None] * 8


torch.library.register_autograd("gkd_fast::graph_conv", _backward, setup_context=_setup_context)
refuse_second_order("gkd_fast::graph_conv_backward")
refuse_second_order("gkd_fast::graph_degrees")


def node_terms(
    upstream: Tensor, output: Tensor, messages: Tensor, messages_gradient: Tensor | None, degrees: Tensor, normalization: str
) -> Tensor:
    """d_i = −(G_i·Y_i)/deg_i (row) or −(G_i·Y_i + H_i·dH_i)/(2 deg_i) (symmetric), ``[I]``."""
    products = (upstream * output).sum(dim=1)
    if normalization == "row":
        return -products / degrees
    return -(products + (messages * messages_gradient).sum(dim=1)) / (2 * degrees)


def graph_conv(
    nodes: Tensor, messages: Tensor, inverse_variance: Tensor, normalization: str, product_precision: str
) -> Tensor:
    """The convolution ``[B, K]`` of unit rows; see the head of this file."""
    refuse_forward_mode("graph_conv", (nodes, messages))
    return torch.ops.gkd_fast.graph_conv(nodes, messages, inverse_variance, normalization, product_precision)[0]


def graph_degrees(nodes: Tensor, inverse_variance: Tensor, product_precision: str) -> Tensor:
    """The row sums of the adjacency ``[B]`` of unit rows, without gradient."""
    return torch.ops.gkd_fast.graph_degrees(nodes.detach(), inverse_variance, product_precision)
