"""rkd_angle: differences of the angles between all triples."""

from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast.relations.common import Batch, relation_losses


def rkd_angle(
    students: Tensor,
    teachers: Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: None = None,
    bank: None = None,
    within: str = "batch",
    mask: Tensor | None = None,
) -> Tensor:
    """The angle-wise loss of relational distillation (Park et al., *Relational Knowledge Distillation*, 2019): the mean
    over all B³ triples of ρ(cos^s_ijk − cos^t_ijk).

    cos_ijk is the cosine of the angle at i between j and k, (G_jk − G_ij − G_ik + G_ii)/(d_ij d_ik) with G_ij = x_i·x_j
    of the features as they are; 0 where j or k lies at i. ρ is Huber's function: z²/2 up to |z| = 1, |z| − ½ beyond.
    Rows about their mean are multiplied, so that d² and the cosines err by ε (n_i + n_j)/d², n their squares, and
    gradients by 1/d times that; below 2e-6 (float64: 4e-15) of n_i + n_j rows count as alike. Rows that are much closer
    to each other than to the mean, as most are of width 1, so have gradients of few digits.
    Time grows with B³, memory with B·D. The fused backends offer first derivatives. Its batch is this process's alone:
    triples of a global batch or of a bank would multiply the time of what is already the dearest of the losses.

    Args:
        students: ``[B, D_s]``.
        teachers: ``[B, D_t]``.
        reduction: ``"mean"`` over the batch, or ``"none"``: ``[B]``, the means over j and k.
        backend: ``"auto"``, ``"reference"`` (which needs B²·D numbers at once), ``"cpp"`` or ``"triton"``.
        process_group, bank: None; the other losses have them.
        within: ``"batch"``, or ``"tokens"``: features are ``[B, N, D]``, tokens or patches of each sample, and every
            sample's are a graph of their own. The loss of a sample is that of its graph.
        mask: the tokens that count (not 0), ``[B, N]``; a sample without any has a loss of 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    for name, given in (("process_group", process_group), ("bank", bank)):
        if given is not None:
            raise ValueError(
                f"{name} must be None: rkd_angle is of this process's samples alone, got a {type(given).__name__}; "
                "rkd_distance takes one"
            )

    def fused(batch: Batch) -> Tensor:
        # Angles do not change when all rows move, but differences of products are the more exact, the shorter rows are.
        sides = (x - centre for x, centre in zip(batch.sides, batch.centres()))
        return ops.rkd_angle(*sides, batch.counts) / batch.size**2

    return relation_losses(
        ("rkd_angle",), reference.rkd_angle, fused, students, teachers, reduction, backend, None, "rkd_angle", None,
        within, mask,
    )  # fmt: skip
