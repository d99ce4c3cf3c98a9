"""The three ops in ordinary PyTorch, written to be fast: each stage's matrix is made once and shared by its pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def graph_conv(nodes: Tensor, messages: Tensor, *, bandwidth: float, normalization: str) -> Tensor:
    e = F.normalize(nodes, dim=1)
    adjacency = torch.exp((e @ e.T - 1) / bandwidth**2)  # e_i·e_i = 1 makes the diagonal 1
    degrees = adjacency.sum(dim=1, keepdim=True)
    if normalization == "row":
        return adjacency @ messages / degrees
    scale = degrees.rsqrt()
    return scale * (adjacency @ (scale * messages))


def node_contrast(students: list[Tensor], teachers: list[Tensor], *, temperature: float) -> Tensor:
    scaled_students = [F.normalize(x, dim=1) / temperature for x in students]
    unit_teachers = [F.normalize(x, dim=1) for x in teachers]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return -F.log_softmax(student @ teacher.T, dim=1).diagonal()

    return torch.stack([torch.stack([loss(s, t) for t in unit_teachers], dim=1) for s in scaled_students], dim=1)


def relation_kl(students: list[Tensor], teachers: list[Tensor], *, temperature: float, bandwidth: float) -> Tensor:
    def log_relations(x: Tensor) -> Tensor:
        e = F.normalize(x, dim=1)
        logits = torch.exp((e @ e.T - 1) / bandwidth**2) / temperature
        return F.log_softmax(logits.fill_diagonal_(0), dim=1)

    log_students = [log_relations(x) for x in students]
    log_teachers = [log_relations(x) for x in teachers]
    pairs = []
    for log_t in log_teachers:
        p = log_t.exp()
        negative_entropy = (p * log_t).sum(dim=1)
        pairs.append(torch.stack([negative_entropy - (p * log_s).sum(dim=1) for log_s in log_students], dim=1))
    return torch.stack(pairs, dim=2)
