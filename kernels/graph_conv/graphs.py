"""The graphs that graph_conv's launches take, and how a launch of several walks their tiles."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from gkd_fast.kernels.common.launch import (
    PRODUCTS,
    Product,
    architecture,
    cdiv,
    divide,
    matrices,
    multiprocessors,
    padded_width,
    product_of,
    rows_of,
    walk_product_of,
)  # fmt: skip
from gkd_fast.kernels.common.operands import Operand, Prepared, centred, operands, stored_width
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.graph_conv import small

# A program that walks tiles has about so many rows.
BLOCK_ROWS = 64


class Graph:
    """Nodes of both sides, the bandwidth and the type of the products.

    place: of the nodes among the prepared.  stages: as many as the call has.

    Attributes:
        span: the width whose kernels take the nodes: their own, or that of a wider stage in the same launch.
    """

    # The weight of a node beside itself.
    diagonal = 1.0

    def __init__(
        self, nodes, inverse_variance, product_precision, column_nodes, offset, prepared: Prepared | None = None,
        place: int = 0, stages: int = 1,
    ):  # fmt: skip
        (self.nodes,) = rows_of("nodes", [nodes], prepared)
        self.has_columns = column_nodes is not None
        self.columns = matrices("column_nodes", [column_nodes])[0] if self.has_columns else self.nodes
        (self.row_count, self.dim), (self.column_count, dim) = self.nodes.shape, self.columns.shape
        if dim != self.dim:
            raise ValueError(f"column_nodes must have width {self.dim}, got {dim}")
        self.span = dim
        self.offset = offset if self.has_columns else 0
        self.inverse_variance = inverse_variance
        self.product = product_of(product_precision, self.nodes)
        self.arch = architecture(self.nodes.device)
        self.prepared, self.place, self.num_stages = prepared or Prepared(), place, stages
        self._operands: dict[Form, tuple[Operand, Operand]] = {}

    def is_wide(self, width: int = 1) -> bool:
        """Whether rows of nodes or of ``width`` do not fit a program's registers."""
        return self.kind(width).is_wide

    def tile_product(self, width: int = 1) -> Product:
        """The product type beside values of ``width`` of the kernels for large batches."""
        return self.kind(width).form.product

    def form(self, width: int = 1) -> "Form":
        """How nodes are stored beside values of ``width``."""
        return self.kind(width).form

    def is_small(self, width: int) -> bool:
        """Whether values of ``width`` go to the kernels of small batches."""
        return is_small(self.row_count, self.has_columns, self.dim, width)

    def stages(self) -> small.Stages:
        """What the kernels of small batches take."""
        return small.Stages([self.nodes], [self.inverse_variance], self.arch, self.product)

    def operands(self, form: "Form") -> tuple[Operand, Operand]:
        """The nodes of the rows and of the columns as products take them."""
        return node_operands([self], [form])[0]

    def kind(self, width: int) -> "Kind":
        """What graphs with values of ``width`` have in common that share their launches."""
        return _kind(self.dim, self.span, width, self.arch, self.product.name)


@planned
def span(dims: tuple[int, ...], rows: int, product: str, device) -> int:
    """The width whose kernels take the nodes of all stages of these widths, 0: each its own.

    Where all of their programs are at work at once, launches one after another take longer than that of the widest.
    """
    arch = architecture(device)
    narrow = [dim for dim in dims if not _kind(dim, dim, 1, arch, product).is_wide]
    few = len(narrow) * cdiv(rows, BLOCK_ROWS) <= multiprocessors(device)
    return max(narrow) if few and narrow else 0


class Others(NamedTuple):
    """Of a graph over the other nodes, whose weights are exp(x_ij − shares·(l_i, l_j)): these, and the log-sums of the
    rows and of the columns.
    """

    shares: tuple[float, float]
    rows: Tensor
    columns: Tensor


def share_constants(others: Others | None) -> dict[str, float]:
    shares = others.shares if others else (0.0, 0.0)
    return {"ROW_SHARE": shares[0], "COLUMN_SHARE": shares[1]}


class Form(NamedTuple):
    """The type and the columns of an operand."""

    product: Product
    width: int


class Kind(NamedTuple):
    """How nodes are stored, and in how many columns values; whether these or those are too wide for a program."""

    form: Form
    value_width: int
    is_wide: bool


@planned
def _kind(dim: int, span: int, width: int, arch: str, product: str) -> Kind:
    walk_product = walk_product_of(PRODUCTS[product], arch, max(dim, width))
    is_wide = walk_product is None
    form = Form(walk_product or PRODUCTS[product], stored_width(dim if is_wide else span, is_wide))
    return Kind(form, stored_width(width, is_wide), is_wide)


def node_operands(graphs: Sequence[Graph], forms: Sequence[Form]) -> list[tuple[Operand, Operand]]:
    """``Graph.operands`` of all, of whatever kinds, made once and those of a type together."""
    missing = [k for k, form in enumerate(forms) if form not in graphs[k]._operands]
    for product in dict.fromkeys([forms[k].product for k in missing]):
        places = [k for k in missing if forms[k].product == product]
        some, stored = [graphs[k] for k in places], [forms[k].width for k in places]
        nodes = [graph.nodes for graph in some]
        if graphs[0].has_columns:
            columns = centred([graph.columns for graph in some], product, stored)
            rows = operands(nodes, product, stored, [x.centre for x in columns])
        else:
            own = [graph.place for graph in some]
            rows = columns = graphs[0].prepared.centred(own, nodes, product, stored, graphs[0].num_stages)
        for k, *sides in zip(places, rows, columns, strict=True):
            graphs[k]._operands[forms[k]] = tuple(sides)
    return [graph._operands[form] for graph, form in zip(graphs, forms, strict=True)]


def kinds_of(graphs: Sequence[Graph], widths: Sequence[int]) -> list[Kind]:
    """What graphs with values of these widths have in common that share their launches."""
    first = graphs[0]
    dims = tuple([(graph.dim, graph.span) for graph in graphs])
    return _kinds(dims, tuple(widths), first.arch, first.product.name)


@planned
def _kinds(dims: tuple[tuple[int, int], ...], widths: tuple[int, ...], arch: str, product: str) -> list[Kind]:
    return [_kind(*of_nodes, width, arch, product) for of_nodes, width in zip(dims, widths, strict=True)]


def by_kind(compute: Callable, graphs: Sequence[Graph], widths: Sequence[int], *lists: Sequence) -> list:
    """``compute``'s result for every graph, called with the graphs of one kind, with values of ``widths``, and with
    what the lists have in their places. The nodes' operands of all kinds are made before.
    """
    kinds = kinds_of(graphs, widths)
    node_operands(graphs, [kind.form for kind in kinds])
    if kinds.count(kinds[0]) == len(kinds):
        return list(compute(graphs, *lists))
    found: list = [None] * len(graphs)
    for kind in dict.fromkeys(kinds):
        places = [k for k, other in enumerate(kinds) if other == kind]
        results = compute(*([values[k] for k in places] for values in (graphs, *lists)))
        for k, result in zip(places, results, strict=True):
            found[k] = result
    return found


def numbers_of(graphs: Sequence[Graph], *widths: int) -> tuple:
    """What the walk of a launch of these graphs, with values of these widths, follows from."""
    graph = graphs[0]
    product, device = graph.tile_product(max(widths, default=1)).name, graph.nodes.device
    return graph.arch, product, device, len(graphs), graph.row_count, graph.column_count, graph.span, *widths


@planned
def walk_of(kernel: str, arch: str, name: str, device, count: int, rows: int, columns: int, dim: int, *widths: int):
    config, product = tiles(kernel, arch, name, padded_width(dim, *widths)), PRODUCTS[name]
    row_blocks = cdiv(rows, config.rows)
    parts = divide(row_blocks * count, columns, config.columns, multiprocessors(device))
    constants = {
        "WIDTH": padded_width(dim), "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
        "num_warps": config.warps, "num_stages": config.stages, **product.constants(),
    }  # fmt: skip
    if widths:
        constants["VALUE_WIDTH"] = padded_width(*widths)
    return (row_blocks, parts, count), parts, constants


def node_arguments(graphs: Sequence[Graph], width: int = 1) -> tuple[tuple[Tensor, ...], ...]:
    """Rows and numbers of the rows and of the columns, beside values of ``width``."""
    rows, columns = zip(*node_operands(graphs, [graph.form(width) for graph in graphs]))
    return (
        tuple([x.rows for x in rows]), tuple([x.numbers for x in rows]),
        tuple([x.rows for x in columns]), tuple([x.numbers for x in columns]),
    )  # fmt: skip


def variances(graphs: Sequence[Graph]) -> tuple[Tensor, ...]:
    return tuple([graph.inverse_variance for graph in graphs])


def of_parts(like: Tensor, parts: int, *shape: int) -> Tensor:
    """What a launch writes: a result, or where its columns are divided a partial one of each part."""
    return like.new_empty(*shape) if parts == 1 else like.new_empty(parts, *shape)
