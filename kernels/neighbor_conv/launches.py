"""neighbor_conv on GPUs: graph_conv's launches with the log-sums in their graphs' numbers, and those of ``tiles``."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import PRODUCTS, cdiv, lengthened, matrices, on_device, power_of_two
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.operands import ROW_MULTIPLE, Operand
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.graph_conv.graphs import (
    Form,
    Graph,
    kinds_of,
    node_operands,
    numbers_of,
    of_parts,
    variances,
    walk_of,
)
from gkd_fast.kernels.graph_conv.launches import complete, weighted_sums
from gkd_fast.kernels.graph_conv.values import ONE, Side, Values, both_values, convolved_values, value_powers
from gkd_fast.kernels.neighbor_conv import small, strips
from gkd_fast.kernels.neighbor_conv.tiles import neighbor_gradients, neighbor_levels

# The shares of l_i and of l_j in the exponents.
SHARES = {"row": (1.0, 0.0), "column": (0.0, 1.0), "symmetric": (0.5, 0.5)}


class NeighborGraph(Graph):
    """The graph over the other nodes."""

    diagonal = 0.0

    def at_levels(self, form: Form, rows: Operand, columns: Operand) -> "NeighborGraph":
        """The same graph with these operands of its nodes, whose numbers are levels."""
        graph = copy(self)
        graph._operands = {form: (rows, columns)}
        return graph


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
    return weighted(graphs, made, powers, values, log_sums, column_log_sums, shares)


def weighted(
    graphs: Sequence[NeighborGraph], values: Sequence[Operand], powers, like: Sequence[Tensor], log_sums,
    column_log_sums, shares: tuple[float, float],
) -> list[Tensor]:  # fmt: skip
    """Σ_j A_ij values_j, as wide as ``like``."""
    forms = [kind.form for kind in kinds_of(graphs, [x.shape[1] for x in like])]
    sides = node_operands(graphs, forms)
    rows, columns = ([of_graph[k] for of_graph in sides] for k in range(2))
    of_rows = of_columns = _levels(graphs, rows, log_sums, shares[0])
    if graphs[0].has_columns or shares[0] != shares[1]:
        of_columns = _levels(graphs, columns, column_log_sums, shares[1])
    of_graphs = zip(graphs, forms, of_rows, of_columns, strict=True)
    levelled = [graph.at_levels(*of_graph) for graph, *of_graph in of_graphs]
    # In the place of the degrees, which a factor of one makes nothing of, numbers of as many rows.
    return weighted_sums(levelled, values, powers, like, [x.numbers for x in of_rows], ONE)[0]


@planned
def _levels_launch(share: float, product: str) -> Launch:
    return launch(neighbor_levels, SHARE=share, BLOCK_ROWS=ROW_MULTIPLE, SUM=PRODUCTS[product].SUM)


def _levels(graphs: Sequence[Graph], sides: Sequence[Operand], log_sums, share: float) -> list[Operand]:
    """The operands of one side of every graph with levels for numbers."""
    if share == 0:
        return list(sides)
    levels = [graph.prepared.levels.get(key) for graph, key in zip(graphs, _keys(graphs, sides, share), strict=True)]
    if None in levels or graphs[0].has_columns:
        levels = _launch_levels(graphs, sides, [x.contiguous() for x in log_sums], log_sums, 1, share)
    return [replace(x, numbers=level) for x, level in zip(sides, levels, strict=True)]


def with_levels(
    graphs: Sequence[Graph], widths: Sequence[int], partial: Sequence[Tensor], parts: int, share: float
) -> list[Tensor]:
    """Log-sums of their parts [parts, rows], of graphs whose rows are their columns, beside values of ``widths``; the
    levels, which the same launch makes, are left to what multiplies these."""
    count = graphs[0].row_count
    log_sums = list(partial) if parts == 1 else [x.new_empty(count) for x in partial]
    forms = [kind.form for kind in kinds_of(graphs, widths)]
    _launch_levels(graphs, [rows for rows, _ in node_operands(graphs, forms)], partial, log_sums, parts, share)
    return log_sums


def _launch_levels(
    graphs: Sequence[Graph], sides: Sequence[Operand], partial, log_sums, parts: int, share: float
) -> list[Tensor]:
    """Of nodes that are their own columns they are kept, for the backward pass too."""
    levels, graph, count = [torch.empty_like(x.numbers) for x in sides], graphs[0], log_sums[0].shape[0]
    with on_device(levels[0]):
        _levels_launch(share, graph.product.name)(
            (cdiv(count, ROW_MULTIPLE), len(levels)), *lengthened(
                graph.num_stages, [x.numbers for x in sides], partial, log_sums, variances(graphs), levels,
            ), count, parts,
        )  # fmt: skip
    if not graph.has_columns:
        graph.prepared.levels.update(zip(_keys(graphs, sides, share), levels, strict=True))
    return levels


def _keys(graphs: Sequence[Graph], sides: Sequence[Operand], share: float) -> list[tuple]:
    """By which levels are kept."""
    return [(x.place, side.rows.dtype, side.numbers.dtype, share) for x, side in zip(graphs, sides, strict=True)]


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
    else:
        column_log_sums, column_node_terms = log_sums, node_terms
    values = both_sides([graph], [own], [other])
    given = [log_sums], [column_log_sums], [node_terms], [column_node_terms]
    return nodes_gradients([graph], *values, [messages.shape[1]], *given, symmetric)[0]


@planned
def _walk(flags: tuple[bool, bool, bool], *numbers) -> tuple[tuple[int, ...], int, Launch]:
    grid, parts, constants = walk_of("neighbor_gradients", *numbers)
    symmetric, has_upstream, scaled = flags
    return grid, parts, launch(
        neighbor_gradients, SYMMETRIC=symmetric, HAS_UPSTREAM=has_upstream, SCALED=scaled, **constants
    )  # fmt: skip


def both_sides(
    graphs: Sequence[NeighborGraph], own: Sequence[Side], other: Sequence[Side]
) -> tuple[list[Values], list[Values]]:
    """Messages and upstream of the rows and of the columns as products take them."""
    none = [None] * len(graphs)
    powers = value_powers(graphs, own, other)
    columns = rows = both_values(graphs, other, powers, none, none)
    if graphs[0].has_columns:
        rows = both_values(graphs, own, powers, none, none, columns)
    return rows, columns


def nodes_gradients(
    graphs: Sequence[NeighborGraph], rows: Sequence[Values], columns: Sequence[Values], widths: Sequence[int], log_sums,
    column_log_sums, node_terms, column_node_terms, symmetric: bool,
) -> list[Tensor]:  # fmt: skip
    """Of graphs of one kind; widths: the messages'."""
    graph = graphs[0]
    has_upstream, is_wide = columns[0].upstream is not None, graph.is_wide(widths[0])
    terms = [_terms(x, d, symmetric) for x, d in zip(rows, node_terms, strict=True)]
    column_terms = terms
    if graph.has_columns:
        given = [
            x.new_zeros(graph.column_count) if d is None else d
            for x, d in zip(node_terms, column_node_terms, strict=True)
        ]
        column_terms = [_terms(x, d, symmetric) for x, d in zip(columns, given, strict=True)]
    all_powers = [x.d for x in terms]
    longest = graph.tile_product(max(widths)).longest
    if longest is not None:
        of_stages = zip(graphs, rows, terms, column_terms, strict=True)
        all_powers = [_all_powers(longest, *of_stage) for of_stage in of_stages]
    sides = node_operands(graphs, [graph.form(max(widths))] * len(graphs))
    of_rows, of_columns = ([of_graph[k] for of_graph in sides] for k in range(2))
    share = max(SHARES["symmetric" if symmetric else "row"])  # as that of the weights
    levels = column_levels = _levels(graphs, of_rows, log_sums, share)
    if graph.has_columns:
        # A row alone weighs its columns by its own log-sums.
        reads = symmetric or has_upstream
        column_levels = _levels(graphs, of_columns, column_log_sums, share) if reads else of_columns
    if is_wide:
        of_stages = zip(graphs, levels, column_levels, rows, columns, terms, column_terms, all_powers, strict=True)
        return [strips.nodes_gradient(*of_stage, symmetric) for of_stage in of_stages]
    flags = symmetric, has_upstream, longest is not None
    grid, parts, sum_gradients = _walk(flags, *numbers_of(graphs, max(widths)))
    gradients = [of_parts(graph.nodes, parts, *graph.nodes.shape) for graph in graphs]
    dims = tuple([graph.dim for graph in graphs])
    with on_device(graph.nodes):
        sum_gradients(
            grid, tuple(x.rows for x in of_rows), tuple(x.numbers for x in of_rows), tuple(x.numbers for x in levels),
            tuple(x.rows for x in of_columns), tuple(x.numbers for x in of_columns),
            tuple(x.numbers for x in column_levels), tuple(x.centre for x in of_columns),
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
