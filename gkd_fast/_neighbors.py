"""The bandwidth that gives nodes so many neighbours.

With the weights K_ij = exp((c_ij − 1)·v), v = 1/σ², node i listens to n_i = (Σ_j≠i K_ij)²/Σ_j≠i K_ij² others, which is
exp(2 l_i(v) − l_i(2v)) of the log-sums l. The mean n falls with v. Of the sums of one pass, with x_ij = (c_ij − 1)·v
and its means E weighted by K and E' by K², dn_i/d log v = 2 n_i (E_i − E'_i) is known too. log n is a function of
t = log v whose slope grows as e^{γt}: at first γ = 2, what normally distributed cosines give, later what the last two
passes show; nodes on a manifold have γ = 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Without any knowledge of σ; with a σ of the step before one is enough.
COLD_PASSES, WARM_PASSES = 7, 1
MIN_BANDWIDTH, MAX_BANDWIDTH = 0.01, 1000.0

# Adaptive bandwidth: σ² = BANDWIDTH_SHARE · mean over i ≠ j of (1 − c_ij), at least MIN_BANDWIDTH².
BANDWIDTH_SHARE = 0.5

LOWEST, HIGHEST = -2 * math.log(MAX_BANDWIDTH), -2 * math.log(MIN_BANDWIDTH)
FLATTEST = 1e-6  # a slope of log n: less is rounding
STEEPEST = 2.0  # the greatest γ

# Of graphs of as many nodes, at inverse variances [graphs]: their nodes' log-sums, sharp log-sums, means and sharp
# means, a list of the graphs' each.
Sums = Callable[[Tensor], Sequence[Sequence[Tensor]]]


def moments(sums: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ n_i and Σ dn_i/d log v of every graph's nodes, ``[graphs, 2]``; 0 of a node without others."""
    together = torch.stack([x for of_graphs in sums for x in of_graphs])
    log_sums, sharp_log_sums, means, sharp_means = together.unflatten(0, (4, -1)).unbind()
    n = (2 * log_sums - sharp_log_sums).exp().nan_to_num(0)
    return torch.stack([n.sum(dim=1), (2 * n * (means - sharp_means)).sum(dim=1)], dim=1)


def search(
    sums: Sums,
    starts: Tensor,
    neighbors: float,
    nodes: int,
    passes: int,
    dtype: torch.dtype,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """The bandwidths of several graphs, ``[graphs]``, from ``starts``; nothing waits for the device.

    Args:
        sums: a pass over the pairs of all graphs.
        starts: σ, ``[graphs]``, float64.
        neighbors: the wanted mean of n, below ``nodes`` − 1, the number of nodes on all ranks less one.
        dtype: of v.
        total: the sum of a tensor over the ranks.
    """
    t = (-2 * starts.double().log()).nan_to_num(0).clamp(LOWEST, HIGHEST)
    low, high = torch.full_like(t, LOWEST), torch.full_like(t, HIGHEST)
    growth = torch.full_like(t, STEEPEST)
    before: Tensor | None = None
    slope_before = t
    for _ in range(passes):
        n, change = (total(moments(sums(t.exp().to(dtype)))) / nodes).unbind(dim=1)
        n = n.clamp(min=1)
        slope = (-change / n).clamp(min=FLATTEST)  # of −log n
        distance = (n / neighbors).log()
        if before is not None:
            shown = (slope / slope_before).log() / (t - before)
            # A slope that falls leads to a plateau, after which clusters of their own come apart: from far, with care.
            growth = torch.where((shown >= -0.1) & shown.isfinite(), shown.clamp(0, STEEPEST), STEEPEST)
            growth = torch.where(distance > math.log(8), growth.clamp(min=1), growth)
        low, high = torch.where(distance > 0, t, low), torch.where(distance > 0, high, t)
        bent = growth.clamp(min=1e-3)
        step = (bent * distance / slope).clamp(min=-0.9).log1p() / bent
        middle = (low + high) / 2
        lost = (distance < -math.log(2)) & (low > LOWEST)  # n is far below, where the slope says little
        new = torch.where(lost, middle, t + step).clamp(LOWEST, HIGHEST)
        outside = (new < low) | (new > high)  # not on them: where n is found to the last digit the step is 0
        before, slope_before = t, slope
        t = torch.where(outside, middle, new)
    return (-t / 2).exp()
