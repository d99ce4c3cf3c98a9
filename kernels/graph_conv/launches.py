"""graph_conv on GPUs: the launches of ``tiles``, each of all stages of one kind (``kind``)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    LARGEST_FLOAT16,
    cdiv,
    divide,
    matrices,
    multiprocessors,
    on_device,
    padded_width,
    power_of_two,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.operands import Operand, means, operands, stored_width
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.graph_conv import small, strips
from gkd_fast.kernels.graph_conv.graphs import Graph, node_operands
from gkd_fast.kernels.graph_conv.tiles import graph_degree_sums, graph_gradients, graph_parts, graph_sums, graph_terms

# Factors of a value's row, as in ``tiles``.
ONE, INVERSE, INVERSE_ROOT = range(3)
TERMS_ROWS, TERMS_WIDTH = 16, 128
PARTS_ROWS, PARTS_WIDTH = 16, 64
LEAST_TF32X3_WIDTH = 32


def _walk(graphs: Sequence[Graph], kernel: str, *widths: int):
    """Grid, number of parts and compile-time arguments of a kernel that walks tiles."""
    graph = graphs[0]
    config = tiles(kernel, graph.arch, graph.product.name, padded_width(graph.dim, *widths))
    row_blocks = cdiv(graph.row_count, config.rows)
    processors = multiprocessors(graph.nodes.device)
    parts = divide(row_blocks * len(graphs), graph.column_count, config.columns, processors)
    constants = {
        "WIDTH": _node_width(graph, kernel, *widths), "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
        "num_warps": config.warps, "num_stages": config.stages,
        **graph.product.constants(),
    }  # fmt: skip
    if widths:
        constants["VALUE_WIDTH"] = padded_width(*widths)
    return (row_blocks, parts, len(graphs)), parts, constants


def _node_width(graph: Graph, kernel: str, *widths: int) -> int:
    """The columns of a tile of nodes.

    Of three tf32 products with nodes in 16 columns beside wider values, ptxas 12.8 (in the wheels of Triton 3.6 and
    3.7) makes code for Hopper that reads descriptors before it sets them, whichever tile is loaded first; with 32
    columns it does not. The issue-slot model predicts 1.1 (values of 64) and 1.7 times (of 32) the time.
    """
    nodes, affected = padded_width(graph.dim), graph.product.name == "tf32x3" and graph.arch == "sm_90"
    if affected and kernel == "graph_gradients" and padded_width(*widths) > nodes:
        return max(LEAST_TF32X3_WIDTH, nodes)
    return nodes


def _node_arguments(graphs: Sequence[Graph], width: int) -> tuple[tuple[Tensor, ...], ...]:
    """Rows and numbers of the rows and of the columns."""
    sides = node_operands(graphs, width)
    return (
        tuple(rows.rows for rows, _ in sides), tuple(rows.numbers for rows, _ in sides),
        tuple(columns.rows for _, columns in sides), tuple(columns.numbers for _, columns in sides),
    )  # fmt: skip


def _variances(graphs: Sequence[Graph]) -> tuple[Tensor, ...]:
    return tuple(graph.inverse_variance for graph in graphs)


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
        """Node terms that a caller gave, and what H' and G' leave to be added to their products."""
        for x in (self.messages, self.upstream):
            if x is not None:
                terms = terms + x.numbers[: len(terms)]
        return terms


def _is_row(normalization: str) -> bool:
    if normalization not in ("row", "symmetric"):
        raise ValueError(f"normalization must be 'row' or 'symmetric', got {normalization!r}")
    return normalization == "row"


def graph_degrees(nodes, inverse_variance, product_precision, column_nodes=None, offset=0) -> Tensor:
    return _degrees([Graph(nodes, inverse_variance, product_precision, column_nodes, offset)])[0]


def _degrees(graphs: Sequence[Graph]) -> list[Tensor]:
    if graphs[0].is_wide():
        node_operands(graphs, stored_width(graphs[0].dim, True))
        return [strips.kernel_sums(graph, None, None, 1)[1] for graph in graphs]
    grid, parts, constants = _walk(graphs, "graph_degree_sums")
    graph = graphs[0]
    found = [_of_parts(graph.nodes, parts, graph.row_count) for graph in graphs]
    with on_device(graph.nodes):
        launch(graph_degree_sums, **constants)(
            grid, *_node_arguments(graphs, constants["WIDTH"]), tuple(found), _variances(graphs), graph.row_count,
            graph.column_count, graph.offset, parts,
        )  # fmt: skip
    return _complete(graphs, [0] * len(graphs), parts, found, found, None, ONE)[1]


def factors_of(degrees: Sequence[Tensor | None], factor: int) -> list[Tensor | None]:
    if factor == ONE:
        return [None] * len(degrees)
    return torch._foreach_reciprocal(degrees) if factor == INVERSE else torch._foreach_rsqrt(degrees)


def graph_conv(
    nodes, messages, inverse_variance, normalization, product_precision, column_nodes=None, column_messages=None,
    offset=0, degrees=None, column_degrees=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    graph = Graph(nodes, inverse_variance, product_precision, column_nodes, offset)
    if (column_nodes is None) != (column_messages is None):
        raise ValueError("column_nodes and column_messages go together")
    (messages,) = matrices("messages", [messages], graph.row_count)
    is_row = _is_row(normalization)
    if graph.is_small(messages.shape[1]):
        (output,), (degrees,) = small.graph_conv(graph.stages(), [messages], is_row)
        return output, degrees
    known = None
    if graph.has_columns:
        (messages,) = matrices("column_messages", [column_messages], graph.column_count)
        if not is_row and (degrees is None or column_degrees is None):
            raise ValueError("symmetric normalization with a column set needs both sides' degrees")
        known = None if is_row else ([degrees.clone()], [column_degrees])
    (output,), (degrees,) = convolutions([graph], [messages], is_row, known)
    return output, degrees


def convolutions(
    graphs: Sequence[Graph], messages: Sequence[Tensor], is_row: bool, degrees=None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and degrees of graphs of one kind; messages: the columns'. degrees: known ones, of rows and columns."""
    if is_row:
        values, powers = _values(graphs, messages, [None] * len(graphs))
        return _kernel_times(graphs, values, powers, messages, None, INVERSE)
    rows, columns = degrees or [_degrees(graphs)] * 2
    values, powers = _values(graphs, messages, factors_of(columns, INVERSE_ROOT))
    return _kernel_times(graphs, values, powers, messages, rows, INVERSE_ROOT)


def _value_width(graph: Graph, width: int) -> int:
    return stored_width(width, graph.is_wide(width))


def _values(graphs, values: Sequence[Tensor], factors) -> tuple[list[Operand], list[Tensor | None]]:
    """Values times their factors about their means, and what float16 has them multiplied by."""
    product = graphs[0].product
    powers = [power_of_two(_longest(x)) if product.scaled else None for x in values]
    widths = [_value_width(graph, x.shape[1]) for graph, x in zip(graphs, values, strict=True)]
    centres = means(values, product, widths, factors)
    return operands(values, product, widths, centres, factors=factors, powers=powers), powers


def _kernel_times(
    graphs: Sequence[Graph], values: Sequence[Operand], powers, like: Sequence[Tensor], row_degrees, row_factor: int
) -> tuple[list[Tensor], list[Tensor]]:
    """f_i Σ_j K_ij values_j, as wide as ``like``, and the degrees, which are found where they are not known."""
    graph, widths = graphs[0], [x.shape[1] for x in like]
    if graph.is_wide(widths[0]):
        node_operands(graphs, stored_width(graph.dim, True))
        of_stages = [strips.kernel_sums(*stage) for stage in zip(graphs, values, powers, widths, strict=True)]
        degrees = [sums for _, sums in of_stages] if row_degrees is None else row_degrees
        factors = factors_of(degrees, row_factor)
        return [
            output if factor is None else output * factor[:, None]
            for (output, _), factor in zip(of_stages, factors, strict=True)
        ], degrees
    grid, parts, constants = _walk(graphs, "graph_sums", max(widths))
    with_degrees = row_degrees is None
    outputs = [_of_parts(x, parts, graph.row_count, width) for x, width in zip(like, widths, strict=True)]
    sums = [_of_parts(x, parts, graph.row_count) for x in like] if with_degrees else outputs
    with on_device(graph.nodes):
        launch(
            graph_sums, DEGREES=with_degrees, ROW_FACTOR=row_factor, SCALED=graph.product.scaled, **constants
        )(
            grid, *_node_arguments(graphs, constants["WIDTH"]), tuple(x.rows for x in values),
            tuple(x.centre for x in values), tuple(row_degrees or like), tuple(outputs), tuple(sums),
            tuple(x if p is None else p for x, p in zip(like, powers, strict=True)), _variances(graphs), tuple(widths),
            graph.row_count, graph.column_count, graph.offset, parts,
        )  # fmt: skip
    return _complete(graphs, widths, parts, outputs, sums if with_degrees else None, row_degrees, row_factor)


def _of_parts(like: Tensor, parts: int, *shape: int) -> Tensor:
    """What a launch writes: a result, or where its columns are divided a partial one of each part."""
    return like.new_empty(shape if parts == 1 else (parts, *shape))


def _complete(graphs, widths, parts: int, outputs, sums, row_degrees, row_factor: int):
    """Outputs and degrees, as ``_of_parts`` allocates them, with their parts added; width 0: degrees alone."""
    degrees = row_degrees
    if parts == 1:
        return outputs, degrees if sums is None else sums
    graph, partial = graphs[0], outputs
    if any(widths):
        outputs = [x.new_empty(graph.row_count, width) for x, width in zip(partial, widths, strict=True)]
    if sums is not None:
        degrees = [x.new_empty(graph.row_count) for x in sums]
    sum_type = triton.language.float64 if graph.nodes.dtype == torch.float64 else triton.language.float32
    with on_device(graph.nodes):
        launch(
            graph_parts, DEGREES=sums is not None, ROW_FACTOR=row_factor, BLOCK_ROWS=PARTS_ROWS,
            BLOCK_WIDTH=PARTS_WIDTH, SUM=sum_type,
        )(
            (cdiv(graph.row_count, PARTS_ROWS), len(graphs)), tuple(partial), tuple(sums or partial),
            tuple(degrees or partial), tuple(outputs), tuple(degrees or partial), tuple(widths), graph.row_count, parts,
        )  # fmt: skip
    return outputs, degrees


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
    given = None
    if graph.has_columns:
        other = _column_side(graph, is_row, column_messages, column_upstream, column_degrees)
        if needs[0] and node_terms is None:
            raise ValueError("the nodes' gradient with a column set needs node_terms")
        given = node_terms, column_node_terms
    of_nodes, of_messages = convolution_gradients([graph], [own], [other], [output], is_row, [needs], given)
    return [x for x in (*of_nodes, *of_messages) if x is not None]


def convolution_gradients(
    graphs: Sequence[Graph], own: Sequence[Side], other: Sequence[Side], outputs, is_row: bool, needs, given=None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the nodes and of the messages of graphs of one kind, None where not needed.

    needs: of each graph's nodes and messages. given: the node terms of a graph with a column set, and the columns'.
    """
    powers = [_powers(graph, *sides) for graph, *sides in zip(graphs, own, other, strict=True)]
    columns = _both_values(graphs, other, is_row, powers)
    of_nodes: list[Tensor | None] = [None] * len(graphs)
    of_messages: list[Tensor | None] = [None] * len(graphs)
    read = given is None and not is_row
    convolved = [k for k, (nodes, messages) in enumerate(needs) if messages or (nodes and read)]
    if convolved:
        found = _messages_gradients(*_at(convolved, graphs, own, columns), is_row)
        for k, gradient in zip(convolved, found, strict=True):
            of_messages[k] = gradient
    moved = [k for k, (nodes, _) in enumerate(needs) if nodes]
    if moved:
        some, sides, values, read_outputs, read_gradients = _at(moved, graphs, own, columns, outputs, of_messages)
        rows = values
        if given is None:
            terms = column_terms = _terms(some, sides, values, read_outputs, read_gradients, is_row)
        else:
            rows = _both_values(some, sides, is_row, _at(moved, powers)[0], values)
            of_columns = given[1] if given[1] is not None else given[0].new_zeros(some[0].column_count)
            terms, column_terms = [rows[0].with_numbers(given[0])], [values[0].with_numbers(of_columns)]
        widths = [side.messages.shape[1] for side in sides]
        found = _nodes_gradients(some, rows, values, terms, column_terms, widths)
        for k, gradient in zip(moved, found, strict=True):
            of_nodes[k] = gradient
    return of_nodes, [x if wanted else None for x, (_, wanted) in zip(of_messages, needs, strict=True)]


def _at(places: Sequence[int], *lists: Sequence) -> list[list]:
    return [[values[k] for k in places] for values in lists]


def _column_side(graph, is_row, messages, upstream, degrees) -> Side:
    if messages is None:
        raise ValueError("column_nodes and column_messages go together")
    if degrees is None and (not is_row or upstream is not None):
        raise ValueError("column_degrees are missing")
    (messages,) = matrices("column_messages", [messages], graph.column_count)
    if upstream is not None:
        (upstream,) = matrices("column_upstream", [upstream], graph.column_count)
    return Side(messages, upstream, None if degrees is None else degrees.contiguous())


def _both_values(graphs, sides: Sequence[Side], is_row: bool, powers, columns=None) -> list[Values]:
    """H' and G' of the sides, about the centres of the ``columns``, or of their own where the sides are the columns."""
    has_upstream = sides[0].upstream is not None
    kinds = 2 if has_upstream else 1
    values = [x for side in sides for x in (side.messages, side.upstream)[:kinds]]
    degrees = [side.degrees for side in sides]
    of_messages = factors_of(degrees, ONE if is_row else INVERSE_ROOT)
    of_upstream = of_messages
    if is_row and has_upstream:
        of_upstream = factors_of(degrees, INVERSE)
    factors = [x for both in zip(of_messages, of_upstream, strict=True) for x in both[:kinds]]
    widths = [
        _value_width(graph, side.messages.shape[1])
        for graph, side in zip(graphs, sides, strict=True) for _ in range(kinds)
    ]  # fmt: skip
    if columns is None:
        centres = means(values, graphs[0].product, widths, factors)
    else:
        centres = []
        for x in columns:
            of_other = torch.zeros_like(x.messages.centre) if x.upstream is None else x.upstream.centre
            centres += [x.messages.centre, of_other][:kinds]
    # Where there is no G' of columns, nothing is added to products for H'.
    others = [torch.zeros_like(x) for x in centres]
    if has_upstream:
        others = [centres[k ^ 1] for k in range(len(centres))]
    made = operands(
        values, graphs[0].product, widths, centres, others=others, factors=factors,
        powers=[x for both in powers for x in both[:kinds]],
    )  # fmt: skip
    return [
        Values(made[kinds * k], made[kinds * k + 1] if has_upstream else None, powers[k]) for k in range(len(graphs))
    ]


def _messages_gradients(graphs, own: Sequence[Side], columns: Sequence[Values], is_row: bool) -> list[Tensor]:
    """dH of the rows."""
    messages = [side.messages for side in own]
    if columns[0].upstream is None:
        return [torch.zeros_like(x) for x in messages]
    upstream, powers = [x.upstream for x in columns], [x.powers[1] for x in columns]
    row_factor = ONE if is_row else INVERSE_ROOT
    return _kernel_times(graphs, upstream, powers, messages, [side.degrees for side in own], row_factor)[0]


def _terms(graphs, own: Sequence[Side], values: Sequence[Values], outputs, of_messages, is_row: bool) -> list[Tensor]:
    """d_i = −(G_i·Y_i)/deg_i (row) or −(G_i·Y_i + H_i·dH_i)/(2 deg_i) (symmetric), and the numbers of H' and G'."""
    terms = [torch.empty_like(side.degrees) for side in own]
    sum_type = triton.language.float64 if outputs[0].dtype == torch.float64 else triton.language.float32
    rows = len(outputs[0])
    with on_device(outputs[0]):
        launch(graph_terms, SYMMETRIC=not is_row, BLOCK_ROWS=TERMS_ROWS, BLOCK_WIDTH=TERMS_WIDTH, SUM=sum_type)(
            (cdiv(rows, TERMS_ROWS), len(graphs)), tuple(terms), tuple(side.upstream for side in own),
            tuple(outputs), tuple(side.messages for side in own), tuple(outputs if is_row else of_messages),
            tuple(side.degrees for side in own), tuple(x.messages.numbers for x in values),
            tuple(x.upstream.numbers for x in values), tuple(x.shape[1] for x in outputs), rows,
        )  # fmt: skip
    return terms


def _nodes_gradients(
    graphs, own: Sequence[Values], other: Sequence[Values], terms, column_terms, widths
) -> list[Tensor]:
    graph, powers = graphs[0], terms
    if graph.product.scaled:
        powers = [_all_powers(*of_stage) for of_stage in zip(graphs, own, strict=True)]
    if graph.is_wide(widths[0]):
        node_operands(graphs, stored_width(graph.dim, True))
        of_stages = zip(graphs, own, other, terms, column_terms, powers, widths, strict=True)
        return [strips.nodes_gradient(*stage) for stage in of_stages]
    grid, parts, constants = _walk(graphs, "graph_gradients", max(widths))
    has_upstream, columns = other[0].upstream is not None, node_operands(graphs, constants["WIDTH"])
    gradients = [_of_parts(graph.nodes, parts, *graph.nodes.shape) for graph in graphs]
    dims = tuple(graph.dim for graph in graphs)
    with on_device(graph.nodes):
        launch(
            graph_gradients, HAS_UPSTREAM=has_upstream, SCALED=graph.product.scaled, **constants
        )(
            grid, *_node_arguments(graphs, constants["WIDTH"]), tuple(x.centre for _, x in columns),
            tuple(x.messages.rows for x in own), tuple(x.upstream.rows for x in own),
            tuple(x.messages.rows for x in other),
            tuple((x.upstream if has_upstream else x.messages).rows for x in other), tuple(terms), tuple(column_terms),
            tuple(gradients), tuple(powers), _variances(graphs), dims, graph.row_count, graph.column_count,
            graph.offset, parts,
        )  # fmt: skip
    return _complete(graphs, dims, parts, gradients, None, None, ONE)[0]


def _all_powers(graph: Graph, own: Values) -> Tensor:
    """Powers of two for H', G' and M = v K (…), whose terms are bounded by the product of the longest H' and G', in
    ``powers`` 2^14 long.
    """
    bound = 4 * LARGEST_FLOAT16**2 * graph.inverse_variance / (own.powers[0] * own.powers[1])
    return torch.stack([*own.powers, power_of_two(bound)])


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
