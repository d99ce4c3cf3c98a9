"""neighbor_conv of nodes or messages too wide for a program's registers: gradients, a strip of rows at a time."""

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.operands import stored_width
from gkd_fast.kernels.common.strips import column_strips, multiply, row_strips, strip_columns
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.neighbor_conv.tiles import neighbor_strip


def nodes_gradient(graph, levels, column_levels, own, other, terms, column_terms, powers, symmetric: bool) -> Tensor:
    """dE_i = Σ_j M_ij e_j; own, other: ``Values`` of the rows and of the columns."""
    gradient = torch.zeros_like(graph.nodes)
    sums = gradient.new_empty(graph.row_count)
    rows, columns = graph.operands(stored_width(graph.dim, True))
    has_upstream = other.upstream is not None
    config = tiles("strip", graph.arch, graph.product.name, 16)
    constants = {
        "SYMMETRIC": symmetric, "HAS_UPSTREAM": has_upstream, "SCALED": graph.product.scaled,
        "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns, "TYPE": graph.product.TYPE,
        "SUM": graph.product.SUM, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, max(graph.dim, own.messages.rows.shape[1])):
            of_strip = sums[strip]
            for piece in column_strips(graph.column_count, strip_columns(len(of_strip), 4)):
                similarities = multiply(rows.rows[strip], columns.rows[piece].T)
                ahead = behind = multiply(own.upstream.rows[strip], other.messages.rows[piece].T)
                if has_upstream:
                    behind = multiply(own.messages.rows[strip], other.upstream.rows[piece].T)
                    if symmetric:
                        ahead += behind
                weights = torch.empty_like(similarities, dtype=graph.product.torch_type)
                launch(neighbor_strip, **constants)(
                    (cdiv(len(of_strip), config.rows),), similarities, ahead, behind, weights, of_strip,
                    rows.numbers[strip], levels.numbers[strip], columns.numbers[piece], column_levels.numbers[piece],
                    terms.d[strip], terms.e[strip], column_terms.d[piece], column_terms.e[piece], powers,
                    graph.inverse_variance, *similarities.shape, graph.offset + strip.start - piece.start,
                    int(piece.start > 0),
                )  # fmt: skip
                gradient[strip] += multiply(weights, columns.rows[piece])[:, : graph.dim]
            gradient[strip].addcmul_(of_strip[:, None], columns.centre[: graph.dim])
            if graph.product.scaled:
                gradient[strip] /= powers[2]
    return gradient
