"""graph_conv of all stages of a call."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from gkd_fast.kernels.common.launch import FLOATING, architecture, matrices, product_of, rows_of
from gkd_fast.kernels.common.operands import Prepared
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.graph_conv import launches, small
from gkd_fast.kernels.graph_conv.bandwidths import graph_inverse_variances
from gkd_fast.kernels.graph_conv.graphs import Graph, span
from gkd_fast.kernels.graph_conv.values import Side

__all__ = ["graph_conv_stages", "graph_conv_stages_backward", "graph_inverse_variances"]

Of = TypeVar("Of", bound=Graph)


def small_stages(nodes, messages, inverse_variances: Sequence[Tensor], product_precision: str) -> small.Stages | None:
    """What the kernels of small batches take; None for others."""
    if not is_small(nodes[0].shape[0], False, *[x.shape[1] for x in (*nodes, *messages)]):
        return None
    product, arch = product_of(product_precision, nodes[0]), architecture(nodes[0].device)
    return small.Stages(nodes, inverse_variances, arch, product)


def graph_conv_stages(
    nodes: Sequence[Tensor], messages: Sequence[Tensor], inverse_variances: Tensor, normalization: str,
    product_precision: str, *, prepared: Prepared | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    nodes, messages = rows_of("nodes", nodes, prepared), matrices("messages", messages, nodes[0].shape[0], FLOATING)
    variances = inverse_variances.unbind()
    stages = small_stages(nodes, messages, variances, product_precision)
    if stages is not None:
        return small.graph_conv(stages, messages, launches._is_row(normalization))
    graphs = graphs_of(Graph, nodes, variances, product_precision, prepared, range(len(nodes)))
    return launches.convolutions(graphs, messages, launches._is_row(normalization))


def graphs_of(
    kind: type[Of], nodes, inverse_variances: Sequence[Tensor], product_precision: str, prepared, places: Sequence[int]
) -> list[Of]:
    """The graphs, of a kind, of the stages at these places."""
    prepared, first = prepared or Prepared(), nodes[0]
    product = product_of(product_precision, first).name
    shared = span(tuple([x.size(1) for x in nodes]), first.size(0), product, first.device)
    graphs = [kind(nodes[k], inverse_variances[k], product_precision, None, 0, prepared, k, len(nodes)) for k in places]
    for graph in graphs:
        graph.span = max(graph.dim, shared) if not graph.is_wide() else graph.dim
    return graphs


def graph_conv_stages_backward(
    upstream, nodes, messages, outputs, degrees, inverse_variances, normalization, product_precision, needs,
    *, prepared=None,
) -> list[Tensor]:  # fmt: skip
    count, rows = len(nodes), nodes[0].shape[0]
    if len(needs) != 2 * count:
        raise ValueError(f"needs must have {2 * count} entries, got {len(needs)}")
    nodes, messages = rows_of("nodes", nodes, prepared), matrices("messages", messages, rows, FLOATING)
    upstream, outputs = matrices("upstream", upstream, rows, FLOATING), matrices("outputs", outputs, rows)
    if upstream[0].dtype != messages[0].dtype:
        raise ValueError(f"upstream must be of the messages' type, {messages[0].dtype}, got {upstream[0].dtype}")
    variances = inverse_variances.unbind()
    stages = small_stages(nodes, messages, variances, product_precision)
    if stages is not None:
        return small.graph_conv_backward(
            stages, upstream, messages, outputs, degrees, launches._is_row(normalization), needs
        )
    used = [k for k in range(count) if needs[k] or needs[count + k]]
    if not used:
        return []
    graphs = graphs_of(Graph, nodes, variances, product_precision, prepared, used)
    sides = [Side(messages[k], upstream[k], degrees[k].contiguous()) for k in used]
    wanted = [(needs[k], needs[count + k]) for k in used]
    of_nodes, of_messages = launches.convolution_gradients(
        graphs, sides, sides, [outputs[k] for k in used], launches._is_row(normalization), wanted
    )
    return [x for x in (*of_nodes, *of_messages) if x is not None]
