"""neighbor_conv of small batches, of all stages at once: outputs and gradients are a launch each."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import small
from gkd_fast.kernels.common.launch import PRODUCTS, on_device
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.small import centred_product, negative_distances, rounded_tile, store_weighted
from gkd_fast.kernels.common.tile import COUNTS, load_tile, load_vector, pick, store_vector
from gkd_fast.kernels.graph_conv import small as small_graphs
from gkd_fast.kernels.graph_conv.small import Stages
from gkd_fast.kernels.graph_conv.tiles import LOG2E, adjacency, less_shares, shares
from gkd_fast.kernels.neighbor_conv.tiles import gradient_weights, half_exponentials


@triton.jit(do_not_specialize=COUNTS)
def neighbor_small_weighted(
    nodes, values, log_sums, outputs, terms, messages, convolved, inverse_variances, dims, widths, count, has_terms,
    ROW_SHARE: tl.constexpr, COLUMN_SHARE: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """output_i = Σ_j A_ij values_j, A with these shares of l_i and l_j in its exponent.

    1 of ``has_terms``: the values are the upstream, the outputs the messages' gradient, and the node terms are written:
    −G_i·Y_i (row, whose transpose is this) or −(G_i·Y_i + m_i·dM_i)/2, G and m as products round them.
    """
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    nodes, values, output, log_sums = (
        pick(nodes, stage), pick(values, stage), pick(outputs, stage), pick(log_sums, stage)
    )  # fmt: skip
    dim, width = pick(dims, stage), pick(widths, stage)
    slope = tl.load(pick(inverse_variances, stage)).to(SUM) * LOG2E
    for j in range(0, count, BLOCK_COLUMNS):
        x = slope * negative_distances(nodes, i, j, count, dim, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                                       PRECISION)  # fmt: skip
        own = shares(log_sums, i, count, ROW_SHARE, BLOCK_ROWS, SUM)
        x = less_shares(x, own, log_sums, j, count, ROW_SHARE, COLUMN_SHARE, BLOCK_COLUMNS)
        weights = adjacency(x, i, j, 0, count, 0.0, 0, BLOCK_ROWS, BLOCK_COLUMNS)
        store_weighted(output, weights, values, i, j, count, width, tl.minimum(j, 1), SCALED, BLOCK_ROWS, BLOCK_COLUMNS,
                       BLOCK_WIDTH, TYPE, PRECISION, True)  # fmt: skip
    messages, convolved = pick(messages, stage), pick(convolved, stage)
    tl.debug_barrier()
    along = tl.zeros([BLOCK_ROWS], SUM)
    for k in range(0, width * has_terms, BLOCK_WIDTH):
        g = rounded_tile(values, i, k, count, width, SCALED, BLOCK_ROWS, BLOCK_WIDTH, TYPE, SUM)
        along += tl.sum(g * load_tile(convolved, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH), 1)
        if ROW_SHARE != 0:
            h = rounded_tile(messages, i, k, count, width, SCALED, BLOCK_ROWS, BLOCK_WIDTH, TYPE, SUM)
            along += tl.sum(h * load_tile(output, i, k, count, width, BLOCK_ROWS, BLOCK_WIDTH), 1)
    if ROW_SHARE != 0:
        along = along * 0.5
    store_vector(pick(terms, stage), -along, i, count * has_terms, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def neighbor_small_gradients(
    nodes, messages, upstream, log_sums, terms, gradients, inverse_variances, dims, widths, count,
    SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j, M as ``gradient_weights`` says."""
    i, stage = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    nodes, messages, upstream, gradient = (
        pick(nodes, stage), pick(messages, stage), pick(upstream, stage), pick(gradients, stage)
    )  # fmt: skip
    log_sums, terms, dim, width = pick(log_sums, stage), pick(terms, stage), pick(dims, stage), pick(widths, stage)
    v = tl.load(pick(inverse_variances, stage)).to(SUM)
    half = v * (0.5 * LOG2E)
    own = shares(log_sums, i, count, 0.5, BLOCK_ROWS, SUM)
    d = load_vector(terms, i, count, BLOCK_ROWS)
    none, column_none = tl.zeros([BLOCK_ROWS], SUM), tl.zeros([BLOCK_COLUMNS], SUM)
    for j in range(0, count, BLOCK_COLUMNS):
        ahead = centred_product(upstream, messages, i, j, count, width, SCALED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                                TYPE, SUM, PRECISION, True)  # fmt: skip
        behind = centred_product(messages, upstream, i, j, count, width, SCALED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                                 TYPE, SUM, PRECISION, True)  # fmt: skip
        if SYMMETRIC:
            ahead += behind
        c = negative_distances(nodes, i, j, count, dim, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                               PRECISION)  # fmt: skip
        u, t = half_exponentials(c * half, own, log_sums, i, j, count, 0, True, BLOCK_ROWS, BLOCK_COLUMNS, True)
        column_d = load_vector(terms, j, count, BLOCK_COLUMNS)
        weights = gradient_weights(u, t, ahead, behind, d, none, column_d, column_none, SYMMETRIC, True) * v
        store_weighted(gradient, weights, nodes, i, j, count, dim, tl.minimum(j, 1), SCALED, BLOCK_ROWS, BLOCK_COLUMNS,
                       BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip


@planned
def _weighted(shares: tuple[float, float], arch: str, product: str) -> Launch:
    constants = small.gradient_constants(arch, PRODUCTS[product])
    return launch(neighbor_small_weighted, ROW_SHARE=shares[0], COLUMN_SHARE=shares[1], **constants)


@planned
def _gradients(symmetric: bool, arch: str, product: str) -> Launch:
    constants = small.gradient_constants(arch, PRODUCTS[product])
    return launch(neighbor_small_gradients, SYMMETRIC=symmetric, **constants)


def weighted(
    stages: Stages, values: Sequence[Tensor], log_sums, shares: tuple[float, float], terms_of=None
) -> list[Tensor]:
    """Σ_j A_ij values_j of every stage; shares: of l_i and l_j in A's exponent.

    terms_of: the node terms, to be written, and messages and output.
    """
    outputs, count = [x.new_empty(x.shape) for x in values], values[0].shape[0]
    with on_device(values[0]):
        _weighted(shares, stages.arch, stages.product.name)(
            (small.row_blocks(count), len(values)), tuple(stages.nodes), tuple(values), tuple(log_sums), tuple(outputs),
            *(tuple(x) for x in terms_of or (outputs,) * 3), tuple(stages.inverse_variances),
            tuple([x.shape[1] for x in stages.nodes]), tuple([x.shape[1] for x in values]), count,
            int(terms_of is not None),
        )  # fmt: skip
    return outputs


def nodes_gradients(stages: Stages, upstream, messages, log_sums, terms, symmetric: bool) -> list[Tensor]:
    """Of every stage's nodes; terms: the node terms."""
    gradients, count = [x.new_empty(x.shape) for x in stages.nodes], stages.nodes[0].shape[0]
    with on_device(stages.nodes[0]):
        _gradients(symmetric, stages.arch, stages.product.name)(
            (small.row_blocks(count), len(gradients)), tuple(stages.nodes), tuple(messages), tuple(upstream),
            tuple(log_sums), tuple(terms), tuple(gradients), tuple(stages.inverse_variances),
            tuple([x.shape[1] for x in stages.nodes]), tuple([x.shape[1] for x in messages]), count,
        )  # fmt: skip
    return gradients


def backward(
    stages: Stages, upstream, messages, outputs, log_sums, shares: tuple[float, float], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of all stages' nodes, then of their messages, those that ``needs`` asks for.

    shares: of the transposed normalization.
    """

    def convolve(stages, terms, upstream, messages, outputs, log_sums):
        return weighted(stages, upstream, log_sums, shares, (terms, messages, outputs))

    def move(stages, terms, upstream, messages, outputs, log_sums):
        return nodes_gradients(stages, upstream, messages, log_sums, terms, shares[0] == shares[1])

    return small_graphs.backward(stages, (upstream, messages, outputs, log_sums), needs, convolve, move)
