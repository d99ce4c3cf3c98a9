"""The bandwidths at which nodes have so many neighbours (``gkd_fast._neighbors``), of all stages, without the host.

After each pass of ``sums`` over the pairs one launch adds what the parts of the columns gave and the rows' numbers n,
and makes the search's step: a program per stage, whose state stays on the device in float64. Without starts a pass more
comes first, at so large a σ that all weights are equal: its means give the mean distance, of which the adaptive
bandwidth is made.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast import _neighbors
from gkd_fast.kernels.common.launch import on_device, rows_of
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.operands import Prepared
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.tile import COUNTS, number, pick
from gkd_fast.kernels.graph_conv.stages import graphs_of, small_stages
from gkd_fast.kernels.neighbor_conv.launches import NeighborGraph, finer
from gkd_fast.kernels.neighbor_conv.sum_tiles import MAX_BANDWIDTH, MIN_BANDWIDTH, known_bandwidth, sum_of_parts
from gkd_fast.kernels.neighbor_conv.sums import partial_sums_of_all, small_sums

BLOCK_ROWS = 512
LOWEST, HIGHEST = tl.constexpr(_neighbors.LOWEST), tl.constexpr(_neighbors.HIGHEST)
SHARE = tl.constexpr(_neighbors.BANDWIDTH_SHARE)
FLATTEST, STEEPEST = tl.constexpr(_neighbors.FLATTEST), tl.constexpr(_neighbors.STEEPEST)
LN2, LN8 = tl.constexpr(0.6931471805599453), tl.constexpr(2.0794415416798357)

# Numbers of a stage's state: t, the ends of where it is, and t and the slope of the pass before.
STATE = 5


@triton.jit
def of_all_nodes(log_sums, sharp_log_sums, means, sharp_means, row_count, parts, BLOCK_ROWS: tl.constexpr):
    """``_neighbors.moments``, Σ n_i and Σ dn_i/d log v, and Σ E_i."""
    numbers, changes = tl.zeros([BLOCK_ROWS], tl.float64), tl.zeros([BLOCK_ROWS], tl.float64)
    exponents = tl.zeros([BLOCK_ROWS], tl.float64)
    for i in range(0, row_count, BLOCK_ROWS):
        top, z, mean = sum_of_parts(log_sums, means, i, row_count, parts, BLOCK_ROWS)
        sharp_top, sharp_z, sharp_mean = sum_of_parts(sharp_log_sums, sharp_means, i, row_count, parts, BLOCK_ROWS)
        n = tl.exp(2 * top - sharp_top) * (z * z / sharp_z)
        n = tl.where((n == n) & (i + tl.arange(0, BLOCK_ROWS) < row_count), n, 0.0)
        numbers += n
        changes += 2 * n * (mean - sharp_mean)
        exponents += mean
    return tl.sum(numbers, 0), tl.sum(changes, 0), tl.sum(exponents, 0)


@triton.jit
def exact(x: tl.constexpr):
    """A number as it is: beside float64 too Triton makes float32 ones of Python's."""
    return number(x, tl.float64)


@triton.jit
def within(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def next_step(n, change, neighbors, t, low, high, before, slope_before, has_before):
    """The state of ``_neighbors.search`` after a pass at t that gave the mean n and its change."""
    n = tl.maximum(n, 1.0)
    slope = tl.maximum(-change / n, exact(FLATTEST))
    distance = tl.log(n / neighbors)
    has_moved = has_before & (t != before)
    shown = tl.log(slope / tl.where(has_moved, slope_before, slope)) / tl.where(has_moved, t - before, 1.0)
    is_shown = (shown >= exact(-0.1)) & (shown - shown == 0) & has_moved
    growth = tl.where(is_shown, within(shown, 0.0, STEEPEST), STEEPEST)
    growth = tl.where(distance > exact(LN8), tl.maximum(growth, 1.0), growth)
    low, high = tl.where(distance > 0, t, low), tl.where(distance > 0, high, t)
    bent = tl.maximum(growth, exact(1e-3))
    step = tl.log(1 + tl.maximum(bent * distance / slope, exact(-0.9))) / bent
    middle = (low + high) / 2
    lost = (distance < exact(-LN2)) & (low > exact(LOWEST))
    new = within(tl.where(lost, middle, t + step), exact(LOWEST), exact(HIGHEST))
    new = tl.where((new < low) | (new > high), middle, new)
    # What is no number is passed on, which no maximum does.
    return tl.where(change == change, new, change), low, high, t, slope


@triton.jit(do_not_specialize=COUNTS)
def neighbor_bandwidths(
    log_sums, sharp_log_sums, means, sharp_means, starts, states, bandwidths, inverse_variances, neighbors: tl.float64,
    row_count, parts, passes, is_cold, BLOCK_ROWS: tl.constexpr, STATE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """σ and 1/σ² of a stage after so many passes, the sums being the last one's, that of the first at the start.

    is_cold: 1 where the start is the largest σ and the first pass is for the mean distance.
    """
    stage = tl.program_id(0)
    state, start = states + stage * STATE, known_bandwidth(tl.load(pick(starts, stage)))
    low, high = exact(LOWEST), exact(HIGHEST)
    t = -2 * tl.log(start.to(tl.float64))
    # Exactly at an end, as a logarithm may not be.
    t = tl.where(start >= number(MAX_BANDWIDTH, start.dtype), low, t)
    t = tl.where(start <= number(MIN_BANDWIDTH, start.dtype), high, t)
    before, slope = t, t
    if passes > 1:
        t, low, high = tl.load(state), tl.load(state + 1), tl.load(state + 2)
        before, slope = tl.load(state + 3), tl.load(state + 4)
    n, change, exponents = of_all_nodes(pick(log_sums, stage), pick(sharp_log_sums, stage), pick(means, stage),
                                        pick(sharp_means, stage), row_count, parts, BLOCK_ROWS)  # fmt: skip
    if passes == is_cold:
        distance = tl.maximum(-exponents / row_count * tl.exp(-t), 0.0)
        t = within(-tl.log(distance * SHARE), low, high)
        t = tl.where(exponents == exponents, t, 0.0)
    else:
        t, low, high, before, slope = next_step(n / row_count, change / row_count, neighbors, t, low, high, before,
                                                slope, passes > 1 + is_cold)  # fmt: skip
    tl.store(state, t)
    tl.store(state + 1, low)
    tl.store(state + 2, high)
    tl.store(state + 3, before)
    tl.store(state + 4, slope)
    sigma = tl.exp(-0.5 * t).to(SUM)
    tl.store(pick(bandwidths, stage), sigma)
    tl.store(pick(inverse_variances, stage), 1 / (sigma * sigma))


@planned
def _step(dtype: torch.dtype) -> Launch:
    sum_type = tl.float64 if dtype == torch.float64 else tl.float32
    return launch(neighbor_bandwidths, BLOCK_ROWS=BLOCK_ROWS, STATE=STATE, SUM=sum_type)


def neighbor_bandwidths_stages(
    nodes: Sequence[Tensor], starts: Sequence[Tensor], neighbors: float, passes: int, product_precision: str,
    *, prepared: Prepared | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    nodes, stages = rows_of("nodes", nodes, prepared), len(nodes)
    first, count, is_cold = nodes[0], nodes[0].shape[0], int(not starts)
    at = tuple(starts) or (first.new_full((), _neighbors.MAX_BANDWIDTH),) * stages
    states = first.new_empty(stages, STATE, dtype=torch.float64)
    # Each begins at a multiple of 16 bytes, as starts do: for other addresses Triton has other kernels.
    apart = stages, 16 // first.element_size()
    bandwidths, inverse_variances = first.new_empty(apart)[:, 0], first.new_empty(apart)[:, 0]
    sigmas, variances = bandwidths.unbind(), inverse_variances.unbind()
    begun, step = at, _step(first.dtype)
    small = small_stages(nodes, [], variances, finer(product_precision))
    graphs = [] if small else graphs_of(NeighborGraph, nodes, variances, product_precision, prepared, range(stages))
    for k in range(is_cold + passes):
        sums, parts = partial_sums_of_all(graphs, at) if small is None else (small_sums(small, at), 1)
        with on_device(first):
            step((stages,), *sums, begun, states, sigmas, variances, float(neighbors), count, parts, k + 1, is_cold)
        at = sigmas
    return bandwidths, inverse_variances
