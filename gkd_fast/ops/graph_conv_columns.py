"""graph_conv over blocks of columns, what their results make together, and the derivatives: the first over column sets,
the second over these or over the rows themselves, which take the same passes."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gkd_fast.ops.autograd import flags, last_derivative, scatter
from gkd_fast.ops.columns import Columns, add, run

# With G the upstream and H the messages, G' = deg^-p G and H' = deg^-q H: the powers (p, q).
POWERS = {"row": (1.0, 0.0), "symmetric": (0.5, 0.5)}

NODES = ("column_nodes",)
MESSAGES = (*NODES, "column_messages")
UPSTREAM = (*MESSAGES, "column_upstream")


def over(columns: Columns | None, call, names: tuple[str, ...] = NODES, **own) -> list[Tensor]:
    """The sums over the blocks of ``columns`` of what ``call(column_nodes=…, offset=…, …)`` gives, a tensor or a list.

    ``names``: of the columns that ``call`` takes.  ``own``: what these bring along, by the name that ``call`` has for
    it: this rank's rows of it, a tensor, a list of them, or None. Columns None: ``call()``, whose columns are the rows.
    """
    if columns is None:
        result = call()
        return [result] if isinstance(result, Tensor) else result
    sent, spec = tree_flatten(own)
    places = [k for k, x in enumerate(sent) if x is not None]
    total = None
    for block in columns.blocks(*(sent[k] for k in places), only=len(names)):
        arrived: list[Tensor | None] = [None] * len(sent)
        for k, x in zip(places, block.extra, strict=True):
            arrived[k] = x
        part = call(**dict(zip(names, block.columns)), offset=block.offset, **tree_unflatten(arrived, spec))
        total = add(total, [part] if isinstance(part, Tensor) else part)
    return total


def graph_degrees(
    nodes: Tensor, inverse_variance: Tensor, product_precision: str, columns: Columns | None = None
) -> Tensor:
    """The row sums of the adjacency ``[B]`` of unit rows, without gradient."""
    nodes = nodes.detach()
    return over(
        columns,
        lambda **block: run(torch.ops.gkd_fast.graph_degrees, nodes, inverse_variance, product_precision, **block),
    )[0]


def node_terms(
    upstream: Tensor,
    output: Tensor,
    messages: Tensor,
    messages_gradient: Tensor | None,
    degrees: Tensor,
    normalization: str,
) -> Tensor:
    """d_i = −(p G_i·Y_i + q H_i·dH_i)/deg_i, ``[I]``; the messages' gradient dH is needed for "symmetric" alone."""
    left_power, right_power = POWERS[normalization]
    total = left_power * dots(upstream, output)
    if right_power:
        total = total + right_power * dots(messages, messages_gradient)
    return -total / degrees


def dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=1)


def _messages_gradient(columns, ctx, upstream, nodes, messages, output, degrees, inverse_variance) -> Tensor:
    """dH of this rank's rows; ``columns``: nodes, messages and upstream."""
    return over(
        columns,
        lambda **block: run(
            torch.ops.gkd_fast.graph_conv_backward, upstream, nodes, messages, output, degrees, inverse_variance,
            ctx.normalization, ctx.product_precision, [False, True], **block,
        ),
        UPSTREAM, column_degrees=degrees,
    )[0]  # fmt: skip


class GraphConv(torch.autograd.Function):
    """Output of one rank's rows against ``columns``, nodes and messages; the other ranks run it at the same time."""

    @staticmethod
    def forward(ctx, columns, nodes, messages, inverse_variance, normalization, product_precision):
        settings = inverse_variance, normalization, product_precision
        if normalization == "symmetric":
            degrees = graph_degrees(nodes, inverse_variance, product_precision, columns)
            (output,) = over(
                columns,
                lambda **block: run(
                    torch.ops.gkd_fast.graph_conv, nodes, messages, *settings, degrees=degrees, **block
                )[0],
                MESSAGES, column_degrees=degrees,
            )  # fmt: skip
        else:
            # Σ_j K_ij H_j and Σ_j K_ij add up.
            def sums(**block):
                rows, degrees = run(torch.ops.gkd_fast.graph_conv, nodes, messages, *settings, **block)
                return [rows * degrees[:, None], degrees]

            output, degrees = over(columns, sums, MESSAGES)
            output = output / degrees[:, None]
        ctx.normalization, ctx.product_precision = normalization, product_precision
        columns.save(ctx, nodes, messages, output.clone(), degrees, inverse_variance)  # The caller holds the output.
        return output

    @staticmethod
    def backward(ctx, upstream):
        columns, (nodes, messages, output, degrees, inverse_variance) = Columns.saved(ctx)
        needs = flags(ctx.needs_input_grad[1:3])
        gradients = GraphConvBackward.apply(
            columns, upstream.contiguous(), nodes, messages, output, degrees, inverse_variance, ctx.normalization,
            ctx.product_precision, needs,
        )  # fmt: skip
        return None, *scatter(gradients, needs), None, None, None


class GraphConvBackward(torch.autograd.Function):
    """The gradients of nodes and messages that ``needs`` asks for."""

    @staticmethod
    def forward(ctx, columns, upstream, nodes, messages, output, degrees, inverse_variance, normalization,
                product_precision, needs):  # fmt: skip
        ctx.normalization, ctx.product_precision, ctx.needed = normalization, product_precision, needs
        rows = upstream, nodes, messages, output, degrees, inverse_variance
        needs_nodes, needs_messages = needs
        with_upstream = columns.beside(upstream)
        messages_gradient = None
        if needs_messages or normalization == "symmetric":
            messages_gradient = _messages_gradient(with_upstream, ctx, *rows)
        gradients = []
        if needs_nodes:
            terms = node_terms(upstream, output, messages, messages_gradient, degrees, normalization)
            gradients = over(
                with_upstream,
                lambda **block: run(
                    torch.ops.gkd_fast.graph_conv_backward, *rows, normalization, product_precision, [True, False],
                    node_terms=terms, **block,
                ),
                UPSTREAM, column_degrees=degrees, column_node_terms=terms,
            )  # fmt: skip
        if needs_messages:
            gradients.append(messages_gradient)
        ctx.set_materialize_grads(False)
        # The caller holds the messages' gradient.
        columns.save(ctx, *rows, None if messages_gradient is None else messages_gradient.clone())
        return tuple(gradients)

    @staticmethod
    @last_derivative
    def backward(ctx, *cotangents):
        nodes_tangent, messages_tangent = (x if x is None else x.contiguous() for x in scatter(cotangents, ctx.needed))
        columns, saved = Columns.saved(ctx)
        gradients = second_order(columns, saved, ctx, nodes_tangent, messages_tangent, ctx.needs_input_grad[1:4])
        return None, *gradients, *[None] * 6


def second_order(columns: Columns | None, saved, ctx, nodes_tangent, messages_tangent, needs) -> list[Tensor | None]:
    """The tangents of the output and of both gradients along the cotangents of these: the gradients of upstream, nodes
    and messages. Columns None: the rows."""
    # Output, degrees and the messages' gradient are functions of nodes and messages: their part of the derivative is in
    # the gradients of these.
    upstream, nodes, messages, output, degrees, inverse_variance, messages_gradient = saved
    needs_upstream, needs_nodes, needs_messages = needs
    settings = inverse_variance, ctx.product_precision
    left_power, right_power = POWERS[ctx.normalization]
    left_scale, right_scale = (degrees.pow(-power)[:, None] for power in (left_power, right_power))
    left, right = left_scale * upstream, right_scale * messages
    extra = None if messages_tangent is None else right_scale * messages_tangent
    growth = torch.zeros_like(degrees)
    if nodes_tangent is not None:
        degree_tangents = over(
            columns,
            lambda **block: run(
                torch.ops.gkd_fast.graph_degrees_tangent, nodes, nodes_tangent, *settings, **block
            ),
            column_tangent=nodes_tangent,
        )  # fmt: skip
        growth = degree_tangents[0] / degrees
    left_rates, right_rates = -left_power * growth, -right_power * growth

    moves_messages_gradient = needs_messages or (needs_nodes and right_power > 0)
    values, rates = [right], [right_rates]
    if moves_messages_gradient:
        values, rates = [right, left], [right_rates, left_rates]
        if messages_gradient is None and right_power:
            messages_gradient = _messages_gradient(
                columns and columns.beside(upstream), ctx, upstream, nodes, messages, output, degrees, inverse_variance
            )
    sums = over(
        columns,
        lambda values=values, rates=rates, extra=extra, **block: run(
            torch.ops.gkd_fast.graph_conv_tangent, nodes, nodes_tangent, values, rates, extra, *settings, **block
        ),
        column_tangent=nodes_tangent, values=values, rates=rates, extra=extra,
    )  # fmt: skip
    output_tangent = left_scale * sums[0] + left_rates[:, None] * output
    messages_gradient_tangent = nodes_gradient_tangent = None
    if moves_messages_gradient:
        messages_gradient_tangent = right_scale * sums[1]
        if right_power:
            messages_gradient_tangent = messages_gradient_tangent + right_rates[:, None] * messages_gradient
    if needs_nodes:
        terms = node_terms(upstream, output, messages, messages_gradient, degrees, ctx.normalization)
        # ḋ = −(p G·Ẏ + q (ḣ·dH + H·dḢ))/deg − λ d
        term_tangents = (
            node_terms(upstream, output_tangent, messages, messages_gradient_tangent, degrees, ctx.normalization)
            - growth * terms
        )
        if right_power and messages_tangent is not None:
            term_tangents = term_tangents - right_power * dots(messages_tangent, messages_gradient) / degrees
        (nodes_gradient_tangent,) = over(
            columns,
            lambda **block: run(
                torch.ops.gkd_fast.graph_conv_double_backward, nodes, nodes_tangent, left, right, left_rates,
                right_rates, extra, terms, term_tangents, *settings, **block,
            ),
            column_tangent=nodes_tangent, column_left=left, column_right=right, column_left_rates=left_rates,
            column_right_rates=right_rates, column_extra=extra, column_terms=terms,
            column_term_tangents=term_tangents,
        )  # fmt: skip
    return [
        output_tangent if needs_upstream else None,
        nodes_gradient_tangent,
        messages_gradient_tangent if needs_messages else None,
    ]
