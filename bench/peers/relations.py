"""The losses over relations as they are used today: torchdistill's classes, if it is installed, and plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUT = "output"


def _of(name: str, *arguments, students: Tensor, teachers: Tensor, **options) -> Tensor:
    """torchdistill's loss of that class; its arguments begin with the paths of both sides."""
    from torchdistill.losses import mid_level

    loss = getattr(mid_level, name)(*arguments, **options)
    return loss({"student": {OUTPUT: students}}, {"teacher": {OUTPUT: teachers}})


def similarity_preserving(students: Tensor, teachers: Tensor) -> Tensor:
    return _of("SPKDLoss", "student", "teacher", "batchmean", students=students, teachers=teachers)


def similarity_preserving_2(students: Tensor, teachers: Tensor) -> Tensor:
    """The paper's norm, which torchdistill does not have."""
    students, teachers = (F.normalize(x @ x.T, dim=1) for x in (students, teachers))
    return (students - teachers).square().mean()


def correlation_congruence(students: Tensor, teachers: Tensor) -> Tensor:
    rows = {"students": F.normalize(students, dim=1), "teachers": F.normalize(teachers, dim=1)}
    return _of("CCKDLoss", "student", "teacher", {"type": "bilinear"}, "batchmean", **rows)


def pkt(students: Tensor, teachers: Tensor) -> Tensor:
    return _of("PKTLoss", "student", OUTPUT, "teacher", OUTPUT, students=students, teachers=teachers)


def rkd_distance(students: Tensor, teachers: Tensor) -> Tensor:
    return _of("RKDLoss", "student", "teacher", 1.0, 0.0, "mean", students=students, teachers=teachers)


def rkd_angle(students: Tensor, teachers: Tensor) -> Tensor:
    return _of("RKDLoss", "student", "teacher", 0.0, 1.0, "mean", students=students, teachers=teachers)


def info_nce(students: Tensor, teachers: Tensor) -> Tensor:
    logits = F.normalize(students, dim=1) @ F.normalize(teachers, dim=1).T / 0.07
    own = torch.arange(len(students), device=students.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
