"""graph_conv on GPUs: the launches of ``tiles``."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    Piece,
    architecture,
    column_pieces,
    divide,
    matrices,
    multiprocessors,
    on_device,
    padded_width,
    power_of_two,
    product_of,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.table import largest_width, tiles
from gkd_fast.kernels.graph_conv import small, strips
from gkd_fast.kernels.graph_conv.tiles import graph_degree_sums, graph_gradients, graph_sums, graph_terms

# Factors of a value's row, as in ``tiles``.
ONE, INVERSE, INVERSE_ROOT = range(3)
TERMS_ROWS, TERMS_WIDTH = 16, 128
LEAST_TF32X3_WIDTH = 32


class Graph:
    """Nodes of both sides, the bandwidth and the type of the products."""

    def __init__(self, nodes, inverse_variance, product_precision, column_nodes, offset):
        (self.nodes,) = matrices("nodes", [nodes])
        self.has_columns = column_nodes is not None
        self.columns = matrices("column_nodes", [column_nodes])[0] if self.has_columns else self.nodes
        self.dim = self.nodes.shape[1]
        if self.columns.shape[1] != self.dim:
            raise ValueError(f"column_nodes must have width {self.dim}, got {self.columns.shape[1]}")
        self.offset = offset if self.has_columns else 0
        self.row_count, self.column_count = len(self.nodes), len(self.columns)
        self.inverse_variance = inverse_variance
        self.product = product_of(product_precision, self.nodes)
        self.arch = architecture(self.nodes.device)

    def is_wide(self, width: int = 1) -> bool:
        """Whether rows of nodes or of ``width`` do not fit a program's registers."""
        return padded_width(self.dim, width) > largest_width(self.arch, self.product.name)

    def is_small(self, width: int) -> bool:
        """Whether values of ``width`` go to the kernels of small batches."""
        return is_small(self.row_count, self.has_columns, self.dim, width)

    def stages(self) -> small.Stages:
        """What the kernels of small batches take."""
        return small.Stages([self.nodes], [self.inverse_variance], self.arch, self.product)

    def launch(self, kernel: str, *widths: int):
        """Tile sizes, grid and compile-time arguments of a kernel that walks tiles."""
        config = tiles(kernel, self.arch, self.product.name, padded_width(self.dim, *widths))
        row_blocks = triton.cdiv(self.row_count, config.rows)
        parts = divide(row_blocks, self.column_count, config.columns, multiprocessors(self.nodes.device))
        constants = {
            "WIDTH": self._node_width(kernel, *widths), "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
            "num_warps": config.warps, "num_stages": config.stages,
            **self.product.constants(),
        }  # fmt: skip
        if widths:
            constants["VALUE_WIDTH"] = padded_width(*widths)
        return (row_blocks, parts), parts, constants

    def _node_width(self, kernel: str, *widths: int) -> int:
        """The columns of a tile of nodes.

        Of three tf32 products with nodes in 16 columns beside wider values, ptxas 12.8 (in the wheels of Triton 3.6 and
        3.7) makes code for Hopper that reads descriptors before it sets them, whichever tile is loaded first; with 32
        columns it does not. The issue-slot model predicts 1.1 (values of 64) and 1.7 times (of 32) the time.
        """
        nodes, affected = padded_width(self.dim), self.product.name == "tf32x3" and self.arch == "sm_90"
        if affected and kernel == "graph_gradients" and padded_width(*widths) > nodes:
            return max(LEAST_TF32X3_WIDTH, nodes)
        return nodes

    def pieces(self, columns, factors, constants: dict) -> Iterator[Piece]:
        """Pieces of the columns, nodes first, as a kernel with these compile-time arguments takes them."""
        widths = [constants["WIDTH"], *(constants["VALUE_WIDTH"] for _ in columns[1:])]
        return column_pieces(columns, self.product.torch_type, factors, None, widths, constants["BLOCK_COLUMNS"])


@dataclass(frozen=True)
class Side:
    """Messages, upstream and degrees of the rows or of the columns; the last two may be missing."""

    messages: Tensor
    upstream: Tensor | None
    degrees: Tensor | None


def _is_row(normalization: str) -> bool:
    if normalization not in ("row", "symmetric"):
        raise ValueError(f"normalization must be 'row' or 'symmetric', got {normalization!r}")
    return normalization == "row"


def graph_degrees(nodes, inverse_variance, product_precision, column_nodes=None, offset=0) -> Tensor:
    return _degrees(Graph(nodes, inverse_variance, product_precision, column_nodes, offset))


def _degrees(graph: Graph) -> Tensor:
    if graph.is_wide():
        return strips.kernel_sums(graph, None, None)[1]
    grid, parts, constants = graph.launch("graph_degree_sums")
    degrees = graph.nodes.new_empty(parts, graph.row_count)
    with on_device(graph.nodes):
        for piece in graph.pieces([graph.columns], [None], constants):
            launch(graph_degree_sums, ALIGNED=piece.aligned, **constants)(
                grid, graph.nodes, piece.matrices[0], degrees, graph.inverse_variance, graph.dim, graph.row_count,
                piece.count, graph.offset - piece.start, parts, int(piece.start > 0),
            )  # fmt: skip
        return degrees[0] if parts == 1 else degrees.sum(dim=0)


def factor_of(degrees: Tensor | None, factor: int) -> Tensor | None:
    if factor == ONE:
        return None
    return degrees.reciprocal() if factor == INVERSE else degrees.rsqrt()


def graph_conv(
    nodes, messages, inverse_variance, normalization, product_precision, column_nodes=None, column_messages=None,
    offset=0, degrees=None, column_degrees=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    graph = Graph(nodes, inverse_variance, product_precision, column_nodes, offset)
    if (column_nodes is None) != (column_messages is None):
        raise ValueError("column_nodes and column_messages go together")
    (messages,) = matrices("messages", [messages], graph.row_count)
    if graph.is_small(messages.shape[1]):
        (output,), (degrees,) = small.graph_conv(graph.stages(), [messages], _is_row(normalization))
        return output, degrees
    columns = messages
    if graph.has_columns:
        (columns,) = matrices("column_messages", [column_messages], graph.column_count)
    if _is_row(normalization):
        return _kernel_times(graph, columns, None, None, ONE, INVERSE, with_degrees=True)
    if graph.has_columns:
        if degrees is None or column_degrees is None:
            raise ValueError("symmetric normalization with a column set needs both sides' degrees")
        output, _ = _kernel_times(graph, columns, degrees, column_degrees, INVERSE_ROOT, INVERSE_ROOT)
        return output, degrees.clone()
    degrees = _degrees(graph)
    return _kernel_times(graph, columns, degrees, degrees, INVERSE_ROOT, INVERSE_ROOT)


def _kernel_times(graph, values, row_degrees, column_degrees, column_factor, row_factor, with_degrees=False):
    """f_i Σ_j K_ij f_j values_j and the degrees."""
    width = values.shape[1]
    if graph.is_wide(width):
        output, sums = strips.kernel_sums(graph, values, factor_of(column_degrees, column_factor))
        degrees = sums if with_degrees else row_degrees
        factor = factor_of(degrees, row_factor)
        return output if factor is None else output * factor[:, None], degrees
    grid, parts, constants = graph.launch("graph_sums", width)
    factor = factor_of(column_degrees, column_factor)
    power = values
    if graph.product.scaled:
        power = power_of_two(values.abs().amax())
        factor = power.expand(len(values)) if factor is None else factor * power
    columns, factors = (graph.columns, values), (None, factor)
    output = values.new_empty(parts, graph.row_count, width)
    sums = values.new_empty(parts, graph.row_count) if with_degrees else output
    with on_device(values):
        for piece in graph.pieces(columns, factors, constants):
            launch(
                graph_sums, DEGREES=with_degrees, ROW_FACTOR=row_factor, SCALED=graph.product.scaled,
                ALIGNED=piece.aligned, **constants,
            )(
                grid, graph.nodes, *piece.matrices, values if row_degrees is None else row_degrees, output, sums, power,
                graph.inverse_variance, graph.dim, width, graph.row_count, piece.count, graph.offset - piece.start,
                parts, int(piece.start > 0), int(piece.is_last),
            )  # fmt: skip
        if parts == 1:
            return output[0], sums[0] if with_degrees else row_degrees
        output = output.sum(dim=0)
        degrees = sums.sum(dim=0) if with_degrees else row_degrees
        factor = factor_of(degrees, row_factor)
        return output if factor is None else output * factor[:, None], degrees


def graph_conv_backward(
    upstream, nodes, messages, output, degrees, inverse_variance, normalization, product_precision, needs,
    column_nodes=None, column_messages=None, offset=0, column_upstream=None, column_degrees=None, node_terms=None,
    column_node_terms=None,
) -> list[Tensor]:  # fmt: skip
    graph = Graph(nodes, inverse_variance, product_precision, column_nodes, offset)
    is_row = _is_row(normalization)
    if len(needs) != 2:
        raise ValueError(f"needs must have 2 entries, got {len(needs)}")
    upstream, messages, output = matrices("upstream, messages, output", [upstream, messages, output], graph.row_count)
    degrees = degrees.contiguous()
    if graph.is_small(messages.shape[1]):
        return small.graph_conv_backward(graph.stages(), [upstream], [messages], [output], [degrees], is_row, needs)
    own = other = Side(messages, upstream, degrees)
    if graph.has_columns:
        other = _column_side(graph, is_row, column_messages, column_upstream, column_degrees)
    terms, column_terms, gradients = node_terms, column_node_terms, []
    messages_gradient = None
    if needs[1] or not (graph.has_columns or is_row):
        messages_gradient = _messages_gradient(graph, own, other, is_row)
    if needs[0]:
        if terms is None and graph.has_columns:
            raise ValueError("the nodes' gradient with a column set needs node_terms")
        if terms is None:
            terms = column_terms = _terms(own, output, messages_gradient, is_row)
        if graph.has_columns and column_terms is None:
            column_terms = terms.new_zeros(graph.column_count)
        gradients.append(_nodes_gradient(graph, own, other, terms.contiguous(), column_terms.contiguous(), is_row))
    if needs[1]:
        gradients.append(messages_gradient)
    return gradients


def _column_side(graph, is_row, messages, upstream, degrees) -> Side:
    if messages is None:
        raise ValueError("column_nodes and column_messages go together")
    if degrees is None and (not is_row or upstream is not None):
        raise ValueError("column_degrees are missing")
    (messages,) = matrices("column_messages", [messages], graph.column_count)
    if upstream is not None:
        (upstream,) = matrices("column_upstream", [upstream], graph.column_count)
    return Side(messages, upstream, None if degrees is None else degrees.contiguous())


def _messages_gradient(graph, own, other, is_row) -> Tensor:
    """dH of the rows."""
    if other.upstream is None:
        return torch.zeros_like(own.messages)
    factors = (INVERSE, ONE) if is_row else (INVERSE_ROOT, INVERSE_ROOT)
    return _kernel_times(graph, other.upstream, own.degrees, other.degrees, *factors)[0]


def _terms(own: Side, output: Tensor, messages_gradient: Tensor | None, is_row: bool) -> Tensor:
    """d_i = −(G_i·Y_i)/deg_i (row) or −(G_i·Y_i + H_i·dH_i)/(2 deg_i) (symmetric)."""
    rows, width = output.shape
    terms = torch.empty_like(own.degrees)
    sum_type = triton.language.float64 if output.dtype == torch.float64 else triton.language.float32
    with on_device(output):
        launch(graph_terms, SYMMETRIC=not is_row, BLOCK_ROWS=TERMS_ROWS, BLOCK_WIDTH=TERMS_WIDTH, SUM=sum_type)(
            (triton.cdiv(rows, TERMS_ROWS),), terms, own.upstream, output, own.messages,
            output if is_row else messages_gradient, own.degrees, width, rows,
        )  # fmt: skip
    return terms


def _nodes_gradient(graph, own, other, terms, column_terms, is_row) -> Tensor:
    width = own.messages.shape[1]
    message_factor, upstream_factor = (ONE, INVERSE) if is_row else (INVERSE_ROOT, INVERSE_ROOT)
    powers, powers_of = terms, (None, None)
    if graph.product.scaled:
        powers = _powers(graph, own, other)
        powers_of = powers[0], powers[1]
    if graph.is_wide(width):
        factors = [
            None
            if side.degrees is None
            else (factor_of(side.degrees, message_factor), factor_of(side.degrees, upstream_factor))
            for side in (own, other)
        ]
        return strips.nodes_gradient(graph, own, other, factors, terms, column_terms, powers)
    grid, parts, constants = graph.launch("graph_gradients", width)
    columns, factors = [graph.columns], [None]
    has_upstream = other.upstream is not None
    sides = ((other.messages, message_factor, powers_of[0]), (other.upstream, upstream_factor, powers_of[1]))
    for values, kind, power in sides[: 1 + has_upstream]:
        factor = factor_of(other.degrees, kind)
        if power is not None:
            factor = power.expand(len(values)) if factor is None else factor * power
        columns.append(values)
        factors.append(factor)
    gradient = graph.nodes.new_empty(parts, *graph.nodes.shape)
    with on_device(graph.nodes):
        for piece in graph.pieces(columns, factors, constants):
            piece_nodes, piece_messages, *piece_upstream = piece.matrices
            launch(
                graph_gradients, HAS_UPSTREAM=has_upstream, MESSAGE_FACTOR=message_factor,
                UPSTREAM_FACTOR=upstream_factor, SCALED=graph.product.scaled, ALIGNED=piece.aligned, **constants,
            )(
                grid, graph.nodes, piece_nodes, own.messages, own.upstream, piece_messages,
                piece_upstream[0] if has_upstream else piece_messages, own.degrees, terms,
                column_terms[piece.start :], gradient, powers, graph.inverse_variance, graph.dim, width,
                graph.row_count, piece.count, graph.offset - piece.start, parts, int(piece.start > 0),
            )  # fmt: skip
    return gradient[0] if parts == 1 else gradient.sum(dim=0)


def _powers(graph: Graph, own: Side, other: Side) -> Tensor:
    """Powers of two for H', G' and M in float16: rows have degrees ≥ 1, so H and G bound H' and G'."""

    def largest(x: Tensor, y: Tensor | None) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=1).amax()
        return norms if y is None or y is x else torch.maximum(norms, torch.linalg.vector_norm(y, dim=1).amax())

    messages, upstream = largest(own.messages, other.messages), largest(own.upstream, other.upstream)
    bound = 4 * messages * upstream * graph.inverse_variance
    return torch.stack([power_of_two(messages), power_of_two(upstream), power_of_two(bound)])
