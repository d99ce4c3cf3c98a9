"""neighbor_sums on GPUs: the launches of ``sum_tiles``, each of all stages of one kind."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.kernels.common import small
from gkd_fast.kernels.common.launch import PRODUCTS, cdiv, lengthened, on_device
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.strips import aligned, column_strips, entry_bytes, multiply, row_strips, strip_columns
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.graph_conv.graphs import (
    Graph,
    by_kind,
    kinds_of,
    node_arguments,
    node_operands,
    numbers_of,
    variances,
    walk_of,
)  # fmt: skip
from gkd_fast.kernels.graph_conv.small import Stages
from gkd_fast.kernels.neighbor_conv.launches import finer
from gkd_fast.kernels.neighbor_conv.sum_tiles import neighbor_small_sums, neighbor_sum_parts
from gkd_fast.kernels.neighbor_conv.sum_tiles import neighbor_sums as neighbor_sums_kernel

PARTS_ROWS = 128

# l(v), l(2v) and the means of x under p and q, each of all stages.
Sums = tuple[tuple[Tensor, ...], ...]


def neighbor_sums(nodes, inverse_variance, product_precision, column_nodes=None, offset=0) -> tuple[Tensor, ...]:
    graph = Graph(nodes, inverse_variance, finer(product_precision), column_nodes, offset)
    found = small_sums(graph.stages()) if graph.is_small(1) else sums([graph])
    return tuple(of_stages[0] for of_stages in found)


@planned
def _walk(*numbers) -> tuple[tuple[int, ...], int, Launch]:
    grid, parts, constants = walk_of("graph_degree_sums", *numbers)
    return grid, parts, launch(neighbor_sums_kernel, STRIP=False, **constants)


def sums(graphs: Sequence[Graph], bandwidths: Sequence[Tensor] | None = None) -> Sums:
    """Of graphs of one kind; bandwidths: in the place of the graphs' own inverse variances."""
    return _complete(graphs, *partial_sums(graphs, bandwidths))


def partial_sums(graphs: Sequence[Graph], bandwidths: Sequence[Tensor] | None = None) -> tuple[Sums, int]:
    """``sums``, [parts, rows] each, and the number of parts."""
    graph, known = graphs[0], variances(graphs) if bandwidths is None else tuple(bandwidths)
    are_bandwidths = int(bandwidths is not None)
    if graph.is_wide():
        node_operands(graphs, [graph.form()] * len(graphs))
        found = [_of_strips(graph, x, are_bandwidths) for graph, x in zip(graphs, known, strict=True)]
        return tuple(zip(*found, strict=True)), 1
    grid, parts, walked = _walk(*numbers_of(graphs))
    partial = _empty(graphs, parts)
    with on_device(graph.nodes):
        walked(
            grid, *lengthened(graph.num_stages, *node_arguments(graphs), *partial, known), are_bandwidths,
            graph.row_count, graph.column_count, graph.offset, parts, graph.row_count,
        )  # fmt: skip
    return partial, parts


def sums_of_all(graphs: Sequence[Graph]) -> Sums:
    """``sums`` of graphs of any kinds."""
    return _complete(graphs, *partial_sums_of_all(graphs))


def partial_sums_of_all(graphs: Sequence[Graph], bandwidths: Sequence[Tensor] | None = None) -> tuple[Sums, int]:
    """``partial_sums`` of graphs of any kinds: of several kinds, which have other numbers of parts, complete ones."""

    def of_kind(graphs, bandwidths=None):
        return zip(*sums(graphs, bandwidths), strict=True)

    kinds, given = kinds_of(graphs, [1] * len(graphs)), [] if bandwidths is None else [bandwidths]
    if kinds.count(kinds[0]) == len(kinds):
        node_operands(graphs, [kind.form for kind in kinds])
        return partial_sums(graphs, bandwidths)
    return tuple(zip(*by_kind(of_kind, graphs, [1] * len(graphs), *given), strict=True)), 1


@planned
def _small_sums(arch: str, product: str) -> Launch:
    constants = small.constants(arch, PRODUCTS[product])
    del constants["SCALED"]
    return launch(neighbor_small_sums, **constants)


def small_sums(stages: Stages, bandwidths: Sequence[Tensor] | None = None) -> Sums:
    """Of small batches."""
    nodes, known = tuple(stages.nodes), tuple(stages.inverse_variances if bandwidths is None else bandwidths)
    count = nodes[0].shape[0]
    found = tuple([tuple([x.new_empty(count, dtype=torch.float64) for x in nodes]) for _ in range(4)])
    with on_device(nodes[0]):
        _small_sums(stages.arch, stages.product.name)(
            (small.row_blocks(count), len(nodes)), nodes, *found, known, int(bandwidths is not None),
            tuple([x.shape[1] for x in nodes]), count,
        )  # fmt: skip
    return found


def _empty(graphs: Sequence[Graph], parts: int) -> Sums:
    """Results, or where columns are divided partial ones of each part."""
    shape = (graphs[0].row_count,) if parts == 1 else (parts, graphs[0].row_count)
    return tuple(tuple(graph.nodes.new_empty(shape, dtype=torch.float64) for graph in graphs) for _ in range(4))


def _complete(graphs: Sequence[Graph], partial: Sums, parts: int) -> Sums:
    if parts == 1:
        return partial
    found, rows = _empty(graphs, 1), graphs[0].row_count
    with on_device(graphs[0].nodes):
        launch(neighbor_sum_parts, BLOCK_ROWS=PARTS_ROWS)(
            (cdiv(rows, PARTS_ROWS), len(graphs)), *lengthened(graphs[0].num_stages, *partial, *found), rows, parts
        )
    return found


def _of_strips(graph: Graph, inverse_variance: Tensor, is_bandwidth: int) -> tuple[Tensor, ...]:
    """Of rows too wide for a program; what a piece of the columns gives is a part."""
    config = tiles("strip", graph.arch, graph.product.name, 16)
    rows, columns = graph.operands(graph.form())
    constants = {
        "STRIP": True, "WIDTH": 16, "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
        "num_warps": config.warps, "num_stages": config.stages, **graph.product.constants(),
    }  # fmt: skip
    strips = list(row_strips(graph.row_count, graph.dim))
    pieces = list(column_strips(graph.column_count, strip_columns(strips[0].stop, entry_bytes(graph.product, 1))))
    partial = _empty([graph], len(pieces))
    with on_device(graph.nodes):
        for strip in strips:
            own, count = rows[strip], strip.stop - strip.start
            for part, piece in enumerate(pieces):
                other = columns[aligned(piece)]
                similarities = multiply(own.rows, other.rows.T)
                out = [(x.view(len(pieces), -1)[part, strip],) for (x,) in partial]
                launch(neighbor_sums_kernel, **constants)(
                    (cdiv(count, config.rows), 1, 1), (similarities,), (own.numbers,), (similarities,),
                    (other.numbers,), *out, (inverse_variance,), is_bandwidth, count, piece.stop - piece.start,
                    graph.offset + strip.start - piece.start, 1, graph.row_count,
                )  # fmt: skip
                del similarities  # before the next ones are made
    return tuple(x for (x,) in _complete([graph], partial, len(pieces)))
