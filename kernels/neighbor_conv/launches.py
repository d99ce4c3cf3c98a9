"""neighbor_conv on GPUs: graph_conv's launches with the log-sums in their exponents, and those of ``tiles``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import PRODUCTS, cdiv, matrices, on_device, power_of_two
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.operands import Operand
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.graph_conv.graphs import (
    Graph,
    Others,
    by_kind,
    kinds_of,
    node_operands,
    numbers_of,
    of_parts,
    variances,
    walk_of,
)  # fmt: skip
from gkd_fast.kernels.graph_conv.launches import PARTS_WIDTH, TERMS_ROWS, complete, sums_of_kind
from gkd_fast.kernels.graph_conv.small import at
from gkd_fast.kernels.graph_conv.values import ONE, Side, Values, both_values, convolved_values, value_powers
from gkd_fast.kernels.neighbor_conv import small, strips
from gkd_fast.kernels.neighbor_conv.tiles import neighbor_gradients, neighbor_terms

# The shares of l_i and of l_j in the exponents.
SHARES = {"row": (1.0, 0.0), "column": (0.0, 1.0), "symmetric": (0.5, 0.5)}


def finer(product_precision: str) -> str:
    """The precision, but for one tf32 product: matrix units round its operands, where node terms cannot follow."""
    return "float32" if product_precision == "tf32" else product_precision


class NeighborGraph(Graph):
    """The graph over the other nodes."""

    diagonal = 0.0

    def __init__(self, nodes, inverse_variance, product_precision, *others):
        super().__init__(nodes, inverse_variance, finer(product_precision), *others)


@dataclass(frozen=True)
class Terms:
    """What is added to the products of a tile of gradients, d and e as ``tiles.gradient_weights`` has them."""

    d: Tensor
    e: Tensor


def shares_of(normalization: str, among: Sequence[str] = tuple(SHARES)) -> tuple[float, float]:
    if normalization not in among:
        raise ValueError(f"normalization must be one of {tuple(among)}, got {normalization!r}")
    return SHARES[normalization]


def neighbor_conv(
    nodes, messages, log_sums, inverse_variance, normalization, product_precision, column_nodes=None,
    column_messages=None, offset=0, column_log_sums=None,
) -> Tensor:  # fmt: skip
    shares = shares_of(normalization)
    graph = NeighborGraph(nodes, inverse_variance, product_precision, column_nodes, offset)
    if not graph.has_columns:
        column_messages, column_log_sums = messages, log_sums
    (values,) = matrices("messages", [column_messages], graph.column_count)
    if graph.is_small(values.shape[1]):
        return small.weighted(graph.stages(), [values], [log_sums], shares)[0]
    return convolutions([graph], [values], [log_sums], [column_log_sums], shares)[0]


def convolutions(
    graphs: Sequence[NeighborGraph], values: Sequence[Tensor], log_sums, column_log_sums, shares: tuple[float, float]
) -> list[Tensor]:
    """Σ_j A_ij values_j; values: the columns'."""
    made, powers = convolved_values(graphs, values, [None] * len(graphs))

    def of_kind(graphs, made, powers, like, *log_sums):
        outputs, parts = _weighted(graphs, made, powers, like, *log_sums, shares)
        return complete(graphs, [x.shape[1] for x in like], parts, outputs, None, None, ONE)[0]

    given = made, powers, values, log_sums, column_log_sums
    return by_kind(of_kind, graphs, [x.shape[1] for x in values], *given)


def _weighted(
    graphs: Sequence[NeighborGraph], values: Sequence[Operand], powers, like: Sequence[Tensor], log_sums,
    column_log_sums, shares: tuple[float, float],
) -> tuple[list[Tensor], int]:  # fmt: skip
    """Σ_j A_ij values_j of graphs of one kind, as wide as ``like``, of the parts of the columns, and how many these
    are."""
    of_stages = zip(log_sums, column_log_sums, strict=True)
    # What has no share is not read.
    others = [Others(shares, own.contiguous(), (own if x is None else x).contiguous()) for own, x in of_stages]
    return sums_of_kind(graphs, values, powers, like, None, ONE, others)


def neighbor_conv_backward(
    upstream, nodes, messages, log_sums, node_terms, inverse_variance, normalization, product_precision,
    column_nodes=None, column_messages=None, offset=0, column_upstream=None, column_log_sums=None,
    column_node_terms=None,
) -> Tensor:  # fmt: skip
    shares_of(normalization, ("row", "symmetric"))
    symmetric = normalization == "symmetric"
    graph = NeighborGraph(nodes, inverse_variance, product_precision, column_nodes, offset)
    upstream, messages = matrices("upstream, messages", [upstream, messages], graph.row_count)
    node_terms = node_terms.contiguous()
    if graph.is_small(messages.shape[1]):
        sides = [upstream], [messages], [log_sums], [node_terms]
        return small.nodes_gradients(graph.stages(), *sides, symmetric)[0]
    own = other = Side(messages, upstream, None)
    if graph.has_columns:
        (of_columns,) = matrices("column_messages", [column_messages], graph.column_count)
        if column_upstream is not None:
            (column_upstream,) = matrices("column_upstream", [column_upstream], graph.column_count)
        other = Side(of_columns, column_upstream, None)
    powers, none = value_powers([graph], [own], [other]), [None]
    (columns,) = both_values([graph], [other], powers, none, none, rounded=True)
    rows, terms = columns, _terms(columns, node_terms, symmetric)
    column_terms = terms
    if graph.has_columns:
        (rows,) = both_values([graph], [own], powers, none, none, [columns], rounded=True)
        if column_node_terms is None:
            column_node_terms = node_terms.new_zeros(graph.column_count)
        terms, column_terms = _terms(rows, node_terms, symmetric), _terms(columns, column_node_terms, symmetric)
    else:
        column_log_sums = log_sums
    given = [rows], [columns], [log_sums], [column_log_sums], [terms], [column_terms]
    return nodes_gradients([graph], *given, [messages.shape[1]], symmetric)[0]


def neighbor_conv_terms(
    upstream, messages, output, messages_gradient, product_precision, column_upstream=None, column_messages=None
) -> Tensor:
    # A graph of values alone, which are rounded alike whatever the nodes are.
    graph = NeighborGraph(upstream, None, product_precision, column_upstream, 0)
    upstream, messages, output = matrices("rows", [upstream, messages, output], graph.row_count)
    own = other = Side(messages, upstream, None)
    if graph.has_columns:
        other = Side(*matrices("columns", [column_messages, column_upstream], graph.column_count), None)
    powers, none = value_powers([graph], [own], [other]), [None]
    values = both_values([graph], [other], powers, none, none, rounded=True)
    if graph.has_columns:
        values = both_values([graph], [own], powers, none, none, values, rounded=True)
    symmetric = messages_gradient is not None
    of_messages = messages_gradient.contiguous() if symmetric else output
    (terms,), _ = _node_terms([graph], values, [output], [(of_messages, int(symmetric))], symmetric, False)
    return terms.d


def gradients(
    graphs: Sequence[NeighborGraph], sides: Sequence[Side], outputs, log_sums, transposed: tuple[float, float], needs
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the nodes and of the messages of graphs whose columns are their rows, None where not needed.

    transposed: the shares of the transposed normalization.  needs: of each graph's nodes and messages, one of them.
    """
    symmetric, upstream = transposed[0] == transposed[1], [side.upstream for side in sides]
    if not any(nodes for nodes, _ in needs):
        return [None] * len(graphs), convolutions(graphs, upstream, log_sums, log_sums, transposed)
    none, widths = [None] * len(graphs), [x.shape[1] for x in upstream]
    values = both_values(graphs, sides, value_powers(graphs, sides, sides), none, none, rounded=True)
    partial: list[tuple[Tensor, int]] = [(x, 0) for x in outputs]
    if symmetric or any(messages for _, messages in needs):

        def convolve(graphs, values, upstream, log_sums):
            operands, powers = [x.upstream for x in values], [x.powers[1] for x in values]
            found, parts = _weighted(graphs, operands, powers, upstream, log_sums, log_sums, transposed)
            return [(x, parts) for x in found]

        partial = by_kind(convolve, graphs, widths, values, upstream, log_sums)
    terms, of_messages = _node_terms(graphs, values, outputs, partial, symmetric, True)

    def move(graphs, values, log_sums, terms, widths):
        return nodes_gradients(graphs, values, values, log_sums, log_sums, terms, terms, widths, symmetric)

    moved = [k for k, (nodes, _) in enumerate(needs) if nodes]
    some, wide, *given = at(moved, graphs, widths, values, log_sums, terms, widths)
    of_nodes: list[Tensor | None] = [None] * len(graphs)
    for k, gradient in zip(moved, by_kind(move, some, wide, *given), strict=True):
        of_nodes[k] = gradient
    return of_nodes, [x if wanted else None for x, (_, wanted) in zip(of_messages, needs, strict=True)]


@planned
def _terms_launch(symmetric: bool, adds: bool, name: str) -> Launch:
    product = PRODUCTS[name]
    return launch(
        neighbor_terms, SYMMETRIC=symmetric, ADDS=adds, SCALED=product.limited, SPLIT=product.split,
        BLOCK_ROWS=TERMS_ROWS, BLOCK_WIDTH=PARTS_WIDTH, SUM=product.SUM,
    )  # fmt: skip


def _node_terms(
    graphs, values: Sequence[Values], outputs, partial: Sequence[tuple[Tensor, int]], symmetric: bool, adds: bool
) -> tuple[list[Terms], list[Tensor]]:
    """The terms that the products of these values of the rows are added to, and the messages' gradients, which come in
    so many parts. Without ``adds`` the node terms alone, in the place of d.
    """
    rows = outputs[0].shape[0]
    terms = [Terms(x.new_empty(rows), x.new_empty(rows)) for x in outputs]
    of_messages = [x.new_empty(y.shape) if parts > 1 else x for (x, parts), y in zip(partial, outputs, strict=True)]
    products = [kind.form.product for kind in kinds_of(graphs, [x.shape[1] for x in outputs])]
    for product in dict.fromkeys(products):
        here = [k for k, other in enumerate(products) if other is product]
        sides = [[(values[k].upstream, values[k].powers[1]) for k in here],
                 [(values[k].messages, values[k].powers[0]) for k in here]]  # fmt: skip
        operands = [
            (tuple([x.rows for x, _ in side]), tuple([x.numbers for x, _ in side]), tuple([x.centre for x, _ in side]),
             tuple([x.centre if power is None else power for x, power in side]))
            for side in sides
        ]  # fmt: skip
        with on_device(outputs[0]):
            _terms_launch(symmetric, adds, product.name)(
                (cdiv(rows, TERMS_ROWS), len(here)), tuple([terms[k].d for k in here]),
                tuple([terms[k].e for k in here]), *operands[0], *operands[1], tuple([outputs[k] for k in here]),
                tuple([partial[k][0] for k in here]), tuple([of_messages[k] for k in here]),
                tuple([outputs[k].shape[1] for k in here]), tuple([values[k].messages.centre.shape[0] for k in here]),
                tuple([16 * partial[k][1] for k in here]), rows,
            )  # fmt: skip
    return terms, of_messages


@planned
def _walk(flags: tuple[bool, bool, bool], *numbers) -> tuple[tuple[int, ...], int, Launch]:
    grid, parts, constants = walk_of("neighbor_gradients", *numbers)
    symmetric, has_upstream, scaled = flags
    return grid, parts, launch(
        neighbor_gradients, SYMMETRIC=symmetric, HAS_UPSTREAM=has_upstream, SCALED=scaled, **constants
    )  # fmt: skip


def nodes_gradients(
    graphs: Sequence[NeighborGraph], rows: Sequence[Values], columns: Sequence[Values], log_sums, column_log_sums,
    terms: Sequence[Terms], column_terms: Sequence[Terms], widths: Sequence[int], symmetric: bool,
) -> list[Tensor]:  # fmt: skip
    """Of graphs of one kind; widths: of the messages."""
    graph = graphs[0]
    has_upstream, is_wide = columns[0].upstream is not None, graph.is_wide(widths[0])
    all_powers = [x.d for x in terms]
    longest = graph.tile_product(max(widths)).longest
    if longest is not None:
        of_stages = zip(graphs, rows, terms, column_terms, strict=True)
        all_powers = [_all_powers(longest, *of_stage) for of_stage in of_stages]
    sides = node_operands(graphs, [graph.form(max(widths))] * len(graphs))
    of_rows, of_columns = ([of_graph[k] for of_graph in sides] for k in range(2))
    log_sums = [x.contiguous() for x in log_sums]
    # A row alone weighs its columns by its own log-sums.
    missing = log_sums[0].new_zeros(graph.column_count) if column_log_sums[0] is None else None
    column_log_sums = [missing if x is None else x.contiguous() for x in column_log_sums]
    if is_wide:
        of_stages = zip(graphs, log_sums, column_log_sums, rows, columns, terms, column_terms, all_powers, strict=True)
        return [strips.nodes_gradient(*of_stage, symmetric) for of_stage in of_stages]
    flags = symmetric, has_upstream, longest is not None
    grid, parts, sum_gradients = _walk(flags, *numbers_of(graphs, max(widths)))
    gradients = [of_parts(graph.nodes, parts, *graph.nodes.shape) for graph in graphs]
    dims = tuple([graph.dim for graph in graphs])
    with on_device(graph.nodes):
        sum_gradients(
            grid, tuple(x.rows for x in of_rows), tuple(x.numbers for x in of_rows), tuple(log_sums),
            tuple(x.rows for x in of_columns), tuple(x.numbers for x in of_columns), tuple(column_log_sums),
            tuple(x.centre for x in of_columns),
            tuple(x.messages.rows for x in rows), tuple(x.upstream.rows for x in rows),
            tuple(x.messages.rows for x in columns),
            tuple((x.upstream if has_upstream else x.messages).rows for x in columns), tuple(x.d for x in terms),
            tuple(x.e for x in terms), tuple(x.d for x in column_terms), tuple(x.e for x in column_terms),
            tuple(gradients), tuple(all_powers), variances(graphs), dims, graph.row_count, graph.column_count,
            graph.offset, parts,
        )  # fmt: skip
    return complete(graphs, dims, parts, gradients, None, None, ONE)[0]


def _terms(values: Values, node_terms: Tensor, symmetric: bool) -> Terms:
    """Node terms, and what messages and upstream about their centres leave to be added to their products."""
    count = len(node_terms)
    of_messages = values.messages.numbers[:count]
    if values.upstream is None:
        return Terms(node_terms, of_messages)
    of_upstream = values.upstream.numbers[:count]
    if symmetric:
        return Terms(node_terms, of_messages + of_upstream)
    return Terms(node_terms + of_upstream, of_messages)


def _all_powers(longest: float, graph: Graph, own: Values, *terms: Terms) -> Tensor:
    """Powers of two for messages, upstream and M, |M| ≤ v (4 times the longest messages' and upstream's product and
    twice the largest terms)."""
    largest = torch.stack([x.d.abs().amax() for x in terms]).amax()
    products = longest**2 / (own.powers[0] * own.powers[1])
    return torch.stack([*own.powers, power_of_two(graph.inverse_variance * (4 * products + 2 * largest))])
