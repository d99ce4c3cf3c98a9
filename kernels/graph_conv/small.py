"""graph_conv of small batches: a program per block of rows; its output and its gradients are a launch each."""

import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import small
from gkd_fast.kernels.common.launch import on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.small import store_weighted, tile_product
from gkd_fast.kernels.common.tile import COUNTS, load_tile, replace_missing, store_vector
from gkd_fast.kernels.graph_conv.tiles import LOG2E, adjacency

DEGREE_ROWS = tl.constexpr(64)


@triton.jit
def small_adjacency(
    nodes, i, j, count, dim, slope, DIAGONAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K of the tile at (i, j), 0 in missing columns."""
    c = tile_product(nodes, nodes, i, j, count, dim, False, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                     PRECISION)  # fmt: skip
    k = adjacency(c, i, j, 0, count, slope, DIAGONAL, 0, BLOCK_ROWS, BLOCK_COLUMNS)
    return replace_missing(k, j, count, 0.0, BLOCK_COLUMNS)


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
    nodes, values, degrees, output, terms, messages, upstream, convolved, inverse_variance, dim, width, count,
    SYMMETRIC: tl.constexpr, BACKWARD: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, WEIGHT_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y_i = Σ_j w_ij H_j and the degrees, w_ij = K_ij deg_i^-½ deg_j^-½, or K_ij/deg_i if not SYMMETRIC.

    BACKWARD: dH_i = Σ_j w_ji G_j from known degrees, and the node terms.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    slope = tl.load(inverse_variance).to(SUM) * LOG2E
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
        tl.debug_barrier()
        along = tl.zeros([BLOCK_ROWS], SUM)
        for k in range(0, width, BLOCK_WIDTH):
            g = load_tile(upstream, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH)
            along += tl.sum(g * load_tile(convolved, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH), 1)
            if SYMMETRIC:
                h = load_tile(messages, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH)
                along += tl.sum(h * load_tile(output, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH), 1)
        if SYMMETRIC:
            along = along * 0.5
        store_vector(terms, -along / row_degrees, i, count, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def graph_small_gradients(
    nodes, messages, upstream, degrees, terms, gradient, inverse_variance, dim, width, count, SYMMETRIC: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j, M_ij = v K_ij (G'_i·H'_j + H'_i·G'_j + d_i + d_j) off the diagonal."""
    i = tl.program_id(0) * BLOCK_ROWS
    v = tl.load(inverse_variance).to(SUM)
    row = i + tl.arange(0, BLOCK_ROWS)
    degree = tl.load(degrees + row, mask=row < count, other=1)
    d = tl.load(terms + row, mask=row < count, other=0)
    for j in range(0, count, BLOCK_COLUMNS):
        column = j + tl.arange(0, BLOCK_COLUMNS)
        column_degree = tl.load(degrees + column, mask=column < count, other=1)
        column_d = tl.load(terms + column, mask=column < count, other=0)
        of_rows = tile_product(upstream, messages, i, j, count, width, SCALED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                               TYPE, SUM, PRECISION)  # fmt: skip
        of_columns = tile_product(messages, upstream, i, j, count, width, SCALED, BLOCK_ROWS, BLOCK_COLUMNS,
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


def _sums(graph, values: Tensor, degrees: Tensor, is_row: bool, terms_of=None) -> Tensor:
    """``terms_of``: the node terms, to be written, and messages, upstream and output."""
    output = values.new_empty(values.shape)
    constants = small.constants(graph.arch, graph.product, WEIGHT_COLUMNS=small.weight_columns(graph.product))
    with on_device(values):
        launch(graph_small_sums, SYMMETRIC=not is_row, BACKWARD=terms_of is not None, **constants)(
            (small.row_blocks(len(values)),), graph.nodes, values, degrees, output, *(terms_of or (output,) * 4),
            graph.inverse_variance, graph.dim, values.shape[1], len(values),
        )  # fmt: skip
    return output


def graph_conv(graph, messages: Tensor, is_row: bool) -> tuple[Tensor, Tensor]:
    degrees = messages.new_empty(len(messages))
    return _sums(graph, messages, degrees, is_row), degrees


def graph_conv_backward(graph, upstream, messages, output, degrees, is_row: bool, needs) -> list[Tensor]:
    terms = degrees.new_empty(degrees.shape)
    messages_gradient = _sums(graph, upstream, degrees, is_row, (terms, messages, upstream, output))
    gradients = []
    if needs[0]:
        gradients.append(graph.nodes.new_empty(graph.nodes.shape))
        with on_device(upstream):
            constants = small.gradient_constants(graph.arch, graph.product)
            launch(graph_small_gradients, SYMMETRIC=not is_row, **constants)(
                (small.row_blocks(graph.row_count),), graph.nodes, messages, upstream, degrees, terms, gradients[0],
                graph.inverse_variance, graph.dim, messages.shape[1], graph.row_count,
            )  # fmt: skip
    if needs[1]:
        gradients.append(messages_gradient)
    return gradients
