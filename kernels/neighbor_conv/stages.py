"""neighbor_conv of all stages of a call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import FLOATING, matrices, rows_of
from gkd_fast.kernels.common.operands import Prepared
from gkd_fast.kernels.graph_conv.graphs import by_kind
from gkd_fast.kernels.graph_conv.small import Stages
from gkd_fast.kernels.graph_conv.stages import graphs_of, small_stages
from gkd_fast.kernels.graph_conv.values import Side
from gkd_fast.kernels.neighbor_conv import small as small_batches
from gkd_fast.kernels.neighbor_conv.launches import NeighborGraph, convolutions, nodes_gradients, shares_of
from gkd_fast.kernels.neighbor_conv.sums import Sums, small_sums, sums

# Of the messages' gradient, which takes A transposed.
TRANSPOSED = {"row": "column", "symmetric": "symmetric"}


def neighbor_sums_stages(
    nodes: Sequence[Tensor], inverse_variances: Tensor, product_precision: str
) -> tuple[list[Tensor], ...]:
    nodes, variances = matrices("nodes", nodes), inverse_variances.unbind()
    stages = small_stages(nodes, [], variances, product_precision)
    if stages is None:
        found = _sums(graphs_of(NeighborGraph, nodes, variances, product_precision, None, range(len(nodes))))
    else:
        found = small_sums(stages)
    return tuple(list(of_stages) for of_stages in found)


def neighbor_conv_stages(
    nodes: Sequence[Tensor], messages: Sequence[Tensor], inverse_variances: Tensor, normalization: str,
    product_precision: str, *, prepared: Prepared | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    shares = shares_of(normalization, tuple(TRANSPOSED))
    nodes, messages = rows_of("nodes", nodes, prepared), matrices("messages", messages, nodes[0].shape[0], FLOATING)
    variances = inverse_variances.unbind()
    stages = small_stages(nodes, messages, variances, product_precision)
    if stages is not None:
        log_sums = small_sums(stages)[0]
        return small_batches.weighted(stages, messages, log_sums, shares), list(log_sums)
    graphs = graphs_of(NeighborGraph, nodes, variances, product_precision, prepared, range(len(nodes)))
    log_sums = _sums(graphs)[0]
    return _weighted(graphs, messages, log_sums, shares), list(log_sums)


def neighbor_conv_stages_backward(
    upstream, nodes, messages, outputs, log_sums, inverse_variances, normalization, product_precision, needs,
    *, prepared=None,
) -> list[Tensor]:  # fmt: skip
    count, rows = len(nodes), nodes[0].shape[0]
    if len(needs) != 2 * count:
        raise ValueError(f"needs must have {2 * count} entries, got {len(needs)}")
    transposed = shares_of(TRANSPOSED.get(normalization, normalization))
    nodes, messages = rows_of("nodes", nodes, prepared), matrices("messages", messages, rows, FLOATING)
    variances = inverse_variances.unbind()
    upstream, outputs = matrices("upstream", upstream, rows, FLOATING), matrices("outputs", outputs, rows)
    symmetric = normalization == "symmetric"
    of_nodes: list[Tensor | None] = [None] * count
    of_messages: list[Tensor | None] = [None] * count

    def made(places: list[int]) -> Stages | list[NeighborGraph]:
        """What the kernels of these stages take, small batches' or others'."""
        if small is not None:
            return small.of(places)
        return graphs_of(NeighborGraph, nodes, variances, product_precision, prepared, places)

    small = small_stages(nodes, messages, variances, product_precision)
    moved = [k for k in range(count) if needs[k]]
    convolved = [k for k in range(count) if needs[count + k] or (needs[k] and symmetric)]
    if convolved:
        some, given = made(convolved), ([x[k] for k in convolved] for x in (upstream, log_sums))
        weighted = _weighted if small is None else small_batches.weighted
        for k, gradient in zip(convolved, weighted(some, *given, transposed), strict=True):
            of_messages[k] = gradient
    if moved:
        own = [[x[k] for k in moved] for x in (upstream, messages, log_sums)]
        terms = _node_terms(*own[:2], *([x[k] for k in moved] for x in (outputs, of_messages)), symmetric)
        gradients = _nodes_gradients if small is None else small_batches.nodes_gradients
        for k, gradient in zip(moved, gradients(made(moved), *own, terms, symmetric), strict=True):
            of_nodes[k] = gradient
    found = [*of_nodes, *of_messages]
    return [x for x, needed in zip(found, needs, strict=True) if needed and x is not None]


def _sums(graphs: Sequence[NeighborGraph]) -> Sums:
    def of_kind(graphs):
        return zip(*sums(graphs), strict=True)

    return tuple(zip(*by_kind(of_kind, graphs, [1] * len(graphs)), strict=True))


def _weighted(graphs, values: Sequence[Tensor], log_sums, shares: tuple[float, float]) -> list[Tensor]:
    def of_kind(graphs, values, log_sums):
        return convolutions(graphs, values, log_sums, log_sums, shares)

    return by_kind(of_kind, graphs, [x.shape[1] for x in values], values, log_sums)


def _nodes_gradients(graphs, upstream, messages, log_sums, terms, symmetric: bool) -> list[Tensor]:
    def of_kind(graphs, upstream, messages, log_sums, terms):
        sides = [Side(*of_stage, None) for of_stage in zip(messages, upstream, strict=True)]
        return nodes_gradients(graphs, sides, sides, log_sums, log_sums, terms, terms, symmetric)

    return by_kind(of_kind, graphs, [x.shape[1] for x in messages], upstream, messages, log_sums, terms)


def _node_terms(upstream, messages, outputs, messages_gradients, symmetric: bool) -> list[Tensor]:
    """d of every stage, those of one width in one go."""
    if len({x.shape for x in outputs}) > 1:
        each = zip(upstream, messages, outputs, messages_gradients, strict=True)
        return [_node_terms(*([x] for x in of_stage), symmetric)[0] for of_stage in each]
    total = (torch.stack(upstream) * torch.stack(outputs)).sum(dim=2)
    if symmetric:
        total = (total + (torch.stack(messages) * torch.stack(messages_gradients)).sum(dim=2)) / 2
    return list((-total).unbind())
