"""The graphs that graph_conv's launches take, and how a launch of several walks their tiles."""

from collections.abc import Callable, Sequence

from torch import Tensor

from gkd_fast.kernels.common.launch import (
    PRODUCTS,
    architecture,
    cdiv,
    divide,
    matrices,
    multiprocessors,
    padded_width,
    product_of,
)  # fmt: skip
from gkd_fast.kernels.common.operands import Operand, Prepared, centred, operands, stored_width
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.table import largest_width, tiles
from gkd_fast.kernels.graph_conv import small

LEAST_TF32X3_WIDTH = 32


class Graph:
    """Nodes of both sides, the bandwidth and the type of the products.

    place: of the nodes among the prepared.  stages: as many as the call has.
    """

    # The weight of a node beside itself.
    diagonal = 1.0

    def __init__(
        self, nodes, inverse_variance, product_precision, column_nodes, offset, prepared: Prepared | None = None,
        place: int = 0, stages: int = 1,
    ):  # fmt: skip
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
        self.prepared, self.place, self.num_stages = prepared or Prepared(), place, stages
        self._operands: dict[int, tuple[Operand, Operand]] = {}

    def is_wide(self, width: int = 1) -> bool:
        """Whether rows of nodes or of ``width`` do not fit a program's registers."""
        return self.kind(width)[0]

    def is_small(self, width: int) -> bool:
        """Whether values of ``width`` go to the kernels of small batches."""
        return is_small(self.row_count, self.has_columns, self.dim, width)

    def stages(self) -> small.Stages:
        """What the kernels of small batches take."""
        return small.Stages([self.nodes], [self.inverse_variance], self.arch, self.product)

    def operands(self, width: int) -> tuple[Operand, Operand]:
        """The nodes of the rows and of the columns as products take them, stored in ``width`` columns."""
        return node_operands([self], [width])[0]

    def kind(self, width: int) -> tuple:
        """What graphs with values of ``width`` have in common that share their launches."""
        return _kind(self.dim, width, self.arch, self.product.name)


@planned
def _kind(dim: int, width: int, arch: str, product: str) -> tuple[bool, int, int]:
    is_wide = padded_width(dim, width) > largest_width(arch, product)
    return is_wide, stored_width(dim, is_wide), stored_width(width, is_wide)


def node_operands(graphs: Sequence[Graph], widths: Sequence[int]) -> list[tuple[Operand, Operand]]:
    """``Graph.operands`` of all, of whatever kinds, made together and once."""
    missing = [k for k, width in enumerate(widths) if width not in graphs[k]._operands]
    if missing:
        some, product, stored = [graphs[k] for k in missing], graphs[0].product, [widths[k] for k in missing]
        nodes = [graph.nodes for graph in some]
        if graphs[0].has_columns:
            columns = centred([graph.columns for graph in some], product, stored)
            rows = operands(nodes, product, stored, [x.centre for x in columns])
        else:
            rows = columns = graphs[0].prepared.centred([graph.place for graph in some], nodes, product, stored)
        for graph, width, *sides in zip(some, stored, rows, columns, strict=True):
            graph._operands[width] = tuple(sides)
    return [graph._operands[width] for graph, width in zip(graphs, widths, strict=True)]


def kinds_of(graphs: Sequence[Graph], widths: Sequence[int]) -> list[tuple]:
    """What graphs with values of these widths have in common that share their launches."""
    first = graphs[0]
    return _kinds(tuple([graph.dim for graph in graphs]), tuple(widths), first.arch, first.product.name)


@planned
def _kinds(dims: tuple[int, ...], widths: tuple[int, ...], arch: str, product: str) -> list[tuple]:
    return [_kind(dim, width, arch, product) for dim, width in zip(dims, widths, strict=True)]


def by_kind(compute: Callable, graphs: Sequence[Graph], widths: Sequence[int], *lists: Sequence) -> list:
    """``compute``'s result for every graph, called with the graphs of one kind, with values of ``widths``, and with
    what the lists have in their places. The nodes' operands of all kinds are made before.
    """
    kinds = kinds_of(graphs, widths)
    node_operands(graphs, [stored for _, stored, _ in kinds])
    if kinds.count(kinds[0]) == len(kinds):
        return list(compute(graphs, *lists))
    found: list = [None] * len(graphs)
    for kind in dict.fromkeys(kinds):
        places = [k for k, other in enumerate(kinds) if other == kind]
        results = compute(*([values[k] for k in places] for values in (graphs, *lists)))
        for k, result in zip(places, results, strict=True):
            found[k] = result
    return found


def walk(graphs: Sequence[Graph], kernel: str, *widths: int):
    """Grid, number of parts and compile-time arguments of a kernel that walks tiles."""
    return walk_of(kernel, *numbers_of(graphs), *widths)


def numbers_of(graphs: Sequence[Graph]) -> tuple:
    """What the walk of a launch of these graphs follows from."""
    graph = graphs[0]
    device = graph.nodes.device
    return graph.arch, graph.product.name, device, len(graphs), graph.row_count, graph.column_count, graph.dim


@planned
def walk_of(kernel: str, arch: str, name: str, device, count: int, rows: int, columns: int, dim: int, *widths: int):
    config, product = tiles(kernel, arch, name, padded_width(dim, *widths)), PRODUCTS[name]
    row_blocks = cdiv(rows, config.rows)
    parts = divide(row_blocks * count, columns, config.columns, multiprocessors(device))
    constants = {
        "WIDTH": _node_width(arch, name, kernel, dim, *widths), "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns, "num_warps": config.warps, "num_stages": config.stages,
        **product.constants(),
    }  # fmt: skip
    if widths:
        constants["VALUE_WIDTH"] = padded_width(*widths)
    return (row_blocks, parts, count), parts, constants


def _node_width(arch: str, product: str, kernel: str, dim: int, *widths: int) -> int:
    """The columns of a tile of nodes.

    Of three tf32 products with nodes in 16 columns beside wider values, ptxas 12.8 (in the wheels of Triton 3.6 and
    3.7) makes code for Hopper that reads descriptors before it sets them, whichever tile is loaded first; with 32
    columns it does not. The issue-slot model predicts 1.1 (values of 64) and 1.7 times (of 32) the time.
    """
    nodes, affected = padded_width(dim), product == "tf32x3" and arch == "sm_90"
    if affected and kernel.endswith("_gradients") and padded_width(*widths) > nodes:
        return max(LEAST_TF32X3_WIDTH, nodes)
    return nodes


def node_arguments(graphs: Sequence[Graph], width: int) -> tuple[tuple[Tensor, ...], ...]:
    """Rows and numbers of the rows and of the columns."""
    rows, columns = zip(*node_operands(graphs, [width] * len(graphs)))
    return (
        tuple([x.rows for x in rows]), tuple([x.numbers for x in rows]),
        tuple([x.rows for x in columns]), tuple([x.numbers for x in columns]),
    )  # fmt: skip


def variances(graphs: Sequence[Graph]) -> tuple[Tensor, ...]:
    return tuple([graph.inverse_variance for graph in graphs])


def of_parts(like: Tensor, parts: int, *shape: int) -> Tensor:
    """What a launch writes: a result, or where its columns are divided a partial one of each part."""
    return like.new_empty(shape if parts == 1 else (parts, *shape))
