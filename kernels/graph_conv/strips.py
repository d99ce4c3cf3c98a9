"""graph_conv of nodes or messages too wide for a program's registers, a strip of rows at a time."""

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.operands import Operand
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
from gkd_fast.kernels.graph_conv.graphs import Others, share_constants
from gkd_fast.kernels.graph_conv.tiles import graph_strip, keeps_sums


def _strip(
    graph, rows: Operand, columns: Operand, strip: slice, piece: slice, sums, rounded_sums, gradient=None,
    others: Others | None = None,
) -> Tensor:  # fmt: skip
    """Weights of one strip, whose sums are added to ``sums``, those of parts, and where these are kept the sums of the
    rounded ones to the others; ``gradient``: (products, terms, column terms, powers).
    """
    config = tiles("strip", graph.arch, graph.product.name, 16)
    rows, columns = rows[strip], columns[aligned(piece)]
    similarities = multiply(rows.rows, columns.rows.T)
    weights = torch.empty_like(similarities, dtype=graph.product.torch_type)
    products, terms, column_terms, powers = gradient or (sums, sums, sums, sums)
    constants = {
        "GRADIENT": gradient is not None, "SCALED": graph.product.scaled, **share_constants(others),
        "DIAGONAL": graph.diagonal,
        "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns, "TYPE": graph.product.TYPE,
        "SUM": graph.product.SUM, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    launch(graph_strip, **constants)(
        (cdiv(sums.shape[1], config.rows), len(sums)), similarities, products, weights, sums, rounded_sums,
        rows.numbers, columns.numbers, terms, column_terms, powers, graph.inverse_variance,
        *((others.rows[strip], others.columns[piece]) if others else (sums, sums)), sums.shape[1],
        piece.stop - piece.start, graph.offset + strip.start - piece.start, int(piece.start > 0),
    )  # fmt: skip
    return weights


def _pieces(graph, strip: slice, similarities: int) -> tuple[list[slice], Tensor]:
    """The columns that go with a strip of rows at a time, and room for the parts of the weights' sums."""
    rows = strip.stop - strip.start
    step = strip_columns(rows, entry_bytes(graph.product, similarities, 1))
    config = tiles("strip", graph.arch, graph.product.name, 16)
    parts = strip_parts(graph.nodes.device, config, rows, min(step, graph.column_count))
    return list(column_strips(graph.column_count, step)), graph.nodes.new_empty(parts, rows)


def kernel_sums(
    graph, values: Operand | None, power: Tensor | None, width: int, others: Others | None = None
) -> tuple[Tensor | None, Tensor]:
    """Σ_j K_ij values_j, or None without values, and Σ_j K_ij; power: what the values were multiplied by."""
    sums = graph.nodes.new_empty(graph.row_count)
    output = None if values is None else graph.nodes.new_zeros(graph.row_count, width)
    rows, columns = graph.operands(graph.form(width))
    keeps = values is not None and keeps_sums(graph.diagonal, graph.product.TYPE, graph.product.PRECISION)
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, max(graph.dim, width)):
            pieces, parts = _pieces(graph, strip, 1)
            of_rounded = torch.empty_like(parts) if keeps else parts
            for piece in pieces:
                weights = _strip(graph, rows, columns, strip, piece, parts, of_rounded, others=others)
                if values is not None:
                    add_products(output[strip], weights, values.rows[aligned(piece)])
                del weights  # before the next ones are made
            torch.sum(parts, dim=0, out=sums[strip])
            if values is not None:
                if keeps:
                    rounded = of_rounded.sum(dim=0)
                    output[strip] *= torch.where(rounded > 0, sums[strip] / rounded, 0)[:, None]
                if power is not None:
                    # Float16 weights are scaled by 2^14 and its values by ``power``.
                    output[strip] *= 2.0**-14 / power
                output[strip].addcmul_(sums[strip][:, None], values.centre[:width])
    return output, sums


def nodes_gradient(graph, own, other, terms, column_terms, powers, width: int) -> Tensor:
    """dE_i = Σ_j M_ij e_j; own, other: ``Values`` of the rows and of the columns."""
    gradient = torch.zeros_like(graph.nodes)
    rows, columns = graph.operands(graph.form(width))
    with on_device(graph.nodes):
        for strip in row_strips(graph.row_count, max(graph.dim, width)):
            pieces, parts = _pieces(graph, strip, 2)
            for piece in pieces:
                here = aligned(piece)
                products = multiply(own.upstream.rows[strip], other.messages.rows[here].T)
                if other.upstream is not None:
                    add_products(products, own.messages.rows[strip], other.upstream.rows[here].T)
                weights = _strip(graph, rows, columns, strip, piece, parts, parts,
                                 (products, terms[strip], column_terms[piece], powers))  # fmt: skip
                add_products(gradient[strip], weights, columns.rows[here])
                del products, weights
            gradient[strip].addcmul_(parts.sum(dim=0)[:, None], columns.centre[: graph.dim])
            if graph.product.scaled:
                gradient[strip] /= powers[2]
    return gradient
