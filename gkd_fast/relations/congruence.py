"""correlation_congruence: differences of the kernels of unit rows."""

import math

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast._arguments import check_positive
from gkd_fast.distributed import Group
from gkd_fast.relations.common import Batch, constants, relation_losses
from gkd_fast.relations.gram import gram_differences, gram_total

KERNELS = ("bilinear", "gaussian")


def correlation_congruence(
    students: Tensor,
    teachers: Tensor,
    *,
    kernel: str = "bilinear",
    gamma: float = 0.4,
    order: int = 2,
    squared: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: Group = None,
) -> Tensor:
    """Correlation congruence (Peng et al., *Correlation Congruence for Knowledge Distillation*, 2019): ‖K^s − K^t‖/B².

    K_ij is e_i·e_j of the L2-normalised rows e (``"bilinear"``), or a Taylor polynomial of the Gaussian kernel,
    e^−2γ Σ_p≤order (2γ e_i·e_j)^p/p! (``"gaussian"``). The bilinear kernel needs no B×B matrix: ‖SSᵀ − TTᵀ‖² =
    ‖SᵀS‖² + ‖TᵀT‖² − 2‖SᵀT‖². These terms cancel where both nearly agree, so that in float32 a squared loss below about
    1e-6 of them is not resolved.

    Args:
        students: ``[B, D_s]``.
        teachers: ``[B, D_t]``.
        kernel: ``"bilinear"`` or ``"gaussian"``.
        gamma: γ > 0 of the Gaussian kernel.
        order: degree of its polynomial, 1 to 16.
        squared: ‖K^s − K^t‖²/B², which is the paper's; without it the norm itself, as in common code.
        reduction: ``"mean"``, or for the squared loss ``"none"``: ``[B]``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`; the mean is then
            such that its mean over ranks is the global loss.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}")
    check_positive("gamma", gamma)
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 16:
        raise ValueError(f"order must be a whole number from 1 to 16, got {order!r}")
    if reduction == "none" and not squared:
        raise ValueError('reduction="none" needs squared=True: the norm is no mean of losses per sample')

    def fused(batch: Batch) -> Tensor:
        unit = ops.unit_rows(list(batch.sides), batch.students.dtype)
        if kernel == "bilinear":
            if reduction == "none":
                return gram_differences(*unit, batch) / batch.size
            return gram_total(*unit, batch)[None] / (batch.size * batch.ranks)
        factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
        terms = unit[0].new_empty(0, len(unit[0]))
        fixed = ops.Fixed(constants(factors, terms))
        losses = ops.pair_losses("polynomial", unit, terms, fixed, batch.precision, batch.columns(unit))
        return losses / batch.size

    def finish(losses: Tensor, batch: Batch) -> Tensor:
        squares = batch.total(losses.sum()) / batch.size
        return squares if squared else _root(squares) / batch.size

    def definition(s: Tensor, t: Tensor) -> Tensor:
        return reference.correlation_congruence(s, t, kernel, gamma, order)

    told = "correlation_congruence", kernel, gamma, order, squared
    op = "pair_sums" if kernel == "gaussian" else None
    return relation_losses(told, definition, fused, students, teachers, reduction, backend, process_group, op, finish)


def _root(x: Tensor) -> Tensor:
    """√x; 0 without gradient where roundings left nothing above 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)
