"""graph_conv of nodes or messages too wide for a program's registers, a strip of rows at a time."""

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.operands import Operand, stored_width
from gkd_fast.kernels.common.strips import column_strips, multiply, row_strips, strip_columns
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.graph_conv.tiles import graph_strip


def _strip(graph, rows: Operand, columns: Operand, strip: slice, piece: slice, sums, gradient=None) -> Tensor:
    """Weights of one strip, whose sums are added to ``sums``; ``gradient``: (products, terms, column terms, powers)."""
    config = tiles("strip", graph.arch, graph.product.name, 16)
    rows, columns = rows[strip], columns[piece]
    similarities = multiply(rows.rows, columns.rows.T)
    weights = torch.empty_like(similarities, dtype=graph.product.torch_type)
    products, terms, column_terms, powers = gradient or (sums, sums, sums, sums)
    constants = {
        "GRADIENT": gradient is not None, "SCALED": graph.product.scaled, "DIAGONAL": graph.diagonal,
        "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns, "TYPE": graph.product.TYPE,
        "SUM": graph.product.SUM, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    launch(graph_strip, **constants)(
        (cdiv(len(sums), config.rows),), similarities, products, weights, sums, rows.numbers, columns.numbers,
        terms, column_terms, powers, graph.inverse_variance, *similarities.shape,
        graph.offset + strip.start - piece.start, int(piece.start > 0),
    )  # fmt: skip
    return weights


def kernel_sums(graph, values: Operand | None, power: Tensor | None, width: int) -> tuple[Tensor | None, Tensor]:
    """Σ_j K_ij values_j, or None without values, and Σ_j K_ij; power: what the values were multiplied by."""
    sums = graph.nodes.new_empty(graph.row_count)
    output = None if values is None else graph.nodes.new_zeros(graph.row_count, width)
    rows, columns = graph.operands(stored_width(graph.dim, True))
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, max(graph.dim, width)):
            of_strip = sums[strip]
            for piece in column_strips(graph.column_count, strip_columns(len(of_strip), 2)):
                weights = _strip(graph, rows, columns, strip, piece, of_strip)
                if values is not None:
                    product = multiply(weights, values.rows[piece])[:, :width]
                    # Float16 weights are scaled by 2^14 and its values by ``power``.
                    output[strip] += product if power is None else product * (2.0**-14 / power)
            if values is not None:
                output[strip].addcmul_(of_strip[:, None], values.centre[:width])
    return output, sums


def nodes_gradient(graph, own, other, terms, column_terms, powers, width: int) -> Tensor:
    """dE_i = Σ_j M_ij e_j; own, other: ``Values`` of the rows and of the columns."""
    gradient = torch.zeros_like(graph.nodes)
    sums = gradient.new_empty(graph.row_count)
    rows, columns = graph.operands(stored_width(graph.dim, True))
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, max(graph.dim, width)):
            of_strip = sums[strip]
            for piece in column_strips(graph.column_count, strip_columns(len(of_strip), 3)):
                products = multiply(own.upstream.rows[strip], other.messages.rows[piece].T)
                if other.upstream is not None:
                    products += multiply(own.messages.rows[strip], other.upstream.rows[piece].T)
                weights = _strip(graph, rows, columns, strip, piece, of_strip,
                                 (products, terms[strip], column_terms[piece], powers))  # fmt: skip
                gradient[strip] += multiply(weights, columns.rows[piece])[:, : graph.dim]
            gradient[strip].addcmul_(of_strip[:, None], columns.centre[: graph.dim])
            if graph.product.scaled:
                gradient[strip] /= powers[2]
    return gradient
