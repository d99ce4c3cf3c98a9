"""graph_conv of all stages of a call."""

from collections.abc import Sequence

from torch import Tensor

from gkd_fast.kernels.common.launch import architecture, matrices, product_of
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.graph_conv import launches, small
from gkd_fast.kernels.graph_conv.bandwidths import graph_inverse_variances

__all__ = ["graph_conv_stages", "graph_conv_stages_backward", "graph_inverse_variances"]


def _small(nodes, messages, inverse_variances: Tensor, product_precision: str) -> small.Stages | None:
    """What the kernels of small batches take; None for others."""
    if not is_small(nodes[0].shape[0], False, *[x.shape[1] for x in (*nodes, *messages)]):
        return None
    product, arch = product_of(product_precision, nodes[0]), architecture(nodes[0].device)
    return small.Stages(nodes, inverse_variances.unbind(), arch, product)


def graph_conv_stages(
    nodes: Sequence[Tensor], messages: Sequence[Tensor], inverse_variances: Tensor, normalization: str,
    product_precision: str,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    nodes, messages = matrices("nodes", nodes), matrices("messages", messages, nodes[0].shape[0])
    stages = _small(nodes, messages, inverse_variances, product_precision)
    if stages is not None:
        return small.graph_conv(stages, messages, launches._is_row(normalization))
    settings = normalization, product_precision
    found = [
        launches.graph_conv(*stage, *settings) for stage in zip(nodes, messages, inverse_variances, strict=True)
    ]  # fmt: skip
    outputs, degrees = zip(*found, strict=True)
    return list(outputs), list(degrees)


def graph_conv_stages_backward(
    upstream, nodes, messages, outputs, degrees, inverse_variances, normalization, product_precision, needs
) -> list[Tensor]:
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
    of_nodes, of_messages = [], []
    of_stages = zip(upstream, nodes, messages, outputs, degrees, inverse_variances, strict=True)
    for k, stage in enumerate(of_stages):
        wanted = [needs[k], needs[count + k]]
        found = launches.graph_conv_backward(*stage, normalization, product_precision, wanted) if any(wanted) else []
        of_nodes += found[: wanted[0]]
        of_messages += found[wanted[0] :]
    return of_nodes + of_messages
