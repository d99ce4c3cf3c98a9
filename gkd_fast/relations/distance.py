"""rkd_distance: differences of distances, each network's divided by their mean."""

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast._arguments import stages_of
from gkd_fast._compilation import leaves_graphs, meets_columns
from gkd_fast.distributed import Group
from gkd_fast.relations.common import Bank, Batch, as_multiplied, relation_losses


@leaves_graphs(meets_columns)
def rkd_distance(
    students: Tensor,
    teachers: Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: Group = None,
    bank: Bank = None,
    within: str = "batch",
    mask: Tensor | None = None,
) -> Tensor:
    """The distance-wise loss of relational distillation (Park et al., *Relational Knowledge Distillation*, 2019): the
    mean over all B² pairs of ρ(d^s_ij/μ^s − d^t_ij/μ^t).

    d_ij = ‖x_i − x_j‖ of the features as they are, at least 1e-6 where i ≠ j and 0 where i = j, μ their mean over
    i ≠ j, and ρ Huber's function: z²/2 up to |z| = 1, |z| − ½ beyond. The means have gradients, as the distances have.
    d² is n_i + n_j − 2x_i·x_j of rows about their mean, n their squares, of which it loses a share of ε (n_i + n_j)/d²;
    below 2e-6 (float64: 4e-15) of n_i + n_j rows count as alike, without gradient. So on every backend rows that are
    much closer to each other than to the mean, as most are of width 1, have few digits of their gradients left, which
    grow with 1/d² in the second order.

    Args:
        students: ``[B, D_s]``.
        teachers: ``[B, D_t]``.
        reduction: ``"mean"`` over the batch, or ``"none"``: ``[B]``, the means over j.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`; the mean is then
            such that its mean over ranks is the global loss.
        bank: M further samples to have relations with, ``[M, D_s]`` of the students and ``[M, D_t]`` of the teachers,
            without gradient and without losses of their own; the same on all ranks. The mean is then over
            B·(B + M) pairs, μ that of the B·(B + M − 1) distances of a sample to another or to one of the bank.
            Within tokens there is none.
        within: ``"batch"``, or ``"tokens"``: features are ``[B, N, D]``, tokens or patches of each sample, and every
            sample's are a graph of their own. The loss of a sample is that of its graph.
        mask: the tokens that count (not 0), ``[B, N]``; a sample without any has a loss of 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """

    def fused(batch: Batch) -> Tensor:
        # Distances do not change when all rows move, but n_i + n_j − 2x_ij is the more exact, the shorter rows are.
        centres = batch.centres()
        sides = batch.mapped(lambda x: [as_multiplied(y - c, batch.precision) for y, c in zip(x, centres)])
        terms = torch.stack([x.rows.square().sum(dim=-1) for x in sides])
        of_bank = None if batch.bank is None else torch.stack([x.bank.square().sum(dim=-1) for x in sides])
        counts = batch.counts
        means = ops.MeanDistances(batch.size * (batch.partners - 1) if counts is None else counts * (counts - 1))
        return batch.pair_losses("rkd_distance", sides, terms, means, bank_terms=of_bank) / batch.partners

    def definition(s: Tensor, t: Tensor) -> Tensor:
        return reference.rkd_distance(s, t, None if bank is None else len(s) - len(stages_of("bank[0]", bank[0])[0]))

    return relation_losses(
        ("rkd_distance",), definition, fused, students, teachers, reduction, backend, process_group, "pair_sums", None,
        within, mask, bank,
    )  # fmt: skip
