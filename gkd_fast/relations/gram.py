"""Σ_j (x_i·x_j)(y_i·y_j) = x_iᵀ(XᵀY) y_i: sums over all pairs from matrices of the size width × width."""

from torch import Tensor

from gkd_fast.relations.common import Batch


def gram_dots(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    """Σ_j (x_i·x_j)(y_i·y_j), ``[B]`` or of graphs ``[G, N]``, j over the samples of all ranks."""
    return ((x @ batch.total(x.mT @ y)) * y).sum(dim=-1)


def gram_differences(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    """Σ_j (x_i·x_j − y_i·y_j)², likewise."""
    return gram_dots(x, x, batch) + gram_dots(y, y, batch) - 2 * gram_dots(x, y, batch)


def gram_total(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    """Their sum over the samples of all ranks, from the matrices alone; added in float64, because its terms cancel."""
    squares = [batch.total(a.mT @ b).double().square().sum(dim=(-2, -1)) for a, b in ((x, x), (y, y), (x, y))]
    return squares[0] + squares[1] - 2 * squares[2]
