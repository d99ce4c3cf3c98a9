"""rkd_distance: differences of distances, each network's divided by their mean."""

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast.distributed import Group
from gkd_fast.relations.common import Batch, as_multiplied, relation_losses


def rkd_distance(
    students: Tensor, teachers: Tensor, *, reduction: str = "mean", backend: str = "auto", process_group: Group = None
) -> Tensor:
    """The distance-wise loss of relational distillation (Park et al., *Relational Knowledge Distillation*, 2019): the
    mean over all B² pairs of ρ(d^s_ij/μ^s − d^t_ij/μ^t).

    d_ij = ‖x_i − x_j‖ of the features as they are, at least 1e-6 where i ≠ j and 0 where i = j, μ their mean over
    i ≠ j, and ρ Huber's function: z²/2 up to |z| = 1, |z| − ½ beyond. The means have gradients, as the distances have.

    Args:
        students: ``[B, D_s]``.
        teachers: ``[B, D_t]``.
        reduction: ``"mean"`` over the batch, or ``"none"``: ``[B]``, the means over j.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`; the mean is then
            such that its mean over ranks is the global loss.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """

    def fused(batch: Batch) -> Tensor:
        # Distances do not change when all rows move, but n_i + n_j − 2x_ij is the more exact, the shorter rows are.
        centres = [batch.total(x.detach().sum(dim=0)) / batch.size for x in batch.sides]
        sides = [as_multiplied(x - centre, batch.precision) for x, centre in zip(batch.sides, centres)]
        terms = torch.stack([x.square().sum(dim=1) for x in sides])
        means = ops.MeanDistances(batch.size)
        losses = ops.pair_losses("rkd_distance", sides, terms, means, batch.precision, batch.columns(sides))
        return losses / batch.size

    return relation_losses(
        ("rkd_distance",), reference.rkd_distance, fused, students, teachers, reduction, backend, process_group,
        "pair_sums",
    )  # fmt: skip
