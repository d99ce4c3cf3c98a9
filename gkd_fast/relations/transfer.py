"""pkt: the divergence of cosines as probabilities."""

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast._arguments import check_positive
from gkd_fast.distributed import Group
from gkd_fast.relations.common import Batch, as_multiplied, relation_losses


def pkt(
    students: Tensor,
    teachers: Tensor,
    *,
    eps: float = 1e-7,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: Group = None,
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
        within: ``"batch"``, or ``"tokens"``: features are ``[B, N, D]``, tokens or patches of each sample, and every
            sample's are a graph of their own. The loss of a sample is that of its graph.
        mask: the tokens that count (not 0), ``[B, N]``; a sample without any has a loss of 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    check_positive("eps", eps)

    def fused(batch: Batch) -> Tensor:
        sides = [as_multiplied(x, batch.precision) for x in _rows(list(batch.sides), eps)]
        # Σ_j (1 + r_i·r_j) = B + r_i·Σ_j r_j
        terms = torch.stack([1 / (batch.size + (r @ batch.row_sum(r)[..., None])[..., 0]) for r in sides])
        return batch.pair_losses("pkt", sides, terms, ops.Fixed(batch.constants([eps]))) / batch.size

    def definition(s, t):
        return reference.pkt(s, t, eps)

    told = "pkt", eps
    return relation_losses(
        told, definition, fused, students, teachers, reduction, backend, process_group, "pair_sums", None, within, mask
    )


def _rows(features: list[Tensor], eps: float) -> list[Tensor]:
    """x/(‖x‖ + ε); a zero row stays zero."""
    unit, inverse_norms = ops.unit_rows_and_norms([x.flatten(0, -2) for x in features], features[0].dtype)
    return [
        (e / (1 + eps * (inverse if x.requires_grad else inverse.detach()))[:, None]).view(x.shape)
        for x, e, inverse in zip(features, unit, inverse_norms)
    ]
