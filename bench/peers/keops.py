"""The three ops in PyKeOps: symbolic B×B matrices, reduced without being held."""

import torch
import torch.nn.functional as F
from pykeops.torch import LazyTensor
from torch import Tensor


def _similarity(rows: Tensor, columns: Tensor) -> LazyTensor:
    return (LazyTensor(rows[:, None, :].contiguous()) * LazyTensor(columns[None, :, :].contiguous())).sum(-1)


def _column(x: Tensor) -> LazyTensor:
    return LazyTensor(x.reshape(-1, 1, 1).contiguous())


def graph_conv(nodes: Tensor, messages: Tensor, *, bandwidth: float, normalization: str) -> Tensor:
    e = F.normalize(nodes, dim=1)
    adjacency = ((_similarity(e, e) - 1) / bandwidth**2).exp()
    degrees = adjacency.sum(dim=1)
    if normalization == "row":
        return adjacency @ messages / degrees
    scale = degrees.rsqrt()
    return scale * (adjacency @ (scale * messages))


def node_contrast(students: list[Tensor], teachers: list[Tensor], *, temperature: float) -> Tensor:
    students = [F.normalize(x, dim=1) / temperature for x in students]
    teachers = [F.normalize(x, dim=1) for x in teachers]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return _similarity(student, teacher).logsumexp(dim=1)[:, 0] - (student * teacher).sum(dim=1)

    return torch.stack([torch.stack([loss(s, t) for t in teachers], dim=1) for s in students], dim=1)


def relation_kl(students: list[Tensor], teachers: list[Tensor], *, temperature: float, bandwidth: float) -> Tensor:
    index = torch.arange(len(students[0]), device=students[0].device, dtype=students[0].dtype)
    off_diagonal = ((_column(index) - LazyTensor(index.reshape(1, -1, 1))).abs() - 0.5).step()

    def logits(x: Tensor) -> LazyTensor:
        e = F.normalize(x, dim=1)
        return off_diagonal * ((_similarity(e, e) - 1) / bandwidth**2).exp() / temperature

    def loss(student: LazyTensor, teacher: LazyTensor) -> Tensor:
        log_sum_s, log_sum_t = student.logsumexp(dim=1)[:, 0], teacher.logsumexp(dim=1)[:, 0]
        p_teacher = (teacher - _column(log_sum_t)).exp()
        return (p_teacher * (teacher - student)).sum(dim=1)[:, 0] - log_sum_t + log_sum_s

    student_logits, teacher_logits = [logits(x) for x in students], [logits(x) for x in teachers]
    return torch.stack([torch.stack([loss(s, t) for t in teacher_logits], dim=1) for s in student_logits], dim=1)
