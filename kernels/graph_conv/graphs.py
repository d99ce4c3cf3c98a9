"""The graphs that graph_conv's launches take."""

from collections.abc import Sequence

from gkd_fast.kernels.common.launch import architecture, matrices, padded_width, product_of
from gkd_fast.kernels.common.operands import Operand, centred, operands, stored_width
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.table import largest_width
from gkd_fast.kernels.graph_conv import small


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
        return node_operands([self], width)[0]

    def kind(self, width: int) -> tuple:
        """What graphs with values of ``width`` have in common that share their launches."""
        is_wide = self.is_wide(width)
        return is_wide, stored_width(self.dim, is_wide), stored_width(width, is_wide)


def node_operands(graphs: Sequence[Graph], width: int) -> list[tuple[Operand, Operand]]:
    """``Graph.operands`` of all, made together and once."""
    if any(width not in graph._operands for graph in graphs):
        product, widths = graphs[0].product, [width] * len(graphs)
        rows = columns = centred([graph.columns for graph in graphs], product, widths)
        if graphs[0].has_columns:
            rows = operands([graph.nodes for graph in graphs], product, widths, [x.centre for x in columns])
        for graph, *sides in zip(graphs, rows, columns, strict=True):
            graph._operands[width] = tuple(sides)
    return [graph._operands[width] for graph in graphs]
