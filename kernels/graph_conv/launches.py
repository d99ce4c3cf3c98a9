"""graph_conv on GPUs: the launches of ``tiles``."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    LARGEST_FLOAT16,
    architecture,
    divide,
    matrices,
    multiprocessors,
    on_device,
    padded_width,
    power_of_two,
    product_of,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.operands import Operand, centred, means, operands, stored_width
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
        self._operands: dict[int, tuple[Operand, Operand]] = {}

    def is_wide(self, width: int = 1) -> bool:
        """Whether rows of nodes or of ``width`` do not fit a program's registers."""
        return padded_width(self.dim, width) > largest_width(self.arch, self.product.name)

    def is_small(self, width: int) -> bool:
        """Whether values of ``width`` go to the kernels of small batches."""
        return is_small(self.row_count, self.has_columns, self.dim, width)

    def stages(self) -> small.Stages:
        """What the kernels of small batches take."""
        return small.Stages([self.nodes], [self.inverse_variance], self.arch, self.product)

    def operands(self, width: int) -> tuple[Operand, Operand]:
        """The nodes of the rows and of the columns as products take them, stored in ``width`` columns."""
        if width not in self._operands:
            (columns,) = rows = centred([self.columns], self.product, [width])
            if self.has_columns:
                rows = operands([self.nodes], self.product, [width], [columns.centre])
            self._operands[width] = rows[0], columns
        return self._operands[width]

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


@dataclass(frozen=True)
class Side:
    """Messages, upstream and degrees of the rows or of the columns; the last two may be missing."""

    messages: Tensor
    upstream: Tensor | None
    degrees: Tensor | None


@dataclass(frozen=True)
class Values:
    """H and G times factors of their rows, H' and G', of the rows or of the columns as products take them; and what
    float16 has them multiplied by. G' of columns may be missing.
    """

    messages: Operand
    upstream: Operand | None
    powers: tuple[Tensor | None, Tensor | None]

    def with_numbers(self, terms: Tensor) -> Tensor:
        """The node terms and what H' and G' leave to be added to their products."""
        for x in (self.messages, self.upstream):
            if x is not None:
                terms = terms + x.numbers[: len(terms)]
        return terms


def _is_row(normalization: str) -> bool:
    if normalization not in ("row", "symmetric"):
        raise ValueError(f"normalization must be 'row' or 'symmetric', got {normalization!r}")
    return normalization == "row"


def graph_degrees(nodes, inverse_variance, product_precision, column_nodes=None, offset=0) -> Tensor:
    return _degrees(Graph(nodes, inverse_variance, product_precision, column_nodes, offset))


def _degrees(graph: Graph) -> Tensor:
    if graph.is_wide():
        return strips.kernel_sums(graph, None, None, 1)[1]
    grid, parts, constants = graph.launch("graph_degree_sums")
    rows, columns = graph.operands(constants["WIDTH"])
    degrees = graph.nodes.new_empty(parts, graph.row_count)
    with on_device(graph.nodes):
        launch(graph_degree_sums, **constants)(
            grid, rows.rows, rows.numbers, columns.rows, columns.numbers, degrees, graph.inverse_variance,
            graph.row_count, graph.column_count, graph.offset, parts,
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
        values, power = _values(graph, columns, None)
        return _kernel_times(graph, values, power, columns, None, INVERSE, with_degrees=True)
    if graph.has_columns and (degrees is None or column_degrees is None):
        raise ValueError("symmetric normalization with a column set needs both sides' degrees")
    degrees = degrees.clone() if graph.has_columns else _degrees(graph)
    factor = factor_of(column_degrees if graph.has_columns else degrees, INVERSE_ROOT)
    return _kernel_times(graph, *_values(graph, columns, factor), columns, degrees, INVERSE_ROOT)


def _value_width(graph: Graph, width: int) -> int:
    return stored_width(width, graph.is_wide(width))


def _values(graph: Graph, values: Tensor, factor: Tensor | None) -> tuple[Operand, Tensor | None]:
    """Values times their factor about their mean, and what float16 has them multiplied by."""
    power = power_of_two(_longest(values)) if graph.product.scaled else None
    widths = [_value_width(graph, values.shape[1])]
    centres = means([values], graph.product, widths, [factor])
    return operands([values], graph.product, widths, centres, factors=[factor], powers=[power])[0], power


def _kernel_times(graph, values: Operand, power, like, row_degrees, row_factor, with_degrees=False):
    """f_i Σ_j K_ij values_j, as wide as ``like``, and the degrees."""
    width = like.shape[1]
    if graph.is_wide(width):
        output, sums = strips.kernel_sums(graph, values, power, width)
        degrees = sums if with_degrees else row_degrees
        factor = factor_of(degrees, row_factor)
        return output if factor is None else output * factor[:, None], degrees
    grid, parts, constants = graph.launch("graph_sums", width)
    rows, columns = graph.operands(constants["WIDTH"])
    output = like.new_empty(parts, graph.row_count, width)
    sums = like.new_empty(parts, graph.row_count) if with_degrees else output
    with on_device(like):
        launch(
            graph_sums, DEGREES=with_degrees, ROW_FACTOR=row_factor, SCALED=graph.product.scaled, **constants
        )(
            grid, rows.rows, rows.numbers, columns.rows, columns.numbers, values.rows, values.centre,
            like if row_degrees is None else row_degrees, output, sums, like if power is None else power,
            graph.inverse_variance, width, graph.row_count, graph.column_count, graph.offset, parts,
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
    if needs[0] and terms is None and graph.has_columns:
        raise ValueError("the nodes' gradient with a column set needs node_terms")
    column_values = _both_values(graph, other, is_row, _powers(graph, own, other))
    messages_gradient = None
    if needs[1] or (needs[0] and not (graph.has_columns or is_row)):
        messages_gradient = _messages_gradient(graph, own, column_values, is_row)
    if needs[0]:
        if terms is None:
            terms = column_terms = _terms(own, output, messages_gradient, is_row)
        if graph.has_columns and column_terms is None:
            column_terms = terms.new_zeros(graph.column_count)
        values = _both_values(graph, own, is_row, column_values.powers, column_values)
        gradients.append(_nodes_gradient(graph, values, column_values, terms, column_terms, messages.shape[1]))
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


def _both_values(graph: Graph, side: Side, is_row: bool, powers, columns: Values | None = None) -> Values:
    """A side's H' and G', about the centres of the ``columns``, or of their own where the side is the columns."""
    if columns is not None and not graph.has_columns:
        return columns
    factors = [factor_of(side.degrees, ONE if is_row else INVERSE_ROOT)]
    values = [side.messages]
    if side.upstream is not None:
        values.append(side.upstream)
        factors.append(factor_of(side.degrees, INVERSE if is_row else INVERSE_ROOT))
    widths = [_value_width(graph, side.messages.shape[1])] * len(values)
    if columns is None:
        centres = means(values, graph.product, widths, factors)
    else:
        of_messages = columns.messages.centre
        centres = [
            of_messages, torch.zeros_like(of_messages) if columns.upstream is None else columns.upstream.centre
        ]  # fmt: skip
    # Where there is no G' of columns, nothing is added to products for H'.
    others = centres[::-1] if len(values) == 2 else [torch.zeros_like(centres[0])]
    made = operands(
        values, graph.product, widths, centres, others=others, factors=factors, powers=powers[: len(values)]
    )
    return Values(made[0], made[1] if len(made) == 2 else None, powers)


def _messages_gradient(graph: Graph, own: Side, columns: Values, is_row: bool) -> Tensor:
    """dH of the rows."""
    if columns.upstream is None:
        return torch.zeros_like(own.messages)
    row_factor = ONE if is_row else INVERSE_ROOT
    return _kernel_times(graph, columns.upstream, columns.powers[1], own.messages, own.degrees, row_factor)[0]


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


def _nodes_gradient(graph: Graph, own: Values, other: Values, terms, column_terms, width: int) -> Tensor:
    terms, column_terms = own.with_numbers(terms), other.with_numbers(column_terms)
    powers = terms
    if graph.product.scaled:
        # Of M = v K (…), whose terms are bounded by the product of the longest H' and G', in ``powers`` 2^14 long.
        bound = 4 * LARGEST_FLOAT16**2 * graph.inverse_variance / (own.powers[0] * own.powers[1])
        powers = torch.stack([*own.powers, power_of_two(bound)])
    if graph.is_wide(width):
        return strips.nodes_gradient(graph, own, other, terms, column_terms, powers, width)
    grid, parts, constants = graph.launch("graph_gradients", width)
    rows, columns = graph.operands(constants["WIDTH"])
    upstream = other.messages if other.upstream is None else other.upstream
    gradient = graph.nodes.new_empty(parts, *graph.nodes.shape)
    with on_device(graph.nodes):
        launch(
            graph_gradients, HAS_UPSTREAM=other.upstream is not None, SCALED=graph.product.scaled, **constants
        )(
            grid, rows.rows, rows.numbers, columns.rows, columns.numbers, columns.centre, own.messages.rows,
            own.upstream.rows, other.messages.rows, upstream.rows, terms, column_terms, gradient, powers,
            graph.inverse_variance, graph.dim, graph.row_count, graph.column_count, graph.offset, parts,
        )  # fmt: skip
    return gradient[0] if parts == 1 else gradient.sum(dim=0)


def _longest(*matrices: Tensor | None) -> Tensor:
    """The length of the longest row."""
    lengths = [torch.linalg.vector_norm(x, dim=1).amax() for x in matrices if x is not None]
    return torch.stack(lengths).amax() if len(lengths) > 1 else lengths[0]


def _powers(graph: Graph, own: Side, other: Side) -> tuple[Tensor | None, Tensor | None]:
    """Powers of two for H' and G' in float16: rows have degrees ≥ 1, so H and G bound H' and G'."""
    if not graph.product.scaled:
        return None, None
    sides = [own] if other is own else [own, other]
    return tuple(power_of_two(_longest(*(getattr(x, name) for x in sides))) for name in ("messages", "upstream"))
