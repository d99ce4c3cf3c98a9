"""pkt: the divergence of cosines as probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast._arguments import check_positive
from gkd_fast._compilation import leaves_graphs, meets_columns
from gkd_fast.distributed import Group
from gkd_fast.relations.common import Bank, Batch, as_multiplied, relation_losses


@leaves_graphs(meets_columns)
def pkt(
    students: Tensor,
    teachers: Tensor,
    *,
    eps: float = 1e-7,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: Group = None,
    bank: Bank = None,
    within: str = "batch",
    mask: Tensor | None = None,
) -> Tensor:
    """Probabilistic knowledge transfer (Passalis & Tefas, *Learning Deep Representations with Probabilistic Knowledge
    Transfer*, 2018): the mean over all B² pairs of P^t_ij log((P^t_ij + ε)/(P^s_ij + ε)).

    Row i of P are the cosines (r_i·r_j + 1)/2 divided by their sum, r = x/(‖x‖ + ε); the diagonal takes part.

    Args:
        students: ``[B, D_s]``.
        teachers: ``[B, D_t]``.
        eps: ε > 0.
        reduction: ``"mean"`` over the batch, or ``"none"``: ``[B]``, the means over j.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`; the mean is then
            such that its mean over ranks is the global loss.
        bank: M further samples to have relations with, ``[M, D_s]`` of the students and ``[M, D_t]`` of the teachers,
            without gradient and without losses of their own; the same on all ranks. The mean is then over
            B·(B + M) pairs, rows of P over B + M partners.
            Within tokens there is none.
        within: ``"batch"``, or ``"tokens"``: features are ``[B, N, D]``, tokens or patches of each sample, and every
            sample's are a graph of their own. The loss of a sample is that of its graph.
        mask: the tokens that count (not 0), ``[B, N]``; a sample without any has a loss of 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    eps = check_positive("eps", eps)

    def fused(batch: Batch) -> Tensor:
        sides = batch.mapped(lambda x: [as_multiplied(r, batch.precision) for r in _rows(x, eps)])
        # Σ_j (1 + r_i·r_j) = B + r_i·Σ_j r_j
        terms = torch.stack([1 / (batch.partners + (x.rows @ batch.partner_sum(x).mT)[..., 0]) for x in sides])
        return batch.pair_losses("pkt", sides, terms, ops.Fixed(batch.constants([eps]))) / batch.partners

    def definition(s, t):
        return reference.pkt(s, t, eps)

    told = "pkt", eps
    return relation_losses(
        told, definition, fused, students, teachers, reduction, backend, process_group, "pair_sums", None, within, mask,
        bank,
    )  # fmt: skip


def _rows(features: Sequence[Tensor], eps: float) -> list[Tensor]:
    """x/(‖x‖ + ε); a zero row stays zero."""
    unit, inverse_norms = ops.unit_rows_and_norms([x.flatten(0, -2) for x in features], features[0].dtype)
    return [
        (e / (1 + eps * (inverse if x.requires_grad else inverse.detach()))[:, None]).view(x.shape)
        for x, e, inverse in zip(features, unit, inverse_norms)
    ]
