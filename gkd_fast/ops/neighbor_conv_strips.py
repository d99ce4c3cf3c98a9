"""neighbor_conv's ops in strips of rows, by PyTorch's own operations: on devices, or for ops, without kernels.

See ``neighbor_conv`` for the formulas. A strip has at most ``STRIP`` entries, on CPUs ``CPU_STRIP``; nothing of the
size of the batch squared is held beyond it. Exponents are a strip's own and changed in place.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gkd_fast._autocast import autocast_disabled

STRIP = 1 << 22
CPU_STRIP = 1 << 18  # what a core's cache holds

# The shares of l_i and of l_j in the exponent.
SHARES = {"row": (1.0, 0.0), "column": (0.0, 1.0), "symmetric": (0.5, 0.5)}


def _in_own_type(op: Callable) -> Callable:
    """``op`` with products in the type of its operands: autocast would round nodes that are nearly alike."""

    @functools.wraps(op)
    def unrounded(first: Tensor, *arguments, **named):
        with autocast_disabled(first):
            return op(first, *arguments, **named)

    return unrounded


def _exponents(nodes, inverse_variance, column_nodes, offset) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and x of these with all columns; −∞ at the own ones."""
    columns = nodes if column_nodes is None else column_nodes
    step = max(1, (CPU_STRIP if nodes.is_cpu else STRIP) // max(1, len(columns)))
    for start in range(0, len(nodes), step):
        rows = slice(start, min(start + step, len(nodes)))
        x = (nodes[rows] @ columns.T).sub_(1).mul_(inverse_variance)
        _own(x, rows, offset).fill_(-torch.inf)
        yield rows, x


def _own(x: Tensor, rows: slice, offset: int) -> Tensor:
    """The entries of these rows' own columns."""
    return x.diagonal(max(min(rows.start + offset, x.shape[1]), -x.shape[0]))


def _tangents(nodes, tangent, inverse_variance, column_nodes, column_tangent, rows) -> Tensor:
    """ẋ of these rows with all columns."""
    columns, moving = (nodes, tangent) if column_nodes is None else (column_nodes, column_tangent)
    return (tangent[rows] @ columns.T + nodes[rows] @ moving.T) * inverse_variance


def _of_columns(columns: Tensor | None, own, of_columns):
    """The columns' side of a quantity: the rows' own where there is no column set."""
    return own if columns is None else of_columns


def _weights(x: Tensor, log_sums, column_log_sums, normalization: str, rows: slice) -> Tensor:
    """A of these rows, in the place of x; of log-sums, those that the normalization does not read may be None."""
    of_row, of_column = SHARES[normalization]
    if of_row:
        _take(x, of_row * log_sums[rows, None])
    if of_column:
        _take(x, of_column * column_log_sums)
    return x.exp_()


def _take(x: Tensor, wide: Tensor) -> Tensor:
    """x less float64 numbers, in place; one rounding of these would move the weights of a distant node alike."""
    rounded = wide.to(x)
    return x.sub_(rounded).sub_((wide - rounded).to(x))


def _half_exponentials(x: Tensor, log_sums, column_log_sums, rows: slice) -> tuple[Tensor, Tensor]:
    """u = exp((x − l_i)/2) and t = exp((x − l_j)/2): p_ij = u², p_ji = t² and the symmetric weight is u t."""
    t = _take(x.clone(), column_log_sums).mul_(0.5).exp_()
    return _take(x, log_sums[rows, None]).mul_(0.5).exp_(), t


@_in_own_type
def neighbor_sums(nodes, inverse_variance, product_precision, column_nodes=None, offset=0):
    sums = [nodes.new_empty(len(nodes), dtype=torch.float64) for _ in range(4)]
    for rows, x in _exponents(nodes, inverse_variance, column_nodes, offset):
        largest = x.amax(dim=1).clamp(min=torch.finfo(x.dtype).min)
        y = (x - largest[:, None]).exp_()
        _own(x, rows, offset).zero_()
        for k in range(2):
            total = y.sum(dim=1).double()
            sums[k][rows] = (k + 1) * largest.double() + total.log()
            sums[2 + k][rows] = ((y * x).sum(dim=1).double() / total).nan_to_num(0)
            y.square_()
    return tuple(sums)


@_in_own_type
def neighbor_conv(nodes, messages, log_sums, inverse_variance, normalization, product_precision, column_nodes=None,
                  column_messages=None, offset=0, column_log_sums=None):  # fmt: skip
    values, others = _of_columns(column_nodes, (messages, log_sums), (column_messages, column_log_sums))
    output = messages.new_empty(len(nodes), messages.shape[1])
    for rows, x in _exponents(nodes, inverse_variance, column_nodes, offset):
        output[rows] = _weights(x, log_sums, others, normalization, rows) @ values
    return output


def neighbor_conv_terms(upstream, messages, output, messages_gradient, product_precision, column_upstream=None,
                        column_messages=None):  # fmt: skip
    terms = -(upstream * output).sum(dim=1)
    return terms if messages_gradient is None else (terms - (messages * messages_gradient).sum(dim=1)) / 2


@_in_own_type
def neighbor_conv_backward(upstream, nodes, messages, log_sums, node_terms, inverse_variance, normalization,
                           product_precision, column_nodes=None, column_messages=None, offset=0, column_upstream=None,
                           column_log_sums=None, column_node_terms=None):  # fmt: skip
    columns, values, others, other_upstream, other_terms = _of_columns(
        column_nodes, (nodes, messages, log_sums, upstream, node_terms),
        (column_nodes, column_messages, column_log_sums, column_upstream, column_node_terms),
    )  # fmt: skip
    symmetric = normalization == "symmetric"
    gradient = torch.empty_like(nodes)
    for rows, x in _exponents(nodes, inverse_variance, column_nodes, offset):
        products = upstream[rows] @ values.T
        if other_upstream is None and not symmetric:
            weights = _weights(x, log_sums, None, "row", rows) * (products + node_terms[rows, None])
        else:
            u, t = _half_exponentials(x, log_sums, others, rows)
            back = 0 if other_upstream is None else messages[rows] @ other_upstream.T
            behind = 0 if other_terms is None else other_terms
            if symmetric:  # u t (s + s') + u² d_i + t² d_j
                weights = products.add_(back).mul_(t).addcmul_(u, node_terms[rows, None]).mul_(u)
                weights += t.square_().mul_(behind)
            else:
                weights = products.add_(node_terms[rows, None]).mul_(u.square_())
                weights += t.square_().mul_(back + behind)
        gradient[rows] = inverse_variance * (weights @ columns)
    return gradient


@_in_own_type
def neighbor_sums_tangent(nodes, tangent, log_sums, inverse_variance, product_precision, column_nodes=None,
                          column_tangent=None, offset=0):  # fmt: skip
    sums = nodes.new_empty(len(nodes))
    for rows, x in _exponents(nodes, inverse_variance, column_nodes, offset):
        moving = _tangents(nodes, tangent, inverse_variance, column_nodes, column_tangent, rows)
        sums[rows] = (_weights(x, log_sums, None, "row", rows) * moving).sum(dim=1)
    return sums


def _rates(moving: Tensor, tangents, column_tangents, normalization: str, rows: slice) -> Tensor:
    """ẋ_ij − a˙_i − b˙_j of these rows."""
    of_row, of_column = SHARES[normalization]
    if of_row:
        moving = moving - of_row * tangents[rows, None]
    return moving - of_column * column_tangents if of_column else moving


@_in_own_type
def neighbor_conv_tangent(nodes, tangent, messages, messages_tangent, log_sums, log_sum_tangents, inverse_variance,
                          normalization, product_precision, column_nodes=None, column_tangent=None,
                          column_messages=None, column_messages_tangent=None, offset=0, column_log_sums=None,
                          column_log_sum_tangents=None):  # fmt: skip
    values, moving_values, others, other_tangents = _of_columns(
        column_nodes, (messages, messages_tangent, log_sums, log_sum_tangents),
        (column_messages, column_messages_tangent, column_log_sums, column_log_sum_tangents),
    )  # fmt: skip
    output = messages.new_zeros(len(nodes), messages.shape[1])
    for rows, x in _exponents(nodes, inverse_variance, column_nodes, offset):
        weights = _weights(x, log_sums, others, normalization, rows)
        if tangent is not None:
            moving = _tangents(nodes, tangent, inverse_variance, column_nodes, column_tangent, rows)
            rates = _rates(moving, log_sum_tangents, other_tangents, normalization, rows)
            output[rows] += (weights * rates) @ values
        if moving_values is not None:
            output[rows] += weights @ moving_values
    return output


@_in_own_type
def neighbor_conv_double_backward(
    upstream, nodes, tangent, messages, messages_tangent, log_sums, log_sum_tangents, node_terms, node_term_tangents,
    inverse_variance, normalization, product_precision, column_nodes=None, column_tangent=None, column_messages=None,
    column_messages_tangent=None, offset=0, column_upstream=None, column_log_sums=None, column_log_sum_tangents=None,
    column_node_terms=None, column_node_term_tangents=None,
):  # fmt: skip
    columns, values, moving_values, others, other_tangents, other_upstream, terms, term_tangents, moved = _of_columns(
        column_nodes,
        (nodes, messages, messages_tangent, log_sums, log_sum_tangents, upstream, node_terms, node_term_tangents,
         tangent),
        (column_nodes, column_messages, column_messages_tangent, column_log_sums, column_log_sum_tangents,
         column_upstream, column_node_terms, column_node_term_tangents, column_tangent),
    )  # fmt: skip
    gradient = torch.empty_like(nodes)
    for rows, x in _exponents(nodes, inverse_variance, column_nodes, offset):
        u, t = _half_exponentials(x, log_sums, others, rows)
        ahead, behind = u * u, t * t  # p_ij and p_ji
        forth, back = (u * t, u * t) if normalization == "symmetric" else (ahead, behind)  # A_ij and A_ji
        weights = ahead * node_term_tangents[rows, None] + behind * term_tangents
        if messages_tangent is not None:
            weights += forth * (upstream[rows] @ moving_values.T) + back * (messages_tangent[rows] @ other_upstream.T)
        if tangent is not None:
            moving = _tangents(nodes, tangent, inverse_variance, column_nodes, column_tangent, rows)
            forth = forth * (upstream[rows] @ values.T)
            back = back * (messages[rows] @ other_upstream.T)
            ahead, behind = ahead * node_terms[rows, None], behind * terms
            transposed = {"row": "column"}.get(normalization, normalization)
            tangents = log_sum_tangents, other_tangents
            weights += forth * _rates(moving, *tangents, normalization, rows)
            weights += back * _rates(moving, *tangents, transposed, rows)
            weights += ahead * _rates(moving, *tangents, "row", rows) + behind * _rates(
                moving, *tangents, "column", rows
            )
        gradient[rows] = inverse_variance * (weights @ columns)
        if tangent is not None:
            gradient[rows] += inverse_variance * ((forth + back + ahead + behind) @ moved)
    return gradient
