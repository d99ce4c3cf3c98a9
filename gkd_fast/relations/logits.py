"""kd_divergence: logit distillation, which everything is compared with."""

from torch import Tensor

from gkd_fast import reference
from gkd_fast._arguments import check_choice, check_flag, check_positive, compute_dtype
from gkd_fast._autocast import autocast_disabled
from gkd_fast.relations.common import REDUCTIONS, check_pair


def kd_divergence(
    students: Tensor,
    teachers: Tensor,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Logit distillation (Hinton et al., 2015): τ² KL(softmax(t/τ) ‖ softmax(s/τ)), by ordinary PyTorch.

    Args:
        students: logits ``[B, C]``.
        teachers: logits ``[B, C]``.
        temperature: τ > 0.
        standardize: bring each sample's logits to mean 0 and standard deviation 1 first (Sun et al., *Logit
            Standardization in Knowledge Distillation*, 2024).
        reduction: ``"mean"`` over the batch, or ``"none"``: ``[B]``.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    standardize = check_flag("standardize", standardize)
    check_pair(students, teachers)
    temperature = check_positive("temperature", temperature)
    if students.shape != teachers.shape:
        raise ValueError(
            f"teachers must have the shape of students {tuple(students.shape)}, got {tuple(teachers.shape)}"
        )
    dtype = compute_dtype({"students": students, "teachers": teachers})
    with autocast_disabled(students):
        losses = reference.kd_divergence(students.to(dtype), teachers.to(dtype), temperature, standardize)
    return losses if reduction == "none" else losses.mean()
