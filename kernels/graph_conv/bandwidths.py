"""Adaptive bandwidths of all stages, from their unit rows.

σ² = share · Σ_i≠j (1 − c_ij) / (B (B − 1)) with Σ_i≠j (1 − c_ij) = B Σ ‖e‖² − ‖Σ e‖² + (B − 1) · (number of zero rows),
in float64, where what is left of that difference is as exact as the rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, multiprocessors, on_device, padded_width
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.operands import Prepared
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.tile import COUNTS, load_tile, number, pick

BLOCK_ROWS, BLOCK_WIDTH = 32, 64
MOST_PARTS = 32


@triton.jit(do_not_specialize=COUNTS)
def graph_moments(
    nodes, dims, places, widths, centres, moments, squares, row_count, stride, parts, MEANS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Of a part's rows: Σ e at the stage's place of ``moments`` [parts, stride], Σ ‖e‖² and the zero rows' number; with
    MEANS also the part of the stage's centre [parts, width], as ``operands.means`` gives it.
    """
    part, stage = tl.program_id(0), tl.program_id(1)
    x, dim, out = pick(nodes, stage), pick(dims, stage), moments + part * stride + pick(places, stage)
    per_part = tl.cdiv(tl.cdiv(row_count, BLOCK_ROWS), parts) * BLOCK_ROWS
    first = part * per_part
    last = tl.minimum(first + per_part, row_count)
    column = tl.arange(0, BLOCK_WIDTH)
    width = dim
    if MEANS:
        width, centre = pick(widths, stage), pick(centres, stage)
    for k in range(0, width, BLOCK_WIDTH):
        total = tl.zeros([BLOCK_WIDTH], tl.float64)
        for i in range(first, last, BLOCK_ROWS):
            total += tl.sum(load_tile(x, i, k, last, dim, BLOCK_ROWS, BLOCK_WIDTH).to(tl.float64), 0)
        tl.store(out + k + column, total, mask=k + column < dim)
        if MEANS:
            # What is not finite counts as 0, so that it spoils no other rows.
            share = tl.where(total - total == 0, total, 0.0) / row_count
            place = centre + part * width + k + column
            tl.store(place, share.to(centre.dtype.element_ty), mask=k + column < width)
    length, zeros = tl.zeros([BLOCK_ROWS], tl.float64), tl.zeros([BLOCK_ROWS], tl.float64)
    for i in range(first, last, BLOCK_ROWS):
        along = tl.zeros([BLOCK_ROWS], tl.float64)
        for k in range(0, dim, BLOCK_WIDTH):
            piece = load_tile(x, i, k, last, dim, BLOCK_ROWS, BLOCK_WIDTH).to(tl.float64)
            along += tl.sum(piece * piece, 1)
        length += along
        zeros += tl.where((along == 0) & (i + tl.arange(0, BLOCK_ROWS) < last), 1.0, 0.0)
    place = squares + (part * tl.num_programs(1) + stage) * 2
    tl.store(place, tl.sum(length, 0))
    tl.store(place + 1, tl.sum(zeros, 0))


@triton.jit(do_not_specialize=COUNTS)
def graph_bandwidths(
    dims, places, moments, squares, inverse_variances, row_count, stride, parts, share: tl.float64, least: tl.float64,
    BLOCK_WIDTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """1/σ² of a stage, σ at least ``least``; 1 for a single row."""
    stage, stages = tl.program_id(0), tl.num_programs(0)
    dim, here = pick(dims, stage), moments + pick(places, stage)
    column = tl.arange(0, BLOCK_WIDTH)
    length = tl.zeros([BLOCK_WIDTH], tl.float64)
    for k in range(0, dim, BLOCK_WIDTH):
        total = tl.zeros([BLOCK_WIDTH], tl.float64)
        for part in range(0, parts):
            total += tl.load(here + part * stride + k + column, mask=k + column < dim, other=0)
        length += total * total
    own, zeros = number(0.0, tl.float64), number(0.0, tl.float64)
    for part in range(0, parts):
        own += tl.load(squares + (part * stages + stage) * 2)
        zeros += tl.load(squares + (part * stages + stage) * 2 + 1)
    count = number(row_count, tl.float64)
    pairs = count * tl.maximum(count - 1, 1)
    distances = count * own - tl.sum(length, 0) + (count - 1) * zeros
    variance = tl.maximum(number(share, tl.float64) * distances / pairs, number(least, tl.float64) * least)
    variance = tl.where(count == 1, 1.0, tl.where(distances == distances, variance, distances))
    tl.store(inverse_variances + stage, (1 / variance).to(SUM))


class Shape:
    """What follows from a call's numbers: places of the stages' sums, and how rows are divided among programs."""

    def __init__(self, dims: tuple[int, ...], count: int, device: torch.device):
        self.parts = max(1, min(MOST_PARTS, cdiv(count, BLOCK_ROWS), multiprocessors(device) // len(dims)))
        self.places, self.sum = tuple([sum(dims[:k]) for k in range(len(dims))]), sum(dims)
        self.widths = tuple([padded_width(dim) for dim in dims])


_shape = planned(Shape)


@planned
def _moments(means: bool) -> Launch:
    return launch(graph_moments, MEANS=means, BLOCK_ROWS=BLOCK_ROWS, BLOCK_WIDTH=BLOCK_WIDTH)


@planned
def _bandwidths(dtype: torch.dtype) -> Launch:
    return launch(graph_bandwidths, BLOCK_WIDTH=BLOCK_WIDTH, SUM=tl.float64 if dtype == torch.float64 else tl.float32)


def graph_inverse_variances(
    nodes: Sequence[Tensor], share: float, least: float, *, prepared: Prepared | None = None
) -> Tensor:
    """1/σ² of each stage, ``[stages]``; leaves the stages' means to the operands that are ``prepared``."""
    x, dims = nodes[0], tuple([y.shape[1] for y in nodes])
    count, stages = x.shape[0], len(dims)
    shape = _shape(dims, count, x.device)
    sums = x.new_empty(shape.parts, shape.sum, dtype=torch.float64)
    squares = x.new_empty(shape.parts, stages, 2, dtype=torch.float64)
    found = x.new_empty(stages)
    widths, centres = dims, nodes
    leaves_means = prepared is not None and not is_small(count, False, *dims)
    if leaves_means:
        widths = shape.widths
        centres = [x.new_empty(shape.parts, width) for width in widths]
        prepared.leave_means(centres)
    with on_device(x):
        _moments(leaves_means)(
            (shape.parts, stages), tuple(nodes), dims, shape.places, widths, tuple(centres), sums, squares, count,
            shape.sum, shape.parts,
        )  # fmt: skip
        _bandwidths(x.dtype)(
            (stages,), dims, shape.places, sums, squares, found, count, shape.sum, shape.parts, share, least
        )
    return found
