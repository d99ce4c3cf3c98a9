"""graph_conv of nodes or messages too wide for a program's registers, a strip of rows at a time."""

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common.launch import Piece, column_pieces, on_device, power_of_two
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.strips import multiply, row_strips, strip_columns
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.graph_conv.tiles import graph_strip


def _strip(graph, rows: Tensor, start: int, piece: Piece, sums, gradient=None) -> Tensor:
    """Weights of one strip; ``gradient``: (products, terms, column terms, powers)."""
    config = tiles("strip", graph.arch, graph.product.name, 16)
    similarities = multiply(rows, piece.matrices[0].T)
    weights = torch.empty_like(similarities, dtype=graph.product.torch_type)
    products, terms, column_terms, powers = gradient or (sums, sums, sums, sums)
    constants = {
        "GRADIENT": gradient is not None, "SCALED": graph.product.scaled, "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns, "TYPE": graph.product.TYPE, "SUM": graph.product.SUM,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    launch(graph_strip, **constants)(
        (triton.cdiv(len(rows), config.rows),), similarities, products, weights, sums, terms, column_terms, powers,
        graph.inverse_variance, len(rows), piece.count, graph.offset + start - piece.start, int(piece.start > 0),
    )  # fmt: skip
    return weights


def kernel_sums(graph, values: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Σ_j K_ij f_j values_j, or None without values, and Σ_j K_ij."""
    dtype = graph.product.torch_type
    sums = graph.nodes.new_empty(graph.row_count)
    columns, factors = [graph.columns], [None]
    output = power = None
    if values is not None:
        output = values.new_zeros(graph.row_count, values.shape[1])
        if graph.product.scaled:
            power = power_of_two(values.abs().amax())
            factor = power.expand(len(values)) if factor is None else factor * power
        columns.append(values)
        factors.append(factor)
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, max(x.shape[1] for x in columns)):
            rows = graph.nodes[strip].to(dtype)
            for piece in column_pieces(columns, dtype, factors, strip_columns(len(rows), 2)):
                weights = _strip(graph, rows, strip.start, piece, sums[strip])
                if values is not None:
                    product = multiply(weights, piece.matrices[1])
                    # Float16 weights are scaled by 2^14 and its values by ``power``.
                    output[strip] += product if power is None else product * (2.0**-14 / power)
    return output, sums


def nodes_gradient(graph, own, other, factors, terms, column_terms, powers) -> Tensor:
    """dE_i = Σ_j M_ij e_j; ``factors``: of messages and upstream, for the rows and for the columns."""
    dtype, scaled = graph.product.torch_type, graph.product.scaled
    powers_of = (powers[0], powers[1]) if scaled else (None, None)

    def prepared(x: Tensor, factor: Tensor | None, power: Tensor | None) -> Tensor:
        x = x if factor is None else x * factor[:, None]
        return (x if power is None else x * power).to(dtype)

    (message_factor, upstream_factor), column_factors = factors
    message_power, upstream_power = powers_of
    gradient = torch.zeros_like(graph.nodes)
    widest = max(graph.dim, own.messages.shape[1])
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, widest):
            rows = graph.nodes[strip].to(dtype)
            h = prepared(own.messages[strip], None if message_factor is None else message_factor[strip], message_power)
            g = prepared(
                own.upstream[strip], None if upstream_factor is None else upstream_factor[strip], upstream_power
            )
            for piece in column_pieces([graph.columns], dtype, most=strip_columns(len(rows), 3)):
                here = slice(piece.start, piece.start + piece.count)
                of_message, of_upstream = (
                    (None, None) if column_factors is None else (f if f is None else f[here] for f in column_factors)
                )
                products = multiply(g, prepared(other.messages[here], of_message, message_power).T)
                if other.upstream is not None:
                    products += multiply(h, prepared(other.upstream[here], of_upstream, upstream_power).T)
                weights = _strip(graph, rows, strip.start, piece, gradient,
                                 (products, terms[strip], column_terms[here], powers))  # fmt: skip
                product = multiply(weights, piece.matrices[0])
                gradient[strip] += product / powers[2] if scaled else product
    return gradient
