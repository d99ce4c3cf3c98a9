"""similarity_preserving: differences of products, each sample's divided by their norm."""

from dataclasses import replace

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast._arguments import is_whole
from gkd_fast._compilation import leaves_graphs, meets_columns
from gkd_fast.distributed import Group
from gkd_fast.relations.common import Bank, Batch, Side, relation_losses
from gkd_fast.relations.gram import gram_dots
from gkd_fast.relations.gram_blocks import Cosines, blocked, in_blocks


@leaves_graphs(meets_columns)
def similarity_preserving(
    students: Tensor,
    teachers: Tensor,
    *,
    norm: int = 1,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: Group = None,
    bank: Bank = None,
    within: str = "batch",
    mask: Tensor | None = None,
) -> Tensor:
    """Similarity-preserving distillation (Tung & Mori, *Similarity-Preserving Knowledge Distillation*, 2019).

    ‖Q^s − Q^t‖²/B², where row i of Q are the products x_i·x_j divided by their norm: with ``norm=1`` the sum of
    absolute values, as common code has it, with ``norm=2`` the root of the sum of squares, which is the paper's.
    Neither needs a B×B matrix: Σ_j (s_i·s_j)(t_i·t_j) = s_iᵀ(SᵀT)t_i, and so are the squares; absolute values are
    summed in tiles. With ``norm=2`` all of it are ordinary PyTorch operations in O(B·D²), differentiable any number of
    times. The terms cancel where both nearly agree, so that in float32 a loss below about 1e-6 of them is not resolved.

    Args:
        students: ``[B, D_s]``.
        teachers: ``[B, D_t]``.
        norm: 1 or 2.
        reduction: ``"mean"`` over the batch, or ``"none"``: ``[B]``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`; the mean is then
            such that its mean over ranks is the global loss.
        bank: M further samples to have relations with, ``[M, D_s]`` of the students and ``[M, D_t]`` of the teachers,
            without gradient and without losses of their own; the same on all ranks. Rows of Q then
            have B + M entries, and the loss is ‖Q^s − Q^t‖²/(B·(B + M)).
            Within tokens there is none.
        within: ``"batch"``, or ``"tokens"``: features are ``[B, N, D]``, tokens or patches of each sample, and every
            sample's are a graph of their own. The loss of a sample is that of its graph.
        mask: the tokens that count (not 0), ``[B, N]``; a sample without any has a loss of 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    if not is_whole(norm) or norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm!r}")

    def inverse_norms(x: Side, squares: Tensor, batch: Batch) -> Tensor:
        if norm == 2:
            positive = squares > 0
            return torch.where(positive, torch.where(positive, squares, 1).rsqrt(), 0)
        # Products of the rows' own type: those of the Gram matrices are.
        precision = str(squares.dtype).removeprefix("torch.")
        sums = batch.pair_losses(
            "absolute_sums", [x], squares.new_empty(0, *squares.shape), ops.Fixed(batch.constants([])), precision
        ).to(squares.dtype)
        positive = sums > 0
        return torch.where(positive, 1 / torch.where(positive, sums, 1), 0)

    def fused(batch: Batch) -> Tensor:
        if norm == 2 and blocked(batch):
            return (
                in_blocks(Cosines(), lambda s, t: plain(replace(batch, students=s, teachers=t)), *batch.sides)
                / batch.size
            )
        return plain(batch) / batch.partners

    def plain(batch: Batch) -> Tensor:
        scales = _scales(batch)
        s, t = batch.mapped(lambda x: [y * scale for y, scale in zip(x, scales)])
        squares = gram_dots(s, s, batch), gram_dots(t, t, batch)
        a, b = (inverse_norms(x, square, batch) for x, square in zip((s, t), squares))
        return a.square() * squares[0] + b.square() * squares[1] - 2 * a * b * gram_dots(s, t, batch)

    def definition(s: Tensor, t: Tensor) -> Tensor:
        return reference.similarity_preserving(s, t, norm)

    told = "similarity_preserving", norm
    op = "pair_sums" if norm == 1 else None
    return relation_losses(
        told, definition, fused, students, teachers, reduction, backend, process_group, op, None, within, mask, bank
    )


def _scales(batch: Batch) -> list[Tensor]:
    """What brings the largest entry of each side to 1, so that products of four rows neither over- nor underflow; the
    loss does not depend on it."""
    found = []
    for q, x in enumerate(batch.sides):
        largest = x.detach().abs().amax(dim=(-2, -1), keepdim=True) if len(x) else x.new_zeros((1, 1))
        if batch.bank is not None:
            largest = torch.maximum(largest, batch.bank[q].abs().amax())
        if batch.shards is not None:
            largest = batch.shards.stack(largest).amax(dim=0)
        found.append(1 / torch.where(largest > 0, largest, 1))
    return found
