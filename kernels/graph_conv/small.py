"""graph_conv of small batches, of all stages at once: a program per block of rows and stage; their outputs and their
gradients are a launch each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import small
from gkd_fast.kernels.common.launch import PRODUCTS, Product, on_device
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.small import centred_product, negative_distances, store_weighted
from gkd_fast.kernels.common.tile import COUNTS, load_tile, pick, store_vector
from gkd_fast.kernels.graph_conv.tiles import LOG2E, adjacency

DEGREE_ROWS = tl.constexpr(64)


@triton.jit
def small_adjacency(
    nodes, i, j, count, dim, slope, DIAGONAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K of the tile at (i, j), 0 in missing columns."""
    c = negative_distances(nodes, i, j, count, dim, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                           PRECISION)  # fmt: skip
    return adjacency(c * slope, i, j, 0, count, DIAGONAL, 0, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def small_degrees(
    nodes, j, count, dim, slope, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Degrees of the columns from j: K is symmetric. In larger tiles, so that loaded operands serve more often."""
    total = tl.zeros([BLOCK_COLUMNS], SUM)
    for i in range(0, count, DEGREE_ROWS):
        k = small_adjacency(nodes, i, j, count, dim, slope, 1.0, DEGREE_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                            PRECISION)  # fmt: skip
        total += tl.sum(tl.where((tl.arange(0, DEGREE_ROWS) < count - i)[:, None], k, 0.0), 0)
    return total


@triton.jit(do_not_specialize=COUNTS)
def graph_small_sums(
    nodes, values, degrees, outputs, terms, messages, upstream, convolved, inverse_variances, dims, widths, count,
    SYMMETRIC: tl.constexpr, BACKWARD: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, WEIGHT_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y_i = Σ_j w_ij H_j and the degrees, w_ij = K_ij deg_i^-½ deg_j^-½, or K_ij/deg_i if not SYMMETRIC.

    BACKWARD: dH_i = Σ_j w_ji G_j from known degrees, and the node terms.
    """
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    nodes, values, output, degrees = (
        pick(nodes, stage), pick(values, stage), pick(outputs, stage), pick(degrees, stage)
    )  # fmt: skip
    dim, width = pick(dims, stage), pick(widths, stage)
    slope = tl.load(pick(inverse_variances, stage)).to(SUM) * LOG2E
    row = i + tl.arange(0, BLOCK_ROWS)
    if BACKWARD:
        row_degrees = tl.load(degrees + row, mask=row < count, other=1)
    else:
        k = small_adjacency(nodes, i, 0, count, dim, slope, 1.0, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                            PRECISION)  # fmt: skip
        row_degrees = tl.where(row < count, tl.sum(k, 1), 1.0)
        tl.store(degrees + row, row_degrees, mask=row < count)
    for j in range(0, count, WEIGHT_COLUMNS):
        column = j + tl.arange(0, WEIGHT_COLUMNS)
        weights = small_adjacency(nodes, i, j, count, dim, slope, 1.0, BLOCK_ROWS, WEIGHT_COLUMNS, BLOCK_WIDTH, TYPE,
                                  SUM, PRECISION)  # fmt: skip
        if SYMMETRIC or BACKWARD:
            if BACKWARD:
                column_degrees = tl.load(degrees + column, mask=column < count, other=1)
            else:
                column_degrees = small_degrees(nodes, j, count, dim, slope, WEIGHT_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                                               PRECISION)  # fmt: skip
                column_degrees = tl.where(column < count, column_degrees, 1.0)
        if SYMMETRIC:
            weights = weights * tl.rsqrt(row_degrees)[:, None] * tl.rsqrt(column_degrees)[None, :]
        elif BACKWARD:
            weights = weights / column_degrees[None, :]
        else:
            weights = weights / row_degrees[:, None]
        store_weighted(output, weights, values, i, j, count, width, tl.minimum(j, 1), SCALED, BLOCK_ROWS,
                       WEIGHT_COLUMNS, BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
    if BACKWARD:
        upstream, convolved, messages = pick(upstream, stage), pick(convolved, stage), pick(messages, stage)
        tl.debug_barrier()
        along = tl.zeros([BLOCK_ROWS], SUM)
        for k in range(0, width, BLOCK_WIDTH):
            g = load_tile(upstream, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH).to(SUM)
            along += tl.sum(g * load_tile(convolved, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH), 1)
            if SYMMETRIC:
                h = load_tile(messages, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH).to(SUM)
                along += tl.sum(h * load_tile(output, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH), 1)
        if SYMMETRIC:
            along = along * 0.5
        store_vector(pick(terms, stage), -along / row_degrees, i, count, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def graph_small_gradients(
    nodes, messages, upstream, degrees, terms, gradients, inverse_variances, dims, widths, count,
    SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j, M_ij = v K_ij (G'_i·H'_j + H'_i·G'_j + d_i + d_j) off the diagonal."""
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    nodes, messages, upstream, gradient = (
        pick(nodes, stage), pick(messages, stage), pick(upstream, stage), pick(gradients, stage)
    )  # fmt: skip
    degrees, terms, dim, width = pick(degrees, stage), pick(terms, stage), pick(dims, stage), pick(widths, stage)
    v = tl.load(pick(inverse_variances, stage)).to(SUM)
    row = i + tl.arange(0, BLOCK_ROWS)
    degree = tl.load(degrees + row, mask=row < count, other=1)
    d = tl.load(terms + row, mask=row < count, other=0)
    for j in range(0, count, BLOCK_COLUMNS):
        column = j + tl.arange(0, BLOCK_COLUMNS)
        column_degree = tl.load(degrees + column, mask=column < count, other=1)
        column_d = tl.load(terms + column, mask=column < count, other=0)
        of_rows = centred_product(upstream, messages, i, j, count, width, SCALED, BLOCK_ROWS, BLOCK_COLUMNS,
                                  BLOCK_WIDTH, TYPE, SUM, PRECISION)  # fmt: skip
        of_columns = centred_product(messages, upstream, i, j, count, width, SCALED, BLOCK_ROWS, BLOCK_COLUMNS,
                                     BLOCK_WIDTH, TYPE, SUM, PRECISION)  # fmt: skip
        if SYMMETRIC:
            m = (of_rows + of_columns) * tl.rsqrt(degree)[:, None] * tl.rsqrt(column_degree)[None, :]
        else:
            m = of_rows / degree[:, None] + of_columns / column_degree[None, :]
        k = small_adjacency(nodes, i, j, count, dim, v * LOG2E, 0.0, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                            PRECISION)  # fmt: skip
        weights = k * (m + d[:, None] + column_d[None, :]) * v
        store_weighted(gradient, weights, nodes, i, j, count, dim, tl.minimum(j, 1), SCALED, BLOCK_ROWS, BLOCK_COLUMNS,
                       BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip


@planned
def _sums(is_row: bool, backward: bool, arch: str, name: str) -> Launch:
    product = PRODUCTS[name]
    constants = small.constants(arch, product, WEIGHT_COLUMNS=small.weight_columns(product))
    return launch(graph_small_sums, SYMMETRIC=not is_row, BACKWARD=backward, **constants)


@planned
def _gradients(is_row: bool, arch: str, product: str) -> Launch:
    return launch(graph_small_gradients, SYMMETRIC=not is_row, **small.gradient_constants(arch, PRODUCTS[product]))


def at(places: Sequence[int], *lists: Sequence) -> list[list]:
    """The entries at these places of every list."""
    return [[values[k] for k in places] for values in lists]


@dataclass(frozen=True)
class Stages:
    """Unit rows of one number and type, 1/σ² of each stage, and how products are made."""

    nodes: Sequence[Tensor]
    inverse_variances: Sequence[Tensor]
    arch: str
    product: Product

    def sums(self, values: Sequence[Tensor], degrees, is_row: bool, terms_of=None) -> list[Tensor]:
        """``terms_of``: the node terms, to be written, and messages, upstream and output."""
        own = self.nodes[0]
        outputs, count = [own.new_empty(*x.shape) for x in values], own.shape[0]
        with on_device(values[0]):
            _sums(is_row, terms_of is not None, self.arch, self.product.name)(
                (small.row_blocks(count), len(values)), tuple(self.nodes), tuple(values), tuple(degrees),
                tuple(outputs), *(tuple(x) for x in terms_of or (outputs,) * 4), tuple(self.inverse_variances),
                tuple([x.shape[1] for x in self.nodes]), tuple([x.shape[1] for x in values]), count,
            )  # fmt: skip
        return outputs

    def of(self, places: Sequence[int]) -> "Stages":
        nodes, variances = at(places, self.nodes, self.inverse_variances)
        return replace(self, nodes=nodes, inverse_variances=variances)


def graph_conv(stages: Stages, messages: Sequence[Tensor], is_row: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and degrees."""
    degrees = [x.new_empty(x.shape[0]) for x in stages.nodes]
    return stages.sums(messages, degrees, is_row), degrees


def graph_conv_backward(
    stages: Stages, upstream, messages, outputs, degrees, is_row: bool, needs: Sequence[bool]
) -> list[Tensor]:
    """``needs``: of all stages' nodes, then of their messages."""

    def convolve(stages, terms, upstream, messages, outputs, degrees):
        return stages.sums(upstream, degrees, is_row, (terms, messages, upstream, outputs))

    def move(stages, terms, upstream, messages, outputs, degrees):
        nodes, gradients = tuple(stages.nodes), tuple([torch.empty_like(x) for x in stages.nodes])
        with on_device(nodes[0]):
            _gradients(is_row, stages.arch, stages.product.name)(
                (small.row_blocks(nodes[0].shape[0]), len(nodes)), nodes, tuple(messages), tuple(upstream),
                tuple(degrees), tuple(terms), gradients, tuple(stages.inverse_variances),
                tuple([x.shape[1] for x in nodes]), tuple([x.shape[1] for x in messages]), nodes[0].shape[0],
            )  # fmt: skip
        return list(gradients)

    return backward(stages, (upstream, messages, outputs, degrees), needs, convolve, move)


def backward(
    stages: Stages, rows: Sequence[Sequence[Tensor]], needs: Sequence[bool], convolve: Callable, move: Callable
) -> list[Tensor]:
    """The gradients of all stages' nodes, then of their messages, those that ``needs`` asks for.

    Args:
        rows: upstream, messages, outputs, and what else the launches read of every stage.
        convolve: of stages, their node terms, which it writes, and ``rows``: the messages' gradients.
        move: of the same, with terms that are written: the nodes' gradients.
    """
    count = len(stages.nodes)
    used = [k for k in range(count) if needs[k] or needs[count + k]]
    if not used:
        return []
    if len(used) < count:
        stages, rows = stages.of(used), at(used, *rows)
    terms = [x.new_empty(x.shape[0]) for x in stages.nodes]
    of_messages = convolve(stages, terms, *rows)
    moved = [place for place, k in enumerate(used) if needs[k]]
    of_nodes = move(stages.of(moved), *at(moved, terms, *rows)) if moved else []
    return of_nodes + [x for k, x in zip(used, of_messages, strict=True) if needs[count + k]]
