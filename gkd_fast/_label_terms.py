"""What a distiller learns of labels and of the teacher's logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_fast._distilled import StageOutputs


def label_terms(
    student: StageOutputs,
    teacher: StageOutputs | None,
    labels: Tensor,
    kd_weight: float,
    temperature: float,
    label_smoothing: float,
) -> dict[str, Tensor]:
    """``cross_entropy`` and, where there is a teacher and its weight is not 0, ``kd``; both means over the student's
    branches, in float32 at least."""
    logits = [at_least_float32(x) for x in student.logits]
    target = labels.to(logits[0].dtype) if labels.is_floating_point() else labels
    losses = [F.cross_entropy(x, target, label_smoothing=label_smoothing) for x in logits]
    terms = {"cross_entropy": torch.stack(losses).mean()}
    if teacher is not None and kd_weight:
        terms["kd"] = kd_weight * _logit_distillation(logits, teacher.logits, temperature)
    return terms


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logit_distillation(student_logits: list[Tensor], teacher_logits: list[Tensor], temperature: float) -> Tensor:
    """KL(teacher ‖ student) at the temperature: branch to branch, or every branch to the teacher's own logits."""
    if len(teacher_logits) != len(student_logits):
        teacher_logits = [teacher_logits[-1]] * len(student_logits)
    return torch.stack(
        [
            F.kl_div(
                F.log_softmax(s / temperature, dim=1),
                F.log_softmax(at_least_float32(t) / temperature, dim=1),
                reduction="batchmean",
                log_target=True,
            )
            for s, t in zip(student_logits, teacher_logits)
        ]
    ).mean()
