"""correlation_congruence: differences of the kernels of unit rows."""

import math

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast._arguments import check_choice, check_flag, check_positive, is_whole
from gkd_fast._compilation import leaves_graphs, meets_columns
from gkd_fast.distributed import Group
from gkd_fast.relations.common import REDUCTIONS, WITHIN, Bank, Batch, Side, relation_losses, unit_rows
from gkd_fast.relations.gram import gram_differences, gram_total
from gkd_fast.relations.gram_blocks import Differences, blocked, in_blocks

KERNELS = ("bilinear", "gaussian")


@leaves_graphs(meets_columns)
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
    bank: Bank = None,
    within: str = "batch",
    mask: Tensor | None = None,
) -> Tensor:
    """Correlation congruence (Peng et al., *Correlation Congruence for Knowledge Distillation*, 2019): ‖K^s − K^t‖/B².

    K_ij is e_i·e_j of the L2-normalised rows e (``"bilinear"``), or a Taylor polynomial of the Gaussian kernel,
    e^−2γ Σ_p≤order (2γ e_i·e_j)^p/p! (``"gaussian"``). The bilinear kernel needs no B×B matrix: ‖SSᵀ − TTᵀ‖² =
    ‖SᵀS‖² + ‖TᵀT‖² − 2‖SᵀT‖². These terms cancel where both nearly agree, so that in float32 a squared loss below about
    1e-6 of them is not resolved; nor then, without ``squared``, the direction of its gradient: a norm has none at 0.

    Args:
        students: ``[B, D_s]``.
        teachers: ``[B, D_t]``.
        kernel: ``"bilinear"`` or ``"gaussian"``.
        gamma: γ > 0 of the Gaussian kernel.
        order: degree of its polynomial, 1 to 16.
        squared: ‖K^s − K^t‖²/B², which is the paper's; without it the norm itself, as in common code.
        reduction: ``"mean"``, or for the squared loss and within tokens ``"none"``: ``[B]``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`; the mean is then
            such that its mean over ranks is the global loss.
        bank: M further samples to have relations with, ``[M, D_s]`` of the students and ``[M, D_t]`` of the teachers,
            without gradient and without losses of their own; the same on all ranks. Rows of K then
            have B + M entries, and the loss is ‖K^s − K^t‖/(B·(B + M)).
            Within tokens there is none.
        within: ``"batch"``, or ``"tokens"``: features are ``[B, N, D]``, tokens or patches of each sample, and every
            sample's are a graph of their own. The loss of a sample is that of its graph.
        mask: the tokens that count (not 0), ``[B, N]``; a sample without any has a loss of 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    check_choice("kernel", kernel, KERNELS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("within", within, WITHIN)
    gamma = check_positive("gamma", gamma)
    if not is_whole(order) or not 1 <= order <= 16:
        raise ValueError(f"order must be a whole number from 1 to 16, got {order!r}")
    squared = check_flag("squared", squared)
    if reduction == "none" and not squared and within == "batch":
        raise ValueError('reduction="none" needs squared=True: the norm is no mean of losses per sample')

    def fused(batch: Batch) -> Tensor:
        each = reduction == "none" and batch.counts is None
        size = batch.partners
        if kernel == "bilinear" and not each and blocked(batch):
            total = in_blocks(
                Differences(), lambda s, t: gram_total(*map(Side, unit_rows((s, t))), batch), *batch.sides
            )
            return total[None] / size
        unit = batch.mapped(unit_rows)
        if kernel == "bilinear":
            if each:
                return gram_differences(*unit, batch) / size
            return gram_total(*unit, batch)[..., None] / (size * batch.ranks)
        factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
        terms = unit[0].rows.new_empty(0, *unit[0].rows.shape[:-1])
        return batch.pair_losses("polynomial", unit, terms, ops.Fixed(batch.constants(factors))) / size

    def finish(squares: Tensor, pairs: float | Tensor) -> Tensor:
        return squares if squared else _root(squares) / pairs**0.5

    def definition(s: Tensor, t: Tensor) -> Tensor:
        return reference.correlation_congruence(s, t, kernel, gamma, order)

    told = "correlation_congruence", kernel, gamma, order, squared
    op = "pair_sums" if kernel == "gaussian" else None
    return relation_losses(
        told, definition, fused, students, teachers, reduction, backend, process_group, op, finish,
        within, mask, bank,
    )  # fmt: skip


def _root(x: Tensor) -> Tensor:
    """√x; 0 without gradient where roundings left nothing above 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)
