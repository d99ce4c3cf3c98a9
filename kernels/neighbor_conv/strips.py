"""neighbor_conv of nodes or messages too wide for a program's registers: gradients, a strip of rows at a time."""

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.strips import (
    add_products,
    aligned,
    column_strips,
    entry_bytes,
    multiply,
    row_strips,
    strip_columns,
    strip_parts,
)  # fmt: skip
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.neighbor_conv.tiles import neighbor_strip


def nodes_gradient(
    graph, log_sums, column_log_sums, own, other, terms, column_terms, powers, symmetric: bool
) -> Tensor:
    """dE_i = Σ_j M_ij e_j; own, other: ``Values`` of the rows and of the columns."""
    gradient = torch.zeros_like(graph.nodes)
    rows, columns = graph.operands(graph.form(own.messages.rows.shape[1]))
    has_upstream = other.upstream is not None
    config = tiles("strip", graph.arch, graph.product.name, 16)
    constants = {
        "SYMMETRIC": symmetric, "HAS_UPSTREAM": has_upstream, "SCALED": graph.product.scaled,
        "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns, "TYPE": graph.product.TYPE,
        "SUM": graph.product.SUM, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, max(graph.dim, own.messages.rows.shape[1])):
            count = strip.stop - strip.start
            step = strip_columns(count, entry_bytes(graph.product, 3, 1))
            parts = strip_parts(gradient.device, config, count, min(step, graph.column_count))
            sums = gradient.new_empty(parts, count)
            for piece in column_strips(graph.column_count, step):
                here = aligned(piece)
                similarities = multiply(rows.rows[strip], columns.rows[here].T)
                ahead = behind = multiply(own.upstream.rows[strip], other.messages.rows[here].T)
                if has_upstream and symmetric:
                    add_products(ahead, own.messages.rows[strip], other.upstream.rows[here].T)
                elif has_upstream:
                    behind = multiply(own.messages.rows[strip], other.upstream.rows[here].T)
                weights = torch.empty_like(similarities, dtype=graph.product.torch_type)
                launch(neighbor_strip, **constants)(
                    (cdiv(count, config.rows), len(sums)), similarities, ahead, behind, weights, sums,
                    rows.numbers[strip], log_sums[strip], columns.numbers[here], column_log_sums[piece],
                    terms.d[strip], terms.e[strip], column_terms.d[piece], column_terms.e[piece], powers,
                    graph.inverse_variance, count, piece.stop - piece.start,
                    graph.offset + strip.start - piece.start, int(piece.start > 0),
                )  # fmt: skip
                add_products(gradient[strip], weights, columns.rows[here])
                del similarities, ahead, behind, weights  # before the next ones are made
            gradient[strip].addcmul_(sums.sum(dim=0)[:, None], columns.centre[: graph.dim])
            if graph.product.scaled:
                gradient[strip] /= powers[2]
    return gradient
