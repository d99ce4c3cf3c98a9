"""Σ_j (x_i·x_j)(y_i·y_j) = x_iᵀ(XᵀY) y_i: sums over all pairs from matrices of the size width × width."""

from torch import Tensor

from gkd_fast.relations.common import Batch, Side


def grams(x: Side, y: Side, batch: Batch) -> tuple[Tensor, Tensor]:
    """XᵀY of the samples of all ranks, and of these and the bank's."""
    own = batch.total(x.rows.mT @ y.rows)
    return own, own if x.bank is None else own + x.bank.T @ y.bank


def gram_dots(x: Side, y: Side, batch: Batch) -> Tensor:
    """Σ_j (x_i·x_j)(y_i·y_j), ``[B]`` or of graphs ``[G, N]``, j over all that a row meets."""
    return ((x.rows @ grams(x, y, batch)[1]) * y.rows).sum(dim=-1)


def gram_differences(x: Side, y: Side, batch: Batch) -> Tensor:
    """Σ_j (x_i·x_j − y_i·y_j)², likewise."""
    return gram_dots(x, x, batch) + gram_dots(y, y, batch) - 2 * gram_dots(x, y, batch)


def gram_total(x: Side, y: Side, batch: Batch) -> Tensor:
    """Their sum over the samples of all ranks, from the matrices alone; added in float64, because its terms cancel."""
    sums = []
    for a, b in ((x, x), (y, y), (x, y)):
        own, met = (gram.double() for gram in grams(a, b, batch))
        sums.append((own * met).sum(dim=(-2, -1)))
    return sums[0] + sums[1] - 2 * sums[2]
