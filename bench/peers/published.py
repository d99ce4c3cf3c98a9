"""The three ops in the style of common research code: squared distances, clones, every pair from scratch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _squared_distances(x: Tensor) -> Tensor:
    e = F.normalize(x, p=2, dim=1)
    squares = e.pow(2).sum(dim=1)
    distances = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * torch.mm(e, e.t())).clamp(min=0).clone()
    distances[range(len(e)), range(len(e))] = 0
    return distances


def graph_conv(nodes: Tensor, messages: Tensor, *, bandwidth: float, normalization: str) -> Tensor:
    adjacency = torch.exp(-_squared_distances(nodes) / (2 * bandwidth**2))
    degrees = adjacency.sum(dim=1)
    if normalization == "row":
        return torch.mm(adjacency / degrees.view(-1, 1), messages)
    scale = degrees.pow(-0.5)
    return torch.mm(scale.view(-1, 1) * adjacency * scale.view(1, -1), messages)


def node_contrast(students: list[Tensor], teachers: list[Tensor], *, temperature: float) -> Tensor:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        similarity = torch.mm(F.normalize(student, dim=1), F.normalize(teacher, dim=1).t()) / temperature
        target = torch.arange(len(student), device=student.device)
        return F.cross_entropy(similarity.clone(), target, reduction="none")

    return torch.stack([torch.stack([loss(s, t) for t in teachers], dim=1) for s in students], dim=1)


def relation_kl(students: list[Tensor], teachers: list[Tensor], *, temperature: float, bandwidth: float) -> Tensor:
    def relations(x: Tensor) -> Tensor:
        similarity = torch.exp(-_squared_distances(x) / (2 * bandwidth**2)).clone()
        similarity[range(len(x)), range(len(x))] = 0
        return F.softmax(similarity / temperature, dim=1)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        p_student, p_teacher = relations(student), relations(teacher)
        return (p_teacher * (torch.log(p_teacher) - torch.log(p_student))).sum(dim=1)

    return torch.stack([torch.stack([loss(s, t) for t in teachers], dim=1) for s in students], dim=1)
