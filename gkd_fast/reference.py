"""The functions in plain PyTorch: the definition that every fast path is judged against.

Simple and obviously right, never optimised: each builds its B×B matrices, and is differentiable
any number of times because it is ordinary PyTorch. The formulas of graph_conv, node_contrast and relation_kl are those
of Yang et al., *Graph-Based Representation Knowledge Distillation for Image Classification*, 2024,
DOI 10.12263/DZXB.20230976; the inside of the graph convolution is this library's own choice. Those of the losses over a
batch's relations, from ``info_nce`` on, are named in :mod:`gkd_fast.functional`; they return losses per sample, whose
mean is the loss.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Squared distances are at least this.
LEAST_SQUARE = 1e-12


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


def graph_conv(
    nodes: Tensor,
    messages: Tensor,
    bandwidth: float | Tensor,
    normalization: str = "symmetric",
    self_weight: float | None = None,
) -> Tensor:
    """D^-1/2 A D^-1/2 H (``"symmetric"``) or D^-1 A H (``"row"``), with A_ii = 1 and D the row sums of A.

    With a ``self_weight`` ρ it is ρ H + (1 − ρ) ``neighbor_conv``; a node without others keeps its message.
    """
    if self_weight is not None:
        if len(nodes) == 1:
            return messages + 0 * unit_rows(nodes).sum()
        return self_weight * messages + (1 - self_weight) * neighbor_conv(nodes, messages, bandwidth, normalization)
    adjacency = similarities(nodes, bandwidth, diagonal=1.0)
    degrees = adjacency.sum(dim=1)
    if normalization == "row":
        return (adjacency / degrees[:, None]) @ messages
    return (adjacency * degrees.rsqrt()[:, None] * degrees.rsqrt()[None, :]) @ messages


def exponents(x: Tensor, bandwidth: float | Tensor) -> Tensor:
    """x_ij = (e_i·e_j − 1)/σ² for i ≠ j, −∞ for i = j."""
    e = unit_rows(x)
    return ((e @ e.T - 1) / bandwidth**2).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -torch.inf)


def neighbor_conv(
    nodes: Tensor, messages: Tensor, bandwidth: float | Tensor, normalization: str = "symmetric"
) -> Tensor:
    """Σ_j≠i A_ij h_j with A_ij = exp(x_ij − (l_i + l_j)/2) (``"symmetric"``) or exp(x_ij − l_i) (``"row"``), and
    l_i = log Σ_j≠i exp(x_ij): D^-1/2 K D^-1/2 or D^-1 K of K_ij = exp(x_ij), K_ii = 0, which underflows nowhere.
    """
    x = exponents(nodes, bandwidth)
    log_sums = x.logsumexp(dim=1)
    if normalization == "row":
        return (x - log_sums[:, None]).exp() @ messages
    return (x - (log_sums[:, None] + log_sums[None, :]) / 2).exp() @ messages


def neighbor_sums(nodes: Tensor, bandwidth: float | Tensor) -> Tensor:
    """log Σ_j≠i K_ij, log Σ_j≠i K_ij², and the means of x_ij weighted by K_ij and by K_ij²: ``[4, B]``."""
    x = exponents(nodes, bandwidth)
    finite = x.masked_fill(x == -torch.inf, 0)
    sums = [(power * x).logsumexp(dim=1) for power in (1, 2)]
    means = [
        ((power * x - total[:, None]).exp().nan_to_num(0) * finite).sum(dim=1) for power, total in zip((1, 2), sums)
    ]
    return torch.stack([*sums, *means])


def effective_neighbors(nodes: Tensor, bandwidth: float | Tensor) -> Tensor:
    """(Σ_j≠i K_ij)²/Σ_j≠i K_ij² = exp(2 l_i(σ) − l_i(σ/√2)), from 1 to B − 1; 0 of a node without others."""
    log_sums, sharp_log_sums, *_ = neighbor_sums(nodes, bandwidth)
    return (2 * log_sums - sharp_log_sums).exp().nan_to_num(0)


def at_least_zero(losses: Tensor) -> Tensor:
    """Losses that are ≥ 0 but for their roundings; the gradient stays that of their formula."""
    return losses + losses.detach().neg().clamp(min=0)


def node_contrast(students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float = 0.1) -> Tensor:
    """ℓ_bst = −log softmax_j(s_b·t_j/τ)[b] of unit rows, ``[B, S, T]``."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        logits = unit_rows(student) @ unit_rows(teacher).T / temperature
        return at_least_zero(-torch.log_softmax(logits, dim=1).diagonal())

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
        return at_least_zero((log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(dim=1))

    return torch.stack([torch.stack([loss(s, t) for t in teachers], dim=1) for s in students], dim=1)


def one_sided_info_nce(students: Tensor, teachers: Tensor, temperature: float | Tensor) -> Tensor:
    """ℓ_i = −log softmax_j(s_i·t_j/τ)[i] of unit rows; there may be more teachers than students."""
    logits = unit_rows(students) @ unit_rows(teachers).T / temperature
    return -torch.log_softmax(logits, dim=1).diagonal()


def info_nce(students: Tensor, teachers: Tensor, temperature: float | Tensor, symmetric: bool = True) -> Tensor:
    """ℓ_i = −log softmax_j(s_i·t_j/τ)[i], with ``symmetric`` the mean of this and −log softmax_j(s_j·t_i/τ)[i]."""
    losses = one_sided_info_nce(students, teachers, temperature)
    return (losses + one_sided_info_nce(teachers, students, temperature)) / 2 if symmetric else losses


def similarity_preserving(students: Tensor, teachers: Tensor, norm: int = 1) -> Tensor:
    """ℓ_i = Σ_j (Q^s_ij − Q^t_ij)²/B of the products x_i·x_j, each row divided by its norm."""

    def relations(x: Tensor) -> Tensor:
        products = x @ x.T
        sizes = (products.abs() if norm == 1 else products.square()).sum(dim=1, keepdim=True)
        safe = torch.where(sizes > 0, sizes, 1)
        return torch.where(sizes > 0, products / (safe if norm == 1 else safe.sqrt()), 0)

    return (relations(students) - relations(teachers)).square().mean(dim=1)


def correlation_congruence(
    students: Tensor, teachers: Tensor, kernel: str = "bilinear", gamma: float = 0.4, order: int = 2
) -> Tensor:
    """ℓ_i = Σ_j (K^s_ij − K^t_ij)²/B of unit rows' c = e_i·e_j; K = c or e^−2γ Σ_p≤order (2γc)^p/p!."""

    def relations(x: Tensor) -> Tensor:
        e = unit_rows(x)
        c = e @ e.T
        if kernel == "bilinear":
            return c
        terms = [(2 * gamma * c) ** p / math.factorial(p) for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)

    return (relations(students) - relations(teachers)).square().mean(dim=1)


def nearly_unit_rows(x: Tensor, eps: float) -> Tensor:
    """x/(‖x‖ + ε) of rows; a zero row stays zero and has zero gradient."""
    e = unit_rows(x)
    is_zero = (e == 0).all(dim=1, keepdim=True)
    largest = torch.where(is_zero, 1, x.detach().abs().amax(dim=1, keepdim=True))
    scaled = torch.where(is_zero, torch.ones_like(x), x / largest)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True) * largest
    return torch.where(is_zero, 0, e / (1 + eps / norms))


def pkt(students: Tensor, teachers: Tensor, eps: float = 1e-7) -> Tensor:
    """ℓ_i = Σ_j P^t_ij log((P^t_ij + ε)/(P^s_ij + ε))/B; P's rows are cosines, shifted to [0, 1], over their sum."""

    def relations(x: Tensor) -> Tensor:
        rows = nearly_unit_rows(x, eps)
        shifted = at_least_zero(rows @ rows.T + 1) / 2
        return shifted / shifted.sum(dim=1, keepdim=True)

    p, q = relations(students), relations(teachers)
    return (q * ((q + eps) / (p + eps)).log()).mean(dim=1)


def distances(x: Tensor) -> Tensor:
    """d_ij = ‖x_i − x_j‖, at least 1e-6 off the diagonal; rows about their mean are as far from each other."""
    x = x - x.mean(dim=0)
    squares = x.square().sum(dim=1)
    # In float16 LEAST_SQUARE is 0, at which clamp has the gradient 1 in PyTorch 2.11, and √ an infinite one.
    squares = squares[:, None] + squares[None, :] - 2 * x @ x.T
    d = torch.where(squares <= LEAST_SQUARE, LEAST_SQUARE, squares).sqrt()
    return d.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)


def rkd_distance(students: Tensor, teachers: Tensor, count: int | None = None) -> Tensor:
    """ℓ_i = Σ_j ρ(d^s_ij/μ^s − d^t_ij/μ^t)/B, ρ Huber's function and μ the mean of d off the diagonal.

    ``count``: i is one of the first so many rows, in the losses and in the mean; j always any.
    """

    def relations(x: Tensor) -> Tensor:
        d = distances(x)[:count]
        return d / (d.sum() / max(len(d) * (len(x) - 1), 1)).clamp(min=LEAST_SQUARE)

    return F.smooth_l1_loss(relations(students), relations(teachers), reduction="none").mean(dim=1)


def rkd_angle(students: Tensor, teachers: Tensor) -> Tensor:
    """ℓ_i = Σ_jk ρ(cos^s_ijk − cos^t_ijk)/B² of the cosines of the angles at i between j and k, ρ Huber's function."""

    def relations(x: Tensor) -> Tensor:
        differences = x[None, :, :] - x[:, None, :]
        squares = differences.square().sum(dim=2, keepdim=True)
        directions = torch.where(squares > 0, differences, 0) / torch.where(squares > 0, squares, 1).sqrt()
        return directions @ directions.transpose(1, 2)

    return F.smooth_l1_loss(relations(students), relations(teachers), reduction="none").mean(dim=(1, 2))


def within_tokens(
    loss: Callable[[Tensor, Tensor], Tensor], students: Tensor, teachers: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The mean loss of each sample's tokens ``[N, D]`` that count, ``[B]``; 0 of a sample without any."""
    counting = torch.ones_like(students[:, :, 0]) if mask is None else mask
    graphs = [(s[m != 0], t[m != 0]) for s, t, m in zip(students, teachers, counting)]
    means = [loss(s, t).mean() if len(s) else s.sum() + t.sum() for s, t in graphs]
    return torch.stack(means) if means else students.sum(dim=(1, 2))


def kd_divergence(students: Tensor, teachers: Tensor, temperature: float = 4.0, standardize: bool = False) -> Tensor:
    """ℓ_i = τ² KL(softmax(t_i/τ) ‖ softmax(s_i/τ)) of logits, ``standardize``: brought to mean 0 and deviation 1."""

    def log_probabilities(x: Tensor) -> Tensor:
        if standardize:
            centred = x - x.mean(dim=1, keepdim=True)
            variance = centred.square().sum(dim=1, keepdim=True) / max(x.shape[1] - 1, 1)
            deviation = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
            x = centred / (deviation + 1e-7)
        return torch.log_softmax(x / temperature, dim=1)

    log_p, log_q = log_probabilities(students), log_probabilities(teachers)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=1)
