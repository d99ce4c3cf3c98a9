"""graph_conv of all stages of a call."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gkd_fast.kernels.common.launch import architecture, matrices, product_of
from gkd_fast.kernels.common.operands import Prepared
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.graph_conv import launches, small
from gkd_fast.kernels.graph_conv.bandwidths import graph_inverse_variances
from gkd_fast.kernels.graph_conv.graphs import Graph
from gkd_fast.kernels.graph_conv.values import Side

__all__ = ["graph_conv_stages", "graph_conv_stages_backward", "graph_inverse_variances"]


def _small(nodes, messages, inverse_variances: Tensor, product_precision: str) -> small.Stages | None:
    """What the kernels of small batches take; None for others."""
    if not is_small(nodes[0].shape[0], False, *[x.shape[1] for x in (*nodes, *messages)]):
        return None
    product, arch = product_of(product_precision, nodes[0]), architecture(nodes[0].device)
    return small.Stages(nodes, inverse_variances.unbind(), arch, product)


def graph_conv_stages(
    nodes: Sequence[Tensor], messages: Sequence[Tensor], inverse_variances: Tensor, normalization: str,
    product_precision: str, *, prepared: Prepared | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    nodes, messages = matrices("nodes", nodes), matrices("messages", messages, nodes[0].shape[0])
    stages = _small(nodes, messages, inverse_variances, product_precision)
    if stages is not None:
        return small.graph_conv(stages, messages, launches._is_row(normalization))
    outputs: list = [None] * len(nodes)
    degrees: list = [None] * len(nodes)
    for group, graphs in _kinds(nodes, messages, inverse_variances, product_precision, prepared):
        found = launches.convolutions(graphs, [messages[k] for k in group], launches._is_row(normalization))
        for k, output, degree in zip(group, *found, strict=True):
            outputs[k], degrees[k] = output, degree
    return outputs, degrees


def _kinds(
    nodes, messages, inverse_variances: Tensor, product_precision: str, prepared: Prepared | None,
    places: Sequence[int] | None = None,
):  # fmt: skip
    """The places of the stages that share their launches, and their graphs."""
    groups: dict[Any, list[tuple[int, Graph]]] = {}
    prepared = prepared or Prepared()
    for k in range(len(nodes)) if places is None else places:
        graph = Graph(nodes[k], inverse_variances[k], product_precision, None, 0, prepared, k)
        groups.setdefault(graph.kind(messages[k].shape[1]), []).append((k, graph))
    for group in groups.values():
        yield tuple(zip(*group, strict=True))


def graph_conv_stages_backward(
    upstream, nodes, messages, outputs, degrees, inverse_variances, normalization, product_precision, needs,
    *, prepared=None,
) -> list[Tensor]:  # fmt: skip
    count, rows = len(nodes), nodes[0].shape[0]
    if len(needs) != 2 * count:
        raise ValueError(f"needs must have {2 * count} entries, got {len(needs)}")
    nodes, messages = matrices("nodes", nodes), matrices("messages", messages, rows)
    upstream, outputs = matrices("upstream", upstream, rows), matrices("outputs", outputs, rows)
    stages = _small(nodes, messages, inverse_variances, product_precision)
    if stages is not None:
        return small.graph_conv_backward(
            stages, upstream, messages, outputs, degrees, launches._is_row(normalization), needs
        )
    is_row = launches._is_row(normalization)
    gradients: list[Tensor | None] = [None] * (2 * count)
    used = [k for k in range(count) if needs[k] or needs[count + k]]
    for group, graphs in _kinds(nodes, messages, inverse_variances, product_precision, prepared, used):
        sides = [Side(messages[k], upstream[k], degrees[k].contiguous()) for k in group]
        wanted = [(needs[k], needs[count + k]) for k in group]
        found = launches.convolution_gradients(graphs, sides, sides, [outputs[k] for k in group], is_row, wanted)
        for k, of_nodes, of_messages in zip(group, *found, strict=True):
            gradients[k], gradients[count + k] = of_nodes, of_messages
    return [x for x in gradients if x is not None]
