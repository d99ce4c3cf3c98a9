"""graph_conv's second order on GPUs: the launches of ``tangent_tiles``."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import LARGEST_FLOAT16, matrices, on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.operands import Operand, centred, operands, stored_width
from gkd_fast.kernels.common.strips import new_strip
from gkd_fast.kernels.common.tangents import (
    Directions,
    add_gathered,
    column_pieces_of,
    row_blocks,
    spread,
    tiling,
)  # fmt: skip
from gkd_fast.kernels.graph_conv.graphs import Form, Graph
from gkd_fast.kernels.graph_conv.tangent_tiles import (
    graph_degree_tangents,
    graph_double_gradients,
    graph_tangent_weights,
)  # fmt: skip


class MovingGraph(Graph):
    """The graph and the tangents of its nodes, None where they stand still."""

    def __init__(
        self, nodes, tangent, inverse_variance, product_precision, column_nodes, column_tangent, offset,
        bound=LARGEST_FLOAT16,
    ):  # fmt: skip
        super().__init__(nodes, inverse_variance, product_precision, column_nodes, offset)
        moving = [tangent is not None]
        of_rows = of_columns = spread("tangent", [x for x in [tangent] if x is not None], moving, [self.nodes])
        if self.has_columns:
            given = [x for x in [column_tangent] if x is not None]
            of_columns = spread("column_tangent", given, moving, [self.columns])
        self.directions = Directions(self.product, of_rows, of_columns, bound=bound)
        self.width = stored_width(self.dim, True)
        self.row_nodes, self.column_nodes = self.operands(Form(self.product, self.width))
        ((tangent,), (column_tangent,)) = self.directions.sides
        self.moves = tangent is not None
        # A kernel gets the nodes in the place of tangents that it does not read.
        self.row_moves, self.column_moves = self.row_nodes, self.column_nodes
        if self.moves:
            self.row_moves = self.column_moves = self._along(tangent)
            if self.has_columns:
                self.column_moves = self._along(column_tangent)

    def _along(self, tangent: Tensor) -> Operand:
        return operands([tangent], self.product, [self.width], None, others=[self.column_nodes.centre])[0]

    def blocks(self, width: int = 1) -> list[slice]:
        return row_blocks(self.row_count, max(self.dim, width))

    def pieces(self, rows: slice) -> Iterator[slice]:
        return column_pieces_of(self.column_count, self.product, rows.stop - rows.start, weights=2)

    def column_blocks(self, kernel, piece: slice) -> int:
        """Blocks of columns, each of which has sums of its own."""
        return tiling(kernel.__name__, self.arch, self.product, 1, piece.stop - piece.start)[0][0]

    def launch(self, kernel, block: slice, piece: slice, *arguments, **constants):
        rows, tangents = self.row_nodes[block], self.row_moves[block]
        columns, column_tangents = self.column_nodes[piece], self.column_moves[piece]
        counts = block.stop - block.start, piece.stop - piece.start
        grid, common = tiling(kernel.__name__, self.arch, self.product, *counts)
        launch(kernel, **common, **constants)(
            grid, rows.rows, tangents.rows, columns.rows, column_tangents.rows, rows.numbers, tangents.numbers,
            columns.numbers, column_tangents.numbers, *arguments, *counts, self.offset + block.start - piece.start,
        )  # fmt: skip


def graph_degrees_tangent(
    nodes, tangent, inverse_variance, product_precision, column_nodes=None, column_tangent=None, offset=0
) -> Tensor:
    graph = MovingGraph(nodes, tangent, inverse_variance, product_precision, column_nodes, column_tangent, offset)
    total = graph.nodes.new_zeros(graph.row_count)
    with on_device(graph.nodes):
        for block in graph.blocks():
            for piece in graph.pieces(block):
                sums = total.new_empty(graph.column_blocks(graph_degree_tangents, piece), len(total[block]))
                graph.launch(graph_degree_tangents, block, piece, sums, inverse_variance, graph.width)
                total[block] += sums.sum(dim=0)
    return graph.directions.divided(total)


def graph_conv_tangent(
    nodes, tangent, values, rates, extra, inverse_variance, product_precision, column_nodes=None, column_tangent=None,
    offset=0,
) -> list[Tensor]:  # fmt: skip
    # Weights K˙ = v K ċ are at most 2v times the longest direction.
    bound = 2 * inverse_variance.clamp(min=1)
    graph = MovingGraph(
        nodes, tangent, inverse_variance, product_precision, column_nodes, column_tangent, offset, bound
    )
    values = matrices("values", values, graph.column_count)
    if len(values) != len(rates):
        raise ValueError(f"every one of {len(values)} values needs its rates, got {len(rates)}")
    extra = None if extra is None else matrices("extra", [extra], graph.column_count)[0]
    sums = [x.new_zeros(graph.row_count, x.shape[1]) for x in values]
    with on_device(graph.nodes):
        for p, (x, a) in enumerate(zip(values, rates, strict=True)):
            # K˙ times x, K times ẋ = a x + extra.
            moving = graph.directions.multiplied(a)[:, None] * x if graph.moves else None
            if p == 0 and extra is not None:
                more = graph.directions.multiplied(extra)
                moving = more if moving is None else moving + more
            if moving is not None:
                _add_tangents(graph, x, moving, sums[p])
    return [graph.directions.divided(x) for x in sums]


def _add_tangents(graph: MovingGraph, values: Tensor, tangents: Tensor, out: Tensor):
    """out_i += Σ_j (K˙_ij values_j + K_ij tangents_j)."""
    scaled = graph.product.scaled
    gathered = [tangents, values] if graph.moves else [tangents]
    powers = [power_of_two(x.abs().amax()) for x in gathered] if scaled else []
    if scaled:
        gathered = [x * power for x, power in zip(gathered, powers, strict=True)]
    columns = centred(gathered, graph.product, [stored_width(values.shape[1], True)] * len(gathered))
    for block in graph.blocks(values.shape[1]):
        # K is multiplied by 2^14 in float16.
        totals = [torch.zeros_like(out[block]) for _ in gathered]
        for piece in graph.pieces(block):
            rows = len(out[block])
            strips = [new_strip(x.rows, rows, piece.stop - piece.start) for x in columns]
            sums = out.new_empty(graph.column_blocks(graph_tangent_weights, piece), 2, rows)
            graph.launch(graph_tangent_weights, block, piece, strips[-1], strips[0], sums, graph.inverse_variance,
                         graph.width, NODES_MOVE=graph.moves, SCALED=scaled)  # fmt: skip
            for total, weights, matrix, place in zip(totals, strips, columns, (1, 0), strict=False):
                add_gathered(total, weights, matrix, piece, sums[:, place])
        for k, total in enumerate(totals):
            if scaled:
                total = total / (powers[k] * LARGEST_FLOAT16 if k == 0 else powers[k])
            out[block] += total


@dataclass(frozen=True)
class Side:
    """G', H' and extra (or None) of the rows or of the columns, and the terms ḋ, d, a and b, [4, count]."""

    left: Tensor
    right: Tensor
    extra: Tensor | None
    terms: Tensor


def graph_conv_double_backward(
    nodes, tangent, left, right, left_rates, right_rates, extra, terms, term_tangents, inverse_variance,
    product_precision, column_nodes=None, column_tangent=None, column_left=None, column_right=None,
    column_left_rates=None, column_right_rates=None, column_extra=None, column_terms=None, column_term_tangents=None,
    offset=0,
) -> Tensor:  # fmt: skip
    graph = MovingGraph(nodes, tangent, inverse_variance, product_precision, column_nodes, column_tangent, offset)
    own = _side(graph.row_count, left, right, extra, term_tangents, terms, left_rates, right_rates)
    other = own
    if graph.has_columns:
        given = (column_left, column_right, column_term_tangents, column_terms, column_left_rates, column_right_rates)
        if any(x is None for x in given) or (extra is None) != (column_extra is None):
            raise ValueError("a column set needs all column_*")
        other = _side(graph.column_count, column_left, column_right, column_extra, *given[2:])
    gradient = torch.zeros_like(graph.nodes)
    with on_device(graph.nodes):
        own, other, scale, unscale = _scaled(graph, own, other)
        of_columns = _products(graph, other)
        of_rows = of_columns if other is own else _products(graph, own, of_columns[1].centre)
        for block in graph.blocks(left.shape[1]):
            _add_gradient(graph, of_rows, of_columns, own.terms[:, block].contiguous(), other.terms, scale, block,
                          gradient[block])  # fmt: skip
        if unscale is not None:
            gradient *= unscale
    return gradient


def _side(count: int, left, right, extra, *terms) -> Side:
    left, right = matrices("left and right", [left, right], count)
    extra = None if extra is None else matrices("extra", [extra], count)[0]
    return Side(left, right, extra, torch.stack(terms))


def _products(graph: MovingGraph, side: Side, centre: Tensor | None = None) -> list[Operand]:
    """G' and extra (or G' again) along the centre of H', by default the own one, and H' about it."""
    width = [stored_width(side.left.shape[1], True)]
    (right,) = (
        centred([side.right], graph.product, width)
        if centre is None
        else operands([side.right], graph.product, width, [centre])
    )
    others = [side.left] if side.extra is None else [side.left, side.extra]
    along = operands(others, graph.product, width * len(others), None, others=[right.centre] * len(others))
    return [along[0], right, along[-1]]


def _add_gradient(graph: MovingGraph, own, other, row_terms, column_terms, scale: Tensor, block: slice,
                  gradient: Tensor):  # fmt: skip
    """Adds Σ_j (M˙_ij e_j + M_ij ė_j) of a few rows, in the units of ``scale``."""
    left, right, extra = (x[block] for x in own)
    values = [graph.column_nodes, *([graph.column_moves] if graph.moves else [])]
    for piece in graph.pieces(block):
        column_left, column_right, column_extra = (x[piece] for x in other)
        strips = [new_strip(left.rows, len(gradient), piece.stop - piece.start) for _ in values]
        sums = gradient.new_empty(graph.column_blocks(graph_double_gradients, piece), len(gradient))
        graph.launch(
            graph_double_gradients, block, piece, left.rows, right.rows, extra.rows, left.numbers, column_left.rows,
            column_right.rows, column_extra.rows, column_left.numbers, row_terms,
            column_terms[:, piece].contiguous(), strips[0], strips[-1], sums, graph.inverse_variance, scale,
            graph.width, left.rows.shape[1], NODES_MOVE=graph.moves, HAS_EXTRA=own[0] is not own[2],
        )  # fmt: skip
        for weights, matrix, of_weights in zip(strips, values, (sums, None), strict=False):
            add_gathered(gradient, weights, matrix, piece, of_weights)


# Powers of two bring the entries of G' and of H' and extra to at most this in float16.
LARGEST_OPERAND = 16.0


def _scaled(graph: MovingGraph, own: Side, other: Side) -> tuple[Side, Side, Tensor, Tensor | None]:
    """Both sides in the directions' units and within float16, v in the units of M, and what undoes both."""
    v = graph.inverse_variance

    def in_units(side: Side, of_left, of_right) -> Side:
        tangents, terms, *rates = side.terms
        tangents, rates = graph.directions.multiplied(tangents), [graph.directions.multiplied(x) for x in rates]
        products = of_left * of_right
        extra = None if side.extra is None else graph.directions.multiplied(side.extra) * of_right
        terms = torch.stack([tangents * products, terms * products, *rates])
        return Side(side.left * of_left, side.right * of_right, extra, terms)

    if not graph.product.scaled:
        return own, other, v, None
    sides = [own] if other is own else [own, other]
    extras = [graph.directions.multiplied(x.extra) for x in sides if x.extra is not None]
    of_left = power_of_two(_largest(*(x.left for x in sides))) * (LARGEST_OPERAND / LARGEST_FLOAT16)
    of_right = power_of_two(_largest(*(x.right for x in sides), *extras)) * (LARGEST_OPERAND / LARGEST_FLOAT16)
    sides = [in_units(x, of_left, of_right) for x in sides]
    # |m| ≤ 2 ‖G'‖ ‖H'‖ + 2 |d|,  |ṁ| ≤ 2 |m| (|a| + |b|) + 2 ‖G'‖ ‖extra‖ + 2 |ḋ|,  |M˙| ≤ v (2v |m| + |ṁ|)
    tangents, terms, a, b = (torch.stack([x.terms[k].abs().amax() for x in sides]).amax() for k in range(4))
    left, right = (_longest(*(getattr(x, name) for x in sides)) for name in ("left", "right"))
    extra = _longest(*(x.extra for x in sides)) if extras else 0.0
    m = 2 * (left * right + terms)
    unit = power_of_two(v * (m * (1 + 2 * v + 2 * (a + b)) + 2 * left * extra + 2 * tangents))
    unscale = 1 / (unit * of_left * of_right)
    return sides[0], sides[-1], v * unit, graph.directions.divided(unscale)


def _largest(*tensors: Tensor) -> Tensor:
    return torch.stack([x.abs().amax() for x in tensors]).amax()


def _longest(*tensors: Tensor) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(x, dim=1).amax() for x in tensors]).amax()
