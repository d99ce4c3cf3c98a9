"""The three functions in plain PyTorch: the definition that every fast path is judged against.

Simple and obviously right, never optimised: each builds its B×B matrices, and is differentiable
any number of times because it is ordinary PyTorch. The formulas are those of Yang et al.,
*Graph-Based Representation Knowledge Distillation for Image Classification*, 2024,
DOI 10.12263/DZXB.20230976; the inside of the graph convolution is this library's own choice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x [B, D]`` divided by their norms; a zero row stays zero and has zero gradient.

    The largest entry is divided out first, so that no square over- or underflows; it needs no
    gradient, because a unit row does not change when its row is scaled.
    """
    scale = x.detach().abs().amax(dim=1, keepdim=True)
    is_zero = scale < torch.finfo(x.dtype).tiny ** 0.5
    scaled = torch.where(is_zero, torch.ones_like(x), x / torch.where(is_zero, torch.ones_like(scale), scale))
    return torch.where(is_zero, torch.zeros_like(x), scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True))


def similarities(x: Tensor, bandwidth: float | Tensor, diagonal: float) -> Tensor:
    """K_ij = exp((e_i·e_j − 1)/σ²) = exp(−‖e_i − e_j‖²/(2σ²)) for i ≠ j; the diagonal is a constant."""
    e = unit_rows(x)
    kernel = torch.exp((e @ e.T - 1) / bandwidth**2)
    return kernel.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), diagonal)


def graph_conv(nodes: Tensor, messages: Tensor, bandwidth: float | Tensor, normalization: str = "symmetric") -> Tensor:
    """D^-1/2 A D^-1/2 H (``"symmetric"``) or D^-1 A H (``"row"``), with A_ii = 1 and D the row sums of A."""
    adjacency = similarities(nodes, bandwidth, diagonal=1.0)
    degrees = adjacency.sum(dim=1)
    if normalization == "row":
        return (adjacency / degrees[:, None]) @ messages
    return (adjacency * degrees.rsqrt()[:, None] * degrees.rsqrt()[None, :]) @ messages


def node_contrast(students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float = 0.1) -> Tensor:
    """ℓ_bst = −log softmax_j(s_b·t_j/τ)[b] of unit rows, ``[B, S, T]``."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        logits = unit_rows(student) @ unit_rows(teacher).T / temperature
        return -torch.log_softmax(logits, dim=1).diagonal()

    return torch.stack([torch.stack([loss(s, t) for t in teachers], dim=1) for s in students], dim=1)


def relation_kl(
    students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float = 0.1, bandwidth: float = 1.0
) -> Tensor:
    """ℓ_bst = Σ_j P^t_bj (log P^t_bj − log P^s_bj), ``[B, S, T]``.

    P is the row softmax of R/τ, R_ij = exp((e_i·e_j − 1)/σ²), R_ii = 0; the zero diagonal takes part.
    """

    def log_relations(x: Tensor) -> Tensor:
        return torch.log_softmax(similarities(x, bandwidth, diagonal=0.0) / temperature, dim=1)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_p_student, log_p_teacher = log_relations(student), log_relations(teacher)
        return (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(dim=1)

    return torch.stack([torch.stack([loss(s, t) for t in teachers], dim=1) for s in students], dim=1)
