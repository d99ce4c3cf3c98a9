"""neighbor_conv of all stages of a call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import FLOATING, matrices, rows_of
from gkd_fast.kernels.common.operands import Prepared
from gkd_fast.kernels.graph_conv.small import at
from gkd_fast.kernels.graph_conv.stages import graphs_of, small_stages
from gkd_fast.kernels.graph_conv.values import Side
from gkd_fast.kernels.neighbor_conv import small as small_batches
from gkd_fast.kernels.neighbor_conv.bandwidths import neighbor_bandwidths_stages
from gkd_fast.kernels.neighbor_conv.launches import NeighborGraph, convolutions, finer, gradients, shares_of
from gkd_fast.kernels.neighbor_conv.sums import small_sums, sums_of_all

__all__ = [
    "neighbor_bandwidths_stages", "neighbor_conv_gradients", "neighbor_conv_stages", "neighbor_conv_stages_backward"
]  # fmt: skip

# Of the messages' gradient, which takes A transposed.
TRANSPOSED = {"row": "column", "symmetric": "symmetric"}


def neighbor_conv_stages(
    nodes: Sequence[Tensor], messages: Sequence[Tensor], inverse_variances: Tensor, normalization: str,
    product_precision: str, *, prepared: Prepared | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    shares = shares_of(normalization, tuple(TRANSPOSED))
    nodes, messages = rows_of("nodes", nodes, prepared), matrices("messages", messages, nodes[0].shape[0], FLOATING)
    variances = inverse_variances.unbind()
    stages = small_stages(nodes, messages, variances, finer(product_precision))
    if stages is not None:
        log_sums = small_sums(stages)[0]
        return small_batches.weighted(stages, messages, log_sums, shares), list(log_sums)
    graphs = graphs_of(NeighborGraph, nodes, variances, product_precision, prepared, range(len(nodes)))
    log_sums = list(sums_of_all(graphs)[0])
    return convolutions(graphs, messages, log_sums, log_sums, shares), log_sums


def neighbor_conv_stages_backward(
    upstream, nodes, messages, outputs, log_sums, inverse_variances, normalization, product_precision, needs,
    *, prepared=None,
) -> list[Tensor]:  # fmt: skip
    count, rows = len(nodes), nodes[0].shape[0]
    if len(needs) != 2 * count:
        raise ValueError(f"needs must have {2 * count} entries, got {len(needs)}")
    if rows <= 2 and any(needs[:count]):
        # The one other of two nodes weighs 1 however far it is: gradients of 0, all of them cancellation.
        still, settings = [False] * count + needs[count:], (inverse_variances, normalization, product_precision)
        of_messages = neighbor_conv_stages_backward(
            upstream, nodes, messages, outputs, log_sums, *settings, still, prepared=prepared
        )
        return [torch.zeros_like(x) for x, needed in zip(nodes, needs) if needed] + of_messages
    transposed = shares_of(TRANSPOSED.get(normalization, normalization))
    nodes, messages = rows_of("nodes", nodes, prepared), matrices("messages", messages, rows, FLOATING)
    variances = inverse_variances.unbind()
    upstream, outputs = matrices("upstream", upstream, rows, FLOATING), matrices("outputs", outputs, rows)
    small = small_stages(nodes, messages, variances, finer(product_precision))
    if small is not None:
        return small_batches.backward(small, upstream, messages, outputs, log_sums, transposed, needs)
    used = [k for k in range(count) if needs[k] or needs[count + k]]
    if not used:
        return []
    graphs = graphs_of(NeighborGraph, nodes, variances, product_precision, prepared, used)
    sides = [Side(messages[k], upstream[k], None) for k in used]
    wanted = [(needs[k], needs[count + k]) for k in used]
    of_nodes, of_messages = gradients(graphs, sides, *at(used, outputs, log_sums), transposed, wanted)
    return [x for x in (*of_nodes, *of_messages) if x is not None]


def neighbor_conv_gradients(
    upstream, nodes, messages, output, log_sums, inverse_variance, normalization, product_precision, needs,
    affinities=None,
) -> list[Tensor]:  # fmt: skip
    rows = [[x] for x in (upstream, nodes, messages, output, log_sums)]
    return neighbor_conv_stages_backward(*rows, inverse_variance[None], normalization, product_precision, needs)
