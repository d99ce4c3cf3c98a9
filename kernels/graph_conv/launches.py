"""graph_conv on GPUs: the launches of ``tiles``, of all stages of one kind (``by_kind``) or of all stages."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, lengthened, matrices, on_device
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.operands import Operand
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.graph_conv import small, strips
from gkd_fast.kernels.graph_conv.graphs import (
    Graph,
    Others,
    by_kind,
    node_arguments,
    node_operands,
    numbers_of,
    of_parts,
    share_constants,
    variances,
    walk_of,
)  # fmt: skip
from gkd_fast.kernels.graph_conv.small import at
from gkd_fast.kernels.graph_conv.tiles import graph_degree_sums, graph_gradients, graph_parts, graph_sums, graph_terms
from gkd_fast.kernels.graph_conv.values import (
    INVERSE,
    INVERSE_ROOT,
    ONE,
    Side,
    Values,
    all_powers,
    both_values,
    column_side,
    convolved_values,
    factors_of,
    value_powers,
)  # fmt: skip

TERMS_ROWS, TERMS_WIDTH = 16, 128
PARTS_ROWS, PARTS_WIDTH = 16, 64


KERNELS = {kernel.__name__: kernel for kernel in (graph_degree_sums, graph_sums, graph_gradients)}


def _walking(graphs: Sequence[Graph], kernel: str, *widths: int, **flags) -> tuple[tuple, int, Launch]:
    """Of a kernel that walks tiles: grid, number of parts, and its launch."""
    return _bound(kernel, tuple(flags.items()), *numbers_of(graphs, *widths))


@planned
def _bound(kernel: str, flags: tuple[tuple, ...], *numbers) -> tuple[tuple, int, Launch]:
    grid, parts, constants = walk_of(kernel, *numbers)
    return grid, parts, launch(KERNELS[kernel], **dict(flags), **constants)


@planned
def _parts_launch(dtype: torch.dtype) -> Launch:
    return launch(graph_parts, BLOCK_ROWS=PARTS_ROWS, BLOCK_WIDTH=PARTS_WIDTH, SUM=_sum_type(dtype))


@planned
def _terms_launch(is_row: bool, dtype: torch.dtype) -> Launch:
    constants = {"BLOCK_ROWS": TERMS_ROWS, "BLOCK_WIDTH": TERMS_WIDTH, "SUM": _sum_type(dtype)}
    return launch(graph_terms, SYMMETRIC=not is_row, **constants)


def _sum_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _is_row(normalization: str) -> bool:
    if normalization not in ("row", "symmetric"):
        raise ValueError(f"normalization must be 'row' or 'symmetric', got {normalization!r}")
    return normalization == "row"


def graph_degrees(nodes, inverse_variance, product_precision, column_nodes=None, offset=0) -> Tensor:
    return _degrees([Graph(nodes, inverse_variance, product_precision, column_nodes, offset)])[0]


def _degrees(graphs: Sequence[Graph]) -> list[Tensor]:
    return by_kind(_degrees_of_kind, graphs, [1] * len(graphs))


def _degrees_of_kind(graphs: Sequence[Graph]) -> list[Tensor]:
    if graphs[0].is_wide():
        return [strips.kernel_sums(graph, None, None, 1)[1] for graph in graphs]
    grid, parts, degree_sums = _walking(graphs, "graph_degree_sums")
    graph = graphs[0]
    found = [of_parts(graph.nodes, parts, graph.row_count) for _ in graphs]
    with on_device(graph.nodes):
        degree_sums(
            grid, *node_arguments(graphs), tuple(found), variances(graphs), graph.row_count,
            graph.column_count, graph.offset, parts,
        )  # fmt: skip
    return complete(graphs, [0] * len(graphs), parts, found, found, None, ONE)[1]


def graph_conv(
    nodes, messages, inverse_variance, normalization, product_precision, column_nodes=None, column_messages=None,
    offset=0, degrees=None, column_degrees=None, *, prepared=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    graph = Graph(nodes, inverse_variance, product_precision, column_nodes, offset, prepared)
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
    """Outputs and degrees; messages: the columns'. degrees: known ones, of rows and columns."""
    if is_row:
        values, powers = convolved_values(graphs, messages, [None] * len(graphs))
        return weighted_sums(graphs, values, powers, messages, None, INVERSE)
    rows, columns = degrees or [_degrees(graphs)] * 2
    values, powers = convolved_values(graphs, messages, factors_of(columns, INVERSE_ROOT))
    return weighted_sums(graphs, values, powers, messages, rows, INVERSE_ROOT)


def weighted_sums(
    graphs: Sequence[Graph], values: Sequence[Operand], powers, like: Sequence[Tensor], row_degrees, row_factor: int
) -> tuple[list[Tensor], list[Tensor]]:
    """f_i Σ_j K_ij values_j, as wide as ``like``, and the degrees, which are found where they are not known."""

    def of_kind(graphs, values, powers, like, degrees):
        known = None if row_degrees is None else degrees
        return zip(*sums_of_kind(graphs, values, powers, like, known, row_factor), strict=True)

    widths = [x.shape[1] for x in like]
    outputs, degrees = zip(*by_kind(of_kind, graphs, widths, values, powers, like, row_degrees or like), strict=True)
    return list(outputs), list(degrees)


def sums_of_kind(graphs, values, powers, like, row_degrees, row_factor: int, others: Sequence[Others] | None = None):
    """``weighted_sums`` of graphs of one kind; of those over the others, which have no degrees, the outputs of the
    columns' parts, and how many these are.
    """
    graph, widths = graphs[0], [x.shape[1] for x in like]
    if graph.is_wide(widths[0]):
        given = zip(graphs, values, powers, widths, others or [None] * len(graphs), strict=True)
        of_stages = [strips.kernel_sums(*of_stage) for of_stage in given]
        if others is not None:
            return [output for output, _ in of_stages], 1
        degrees = [sums for _, sums in of_stages] if row_degrees is None else row_degrees
        factors = factors_of(degrees, row_factor)
        return [
            output if factor is None else output * factor[:, None]
            for (output, _), factor in zip(of_stages, factors, strict=True)
        ], degrees
    with_degrees = row_degrees is None and others is None
    width = max(widths)
    grid, parts, sum_values = _walking(
        graphs, "graph_sums", width, DEGREES=with_degrees, ROW_FACTOR=row_factor,
        SCALED=graph.tile_product(width).limited, **share_constants(others and others[0]), DIAGONAL=graph.diagonal,
    )  # fmt: skip
    outputs = [of_parts(graph.nodes, parts, graph.row_count, width) for width in widths]
    sums = [of_parts(graph.nodes, parts, graph.row_count) for _ in like] if with_degrees else outputs
    log_sums = [tuple([x[side] for x in others]) if others else tuple(outputs) for side in (1, 2)]
    with on_device(graph.nodes):
        sum_values(
            grid, *node_arguments(graphs, width), tuple([x.rows for x in values]),
            tuple([x.centre for x in values]), *log_sums, tuple(row_degrees or outputs), tuple(outputs), tuple(sums),
            tuple([x if p is None else p for x, p in zip(outputs, powers, strict=True)]), variances(graphs),
            tuple(widths), graph.row_count, graph.column_count, graph.offset, parts,
        )  # fmt: skip
    if others is not None:
        return outputs, parts
    return complete(graphs, widths, parts, outputs, sums if with_degrees else None, row_degrees, row_factor)


def complete(graphs, widths, parts: int, outputs, sums, row_degrees, row_factor: int):
    """Outputs and degrees, as ``of_parts`` allocates them, with their parts added; width 0: degrees alone."""
    degrees = row_degrees
    if parts == 1:
        return outputs, degrees if sums is None else sums
    graph, partial = graphs[0], outputs
    if any(widths):
        outputs = [x.new_empty(graph.row_count, width) for x, width in zip(partial, widths, strict=True)]
    if sums is not None:
        degrees = [x.new_empty(graph.row_count) for x in sums]
    with on_device(graph.nodes):
        _parts_launch(graph.nodes.dtype)(
            (cdiv(graph.row_count, PARTS_ROWS), len(graphs)), *lengthened(
                graph.num_stages, partial, sums or partial, degrees or partial, outputs, degrees or partial, widths
            ), graph.row_count, parts, int(sums is not None), row_factor,
        )  # fmt: skip
    return outputs, degrees


def graph_conv_backward(
    upstream, nodes, messages, output, degrees, inverse_variance, normalization, product_precision, needs,
    column_nodes=None, column_messages=None, offset=0, column_upstream=None, column_degrees=None, node_terms=None,
    column_node_terms=None, *, prepared=None,
) -> list[Tensor]:  # fmt: skip
    graph = Graph(nodes, inverse_variance, product_precision, column_nodes, offset, prepared)
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
        other = column_side(graph, is_row, column_messages, column_upstream, column_degrees)
        if needs[0] and node_terms is None:
            raise ValueError("the nodes' gradient with a column set needs node_terms")
        given = node_terms, column_node_terms
    of_nodes, of_messages = convolution_gradients([graph], [own], [other], [output], is_row, [needs], given)
    return [x for x in (*of_nodes, *of_messages) if x is not None]


def convolution_gradients(
    graphs: Sequence[Graph], own: Sequence[Side], other: Sequence[Side], outputs, is_row: bool, needs, given=None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the nodes and of the messages, None where not needed.

    needs: of each graph's nodes and messages. given: the node terms of a graph with a column set, and the columns'.
    """
    powers = value_powers(graphs, own, other)
    columns = both_values(graphs, other, powers, *_factors(other, is_row))
    of_nodes: list[Tensor | None] = [None] * len(graphs)
    of_messages: list[Tensor | None] = [None] * len(graphs)
    read = given is None and not is_row
    convolved = [k for k, (nodes, messages) in enumerate(needs) if messages or (nodes and read)]
    if convolved:
        found = _messages_gradients(*at(convolved, graphs, own, columns), is_row)
        for k, gradient in zip(convolved, found, strict=True):
            of_messages[k] = gradient
    moved = [k for k, (nodes, _) in enumerate(needs) if nodes]
    if moved:
        some, sides, values, read_outputs, read_gradients = at(moved, graphs, own, columns, outputs, of_messages)
        rows = values
        if given is None:
            terms = column_terms = _terms(some, sides, values, read_outputs, read_gradients, is_row)
        else:
            rows = both_values(some, sides, at(moved, powers)[0], *_factors(sides, is_row), values)
            of_columns = given[1] if given[1] is not None else given[0].new_zeros(some[0].column_count)
            terms, column_terms = [rows[0].with_numbers(given[0])], [values[0].with_numbers(of_columns)]
        widths = [side.messages.shape[1] for side in sides]
        found = by_kind(_nodes_gradients, some, widths, rows, values, terms, column_terms, widths)
        for k, gradient in zip(moved, found, strict=True):
            of_nodes[k] = gradient
    return of_nodes, [x if wanted else None for x, (_, wanted) in zip(of_messages, needs, strict=True)]


def _factors(sides: Sequence[Side], is_row: bool) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What H and G are multiplied by."""
    degrees = [side.degrees for side in sides]
    of_messages = factors_of(degrees, ONE if is_row else INVERSE_ROOT)
    return of_messages, factors_of(degrees, INVERSE) if is_row and sides[0].upstream is not None else of_messages


def _messages_gradients(graphs, own: Sequence[Side], columns: Sequence[Values], is_row: bool) -> list[Tensor]:
    """dH of the rows."""
    messages = [side.messages for side in own]
    if columns[0].upstream is None:
        return [graph.nodes.new_zeros(x.shape) for graph, x in zip(graphs, messages, strict=True)]
    upstream, powers = [x.upstream for x in columns], [x.powers[1] for x in columns]
    row_factor = ONE if is_row else INVERSE_ROOT
    return weighted_sums(graphs, upstream, powers, messages, [side.degrees for side in own], row_factor)[0]


def _terms(graphs, own: Sequence[Side], values: Sequence[Values], outputs, of_messages, is_row: bool) -> list[Tensor]:
    """d_i = −(G_i·Y_i)/deg_i (row) or −(G_i·Y_i + H_i·dH_i)/(2 deg_i) (symmetric), and the numbers of H' and G'."""
    terms = [torch.empty_like(side.degrees) for side in own]
    rows = outputs[0].shape[0]
    with on_device(outputs[0]):
        _terms_launch(is_row, outputs[0].dtype)(
            (cdiv(rows, TERMS_ROWS), len(graphs)), tuple(terms), tuple([side.upstream for side in own]),
            tuple(outputs), tuple([side.messages for side in own]), tuple(outputs if is_row else of_messages),
            tuple([side.degrees for side in own]), tuple([x.messages.numbers for x in values]),
            tuple([x.upstream.numbers for x in values]), tuple([x.shape[1] for x in outputs]), rows,
        )  # fmt: skip
    return terms


def _nodes_gradients(
    graphs, own: Sequence[Values], other: Sequence[Values], terms, column_terms, widths
) -> list[Tensor]:
    graph, powers = graphs[0], terms
    width = max(widths)
    longest = graph.tile_product(width).longest
    if longest is not None:
        powers = all_powers(graphs, own, longest)
    if graph.is_wide(widths[0]):
        of_stages = zip(graphs, own, other, terms, column_terms, powers, widths, strict=True)
        return [strips.nodes_gradient(*stage) for stage in of_stages]
    has_upstream = other[0].upstream is not None
    grid, parts, sum_gradients = _walking(
        graphs, "graph_gradients", width, HAS_UPSTREAM=has_upstream, SCALED=longest is not None
    )
    columns = node_operands(graphs, [graph.form(width) for graph in graphs])
    gradients = [of_parts(graph.nodes, parts, *graph.nodes.shape) for graph in graphs]
    dims = tuple([graph.dim for graph in graphs])
    with on_device(graph.nodes):
        sum_gradients(
            grid, *node_arguments(graphs, width), tuple([x.centre for _, x in columns]),
            tuple([x.messages.rows for x in own]), tuple([x.upstream.rows for x in own]),
            tuple([x.messages.rows for x in other]),
            tuple([(x.upstream if has_upstream else x.messages).rows for x in other]), tuple(terms),
            tuple(column_terms), tuple(gradients), tuple(powers), variances(graphs), dims, graph.row_count,
            graph.column_count, graph.offset, parts,
        )  # fmt: skip
    return complete(graphs, dims, parts, gradients, None, None, ONE)[0]
