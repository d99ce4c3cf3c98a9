"""neighbor_conv over blocks of columns, what their results make together, and the derivatives: over column sets, and of
the second order also over the rows themselves, which take the same passes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gkd_fast.ops import neighbor_conv_strips as strips
from gkd_fast.ops.autograd import flags, last_derivative, scatter
from gkd_fast.ops.backends import has_kernels
from gkd_fast.ops.columns import Columns, run
from gkd_fast.ops.graph_conv_columns import MESSAGES, NODES, UPSTREAM, dots, over

TRANSPOSED = {"row": "column", "symmetric": "symmetric"}


def neighbor_sums(
    nodes: Tensor,
    inverse_variance: Tensor,
    product_precision: str,
    columns: Columns | None = None,
    op: Callable | None = None,
) -> list[Tensor]:
    """What the op of that name gives of unit rows and all blocks of columns, ``[B]`` each; without gradient."""
    nodes = nodes.detach()

    def sums(**block):
        return run(op or torch.ops.gkd_fast.neighbor_sums, nodes, inverse_variance, product_precision, **block)

    if columns is None:
        return list(sums())
    parts = [sums(column_nodes=block.columns[0], offset=block.offset) for block in columns.blocks(only=1)]
    return merged(parts)


def merged(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sums of several blocks of columns together: log-sums, and means weighted by what each has part in them."""
    totals, means = [], []
    for k in range(2):
        log_sums = torch.stack([part[k] for part in parts])
        totals.append(log_sums.logsumexp(dim=0))
        shares = (log_sums - totals[k]).exp().nan_to_num(0)
        means.append((shares * torch.stack([part[2 + k] for part in parts])).sum(dim=0))
    return [*totals, *means]


def convolved(
    columns, nodes, messages, log_sums, inverse_variance, normalization, product_precision,
    op: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Y of this rank's rows."""
    return over(
        columns,
        lambda **block: run(
            op or torch.ops.gkd_fast.neighbor_conv, nodes, messages, log_sums, inverse_variance, normalization,
            product_precision, **block,
        ),
        MESSAGES, column_log_sums=log_sums,
    )[0]  # fmt: skip


def _second_order_is_in_strips(device: torch.device) -> bool:
    """Whether kernels have the first order alone, and the strips, whose exponents round otherwise, the second."""
    return has_kernels("neighbor_conv", device) and not has_kernels("neighbor_conv_tangent", device)


def node_terms(
    upstream: Tensor, output: Tensor, messages: Tensor, messages_gradient: Tensor | None, normalization: str
) -> Tensor:
    """d_i, ``[I]``, of unrounded rows; the messages' gradient is needed for "symmetric" alone."""
    of_messages = messages_gradient if normalization == "symmetric" else None
    return strips.neighbor_conv_terms(upstream, messages, output, of_messages, "float64")


def _rounded_terms(columns, upstream, output, messages, messages_gradient, normalization, product_precision) -> Tensor:
    """``node_terms`` of rows as products with the one block of columns round them; those with several round none."""
    if columns is not None and not columns.whole:
        return node_terms(upstream, output, messages, messages_gradient, normalization)
    of_messages = messages_gradient if normalization == "symmetric" else None

    def terms(column_nodes=None, offset=0, **block):
        op = torch.ops.gkd_fast.neighbor_conv_terms
        return run(op, upstream, messages, output, of_messages, product_precision, **block)

    return over(columns, terms, UPSTREAM)[0]


def _messages_gradient(
    columns, upstream, nodes, log_sums, inverse_variance, normalization, product_precision, op: Callable | None = None
) -> Tensor:
    """dM of this rank's rows; ``columns``: nodes, messages and upstream, of which the last are the values."""
    settings = inverse_variance, TRANSPOSED[normalization], product_precision

    def convolved(column_messages=None, column_upstream=None, **block):
        if column_upstream is not None:
            block["column_messages"] = column_upstream
        return run(op or torch.ops.gkd_fast.neighbor_conv, nodes, upstream, log_sums, *settings, **block)

    return over(columns, convolved, UPSTREAM, column_log_sums=log_sums)[0]


def _weight_sums(columns, nodes, log_sums, inverse_variance, product_precision) -> Tensor:
    """Σ_j p_ij as these log-sums give them, ``[I]``; 1 of a row without others."""

    def sums(column_nodes=None, **block):
        ones = [x if x is None else x.new_ones(len(x), 1) for x in (nodes, column_nodes)]
        if column_nodes is not None:
            block |= {"column_nodes": column_nodes, "column_messages": ones[1]}
        op = torch.ops.gkd_fast.neighbor_conv
        return run(op, nodes, ones[0], log_sums, inverse_variance, "row", product_precision, **block)

    (total,) = over(columns, sums)
    return torch.where(total > 0, total, 1)[:, 0]


def gradients_of_rows(
    columns, rows, normalization: str, product_precision: str, needs
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of nodes and messages, None where not needed, and the messages' where it was found.

    rows: upstream, nodes, messages, output, log-sums and the inverse variance. columns: nodes, messages and upstream,
    or None: the rows.
    """
    upstream, nodes, messages, output, log_sums, inverse_variance = rows
    needs_nodes, needs_messages = needs
    messages_gradient = gradient = None
    with torch.no_grad():
        if needs_messages or normalization == "symmetric":
            messages_gradient = _messages_gradient(
                columns, upstream, nodes, log_sums, inverse_variance, normalization, product_precision
            )
        if needs_nodes and columns is None and len(nodes) <= 2:
            # The one other of two nodes weighs 1 however far it is: a gradient of 0, all of it cancellation.
            gradient = torch.zeros_like(nodes)
        elif needs_nodes:
            terms = _rounded_terms(
                columns, upstream, output, messages, messages_gradient, normalization, product_precision
            )
            if nodes.dtype == torch.float64:
                # Log-sums are of the size 1/σ² and rounded as such, which is a factor of all weights of a row.
                terms = terms / _weight_sums(columns, nodes, log_sums, inverse_variance, product_precision)
            settings = inverse_variance, normalization, product_precision
            (gradient,) = over(
                columns,
                lambda **block: run(
                    torch.ops.gkd_fast.neighbor_conv_backward, upstream, nodes, messages, log_sums, terms, *settings,
                    **block,
                ),
                UPSTREAM, column_log_sums=log_sums, column_node_terms=terms,
            )  # fmt: skip
    return [gradient, messages_gradient if needs_messages else None], messages_gradient


class NeighborConv(torch.autograd.Function):
    """Output of one rank's rows against ``columns``, nodes and messages; the other ranks run it at the same time."""

    @staticmethod
    def forward(ctx, columns, nodes, messages, inverse_variance, normalization, product_precision):
        log_sums = neighbor_sums(nodes, inverse_variance, product_precision, columns)[0]
        output = convolved(columns, nodes, messages, log_sums, inverse_variance, normalization, product_precision)
        ctx.normalization, ctx.product_precision = normalization, product_precision
        columns.save(ctx, nodes, messages, output.clone(), log_sums, inverse_variance)  # The caller holds the output.
        return output

    @staticmethod
    def backward(ctx, upstream):
        columns, rows = Columns.saved(ctx)
        needs = flags(ctx.needs_input_grad[1:3])
        gradients = NeighborConvGradients.apply(
            columns, upstream.contiguous(), *rows, ctx.normalization, ctx.product_precision, needs
        )
        return None, *scatter(gradients, needs), None, None, None


class NeighborConvGradients(torch.autograd.Function):
    """The gradients of nodes and messages that ``needs`` asks for."""

    @staticmethod
    def forward(ctx, columns, upstream, nodes, messages, output, log_sums, inverse_variance, normalization,
                product_precision, needs):  # fmt: skip
        ctx.normalization, ctx.product_precision, ctx.needed = normalization, product_precision, needs
        rows = upstream, nodes, messages, output, log_sums, inverse_variance
        gradients, messages_gradient = gradients_of_rows(
            columns.beside(upstream), rows, normalization, product_precision, needs
        )
        ctx.set_materialize_grads(False)
        # The caller holds the messages' gradient.
        columns.save(ctx, *rows, None if messages_gradient is None else messages_gradient.clone())
        return tuple(x for x in gradients if x is not None)

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
    # Output, log-sums and the messages' gradient are functions of nodes and messages: their part of the derivative is
    # in the gradients of these.
    upstream, nodes, messages, output, log_sums, inverse_variance, messages_gradient = saved
    needs_upstream, needs_nodes, needs_messages = needs
    normalization, precision = ctx.normalization, ctx.product_precision
    symmetric = normalization == "symmetric"
    calls = torch.ops.gkd_fast
    convolve = None
    if _second_order_is_in_strips(nodes.device):
        # What these passes sum cancels only where log-sums, output and the messages' gradient are of the same weights.
        convolve = strips.neighbor_conv
        log_sums = neighbor_sums(nodes, inverse_variance, precision, columns, strips.neighbor_sums)[0]
        output = convolved(columns, nodes, messages, log_sums, inverse_variance, normalization, precision, convolve)
        messages_gradient = None
    growth = None
    if nodes_tangent is not None:
        (growth,) = over(
            columns,
            lambda **block: run(
                calls.neighbor_sums_tangent, nodes, nodes_tangent, log_sums, inverse_variance, precision, **block
            ),
            NODES, column_tangent=nodes_tangent,
        )  # fmt: skip

    def tangent(values, moving, normalization):
        return over(
            columns,
            lambda **block: run(
                calls.neighbor_conv_tangent, nodes, nodes_tangent, values, moving, log_sums, growth, inverse_variance,
                normalization, precision, **block,
            ),
            NODES, column_tangent=nodes_tangent, column_messages=values, column_messages_tangent=moving,
            column_log_sums=log_sums, column_log_sum_tangents=growth,
        )[0]  # fmt: skip

    output_tangent = tangent(messages, messages_tangent, normalization)
    messages_gradient_tangent = nodes_gradient_tangent = None
    if needs_messages or (needs_nodes and symmetric):
        messages_gradient_tangent = tangent(upstream, None, TRANSPOSED[normalization])
    if needs_nodes:
        if messages_gradient is None and symmetric:
            with_upstream = columns and columns.beside(upstream)
            messages_gradient = _messages_gradient(
                with_upstream, upstream, nodes, log_sums, inverse_variance, normalization, precision, convolve
            )
        terms = node_terms(upstream, output, messages, messages_gradient, normalization)
        # d˙ = −G·Ẏ (row), −(G·Ẏ + ṁ·dM + m·dṀ)/2 (symmetric)
        term_tangents = node_terms(upstream, output_tangent, messages, messages_gradient_tangent, normalization)
        if symmetric and messages_tangent is not None:
            term_tangents = term_tangents - dots(messages_tangent, messages_gradient) / 2
        (nodes_gradient_tangent,) = over(
            columns,
            lambda **block: run(
                calls.neighbor_conv_double_backward, upstream, nodes, nodes_tangent, messages, messages_tangent,
                log_sums, growth, terms, term_tangents, inverse_variance, normalization, precision, **block,
            ),
            NODES, column_tangent=nodes_tangent, column_messages=messages, column_messages_tangent=messages_tangent,
            column_upstream=upstream, column_log_sums=log_sums, column_log_sum_tangents=growth,
            column_node_terms=terms, column_node_term_tangents=term_tangents,
        )  # fmt: skip
    return [
        output_tangent if needs_upstream else None,
        nodes_gradient_tangent,
        messages_gradient_tangent if needs_messages else None,
    ]
