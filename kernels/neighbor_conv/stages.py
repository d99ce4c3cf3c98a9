"""neighbor_conv of all stages of a call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import FLOATING, matrices, rows_of
from gkd_fast.kernels.common.operands import Prepared
from gkd_fast.kernels.graph_conv.graphs import by_kind
from gkd_fast.kernels.graph_conv.stages import graphs_of, small_stages
from gkd_fast.kernels.graph_conv.values import Side, convolved_values
from gkd_fast.kernels.neighbor_conv import small as small_batches
from gkd_fast.kernels.neighbor_conv.bandwidths import neighbor_bandwidths_stages
from gkd_fast.kernels.neighbor_conv.launches import (
    NeighborGraph,
    both_sides,
    convolutions,
    nodes_gradients,
    shares_of,
    weighted,
    with_levels,
)  # fmt: skip
from gkd_fast.kernels.neighbor_conv.sums import partial_sums_of_all, small_sums

__all__ = ["neighbor_bandwidths_stages", "neighbor_conv_stages", "neighbor_conv_stages_backward"]

# Of the messages' gradient, which takes A transposed.
TRANSPOSED = {"row": "column", "symmetric": "symmetric"}


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
    partial, parts = partial_sums_of_all(graphs)
    log_sums = with_levels(graphs, [x.shape[1] for x in messages], partial[0], parts, max(shares))
    return convolutions(graphs, messages, log_sums, log_sums, shares), log_sums


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
    moved = [k for k in range(count) if needs[k]]
    convolved = [k for k in range(count) if needs[count + k] or (needs[k] and symmetric)]
    used = sorted({*moved, *convolved})
    if not used:
        return []
    small = small_stages(nodes, messages, variances, product_precision)
    if small is None:
        graphs = graphs_of(NeighborGraph, nodes, variances, product_precision, prepared, used)
        large = Large(graphs, used, [messages[k] for k in used], [upstream[k] for k in used], bool(moved))
    if convolved:
        own = [log_sums[k] for k in convolved]
        if small is None:
            found = large.weighted(convolved, own, transposed)
        else:
            found = small_batches.weighted(small.of(convolved), [upstream[k] for k in convolved], own, transposed)
        for k, gradient in zip(convolved, found, strict=True):
            of_messages[k] = gradient
    if moved:
        own = [[x[k] for k in moved] for x in (upstream, messages, log_sums)]
        terms = _node_terms(*own[:2], *([x[k] for k in moved] for x in (outputs, of_messages)), symmetric)
        if small is None:
            found = large.nodes_gradients(moved, own[2], terms, symmetric)
        else:
            found = small_batches.nodes_gradients(small.of(moved), *own, terms, symmetric)
        for k, gradient in zip(moved, found, strict=True):
            of_nodes[k] = gradient
    found = [*of_nodes, *of_messages]
    return [x for x, needed in zip(found, needs, strict=True) if needed and x is not None]


class Large:
    """The gradients' launches of large batches, of a call's stages ``places``, whose values are made once for both.

    both: whether messages are needed beside the upstream.
    """

    def __init__(self, graphs: Sequence[NeighborGraph], places: Sequence[int], messages, upstream, both: bool):
        self._graphs, self._messages = dict(zip(places, graphs)), dict(zip(places, messages))
        if both:
            sides = [Side(*of_stage, None) for of_stage in zip(messages, upstream, strict=True)]
            values = both_sides(graphs, sides, sides)[0]
            self._values = dict(zip(places, values))
            made = [(x.upstream, x.powers[1]) for x in values]
        else:
            made = list(zip(*convolved_values(graphs, upstream, [None] * len(graphs)), strict=True))
        self._upstream = dict(zip(places, made))

    def weighted(self, places: Sequence[int], log_sums, shares: tuple[float, float]) -> list[Tensor]:
        """Σ_j A_ij G_j."""
        graphs, messages = ([x[k] for k in places] for x in (self._graphs, self._messages))
        values, powers = zip(*[self._upstream[k] for k in places])
        return weighted(graphs, values, powers, messages, log_sums, log_sums, shares)

    def nodes_gradients(self, places: Sequence[int], log_sums, terms, symmetric: bool) -> list[Tensor]:
        def of_kind(graphs, values, widths, log_sums, terms):
            return nodes_gradients(graphs, values, values, widths, log_sums, log_sums, terms, terms, symmetric)

        widths = [self._messages[k].shape[1] for k in places]
        graphs, values = ([x[k] for k in places] for x in (self._graphs, self._values))
        return by_kind(of_kind, graphs, widths, values, widths, log_sums, terms)


def _node_terms(upstream, messages, outputs, messages_gradients, symmetric: bool) -> list[Tensor]:
    """d of every stage, those of one width in one go."""
    if len({x.shape for x in outputs}) > 1:
        each = zip(upstream, messages, outputs, messages_gradients, strict=True)
        return [_node_terms(*([x] for x in of_stage), symmetric)[0] for of_stage in each]
    total = (torch.stack(upstream) * torch.stack(outputs)).sum(dim=2)
    if symmetric:
        total = (total + (torch.stack(messages) * torch.stack(messages_gradients)).sum(dim=2)) / 2
    return list((-total).unbind())
