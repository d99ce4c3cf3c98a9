"""Log-sums, float64 in every tensor: they are of the logits' size, and their rounding would be one of every weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common.launch import cdiv, on_device
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.tile import COUNTS, load_vector, store_vector

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = 256


@triton.jit
def log_sum(z, shift):
    """log Z from Z's sum of weights 2^(l − shift), in float64."""
    return (tl.log2(z).to(tl.float64) + shift) * LN2


@triton.jit
def shift_and_ratio(log_z, TYPE: tl.constexpr):
    """log2 Z as a shift of weights 2^(l − shift), and what P is over these weights: what the shift was rounded by."""
    exact = log_z * LOG2E
    shift = exact.to(TYPE)
    return shift, tl.exp2((shift - exact).to(TYPE))


@triton.jit(do_not_specialize=COUNTS)
def log_sum_shifts(log_sums, shifts, ratios, count, BLOCK_ROWS: tl.constexpr, SUM: tl.constexpr):
    """``shift_and_ratio`` of all log-sums."""
    i = tl.program_id(0) * BLOCK_ROWS
    shift, ratio = shift_and_ratio(load_vector(log_sums, i, count, BLOCK_ROWS), SUM)
    store_vector(shifts, shift, i, count, BLOCK_ROWS)
    store_vector(ratios, ratio, i, count, BLOCK_ROWS)


def shifts_and_ratios(log_sums: Tensor, rows: Tensor, sum_type) -> tuple[Tensor, Tensor]:
    """``shift_and_ratio`` of all log-sums, in the type of ``rows``, ``sum_type`` in Triton's words."""
    log_sums = log_sums.contiguous()
    shifts, ratios = (torch.empty_like(log_sums, dtype=rows.dtype) for _ in range(2))
    count = log_sums.numel()
    with on_device(rows):
        launch(log_sum_shifts, BLOCK_ROWS=BLOCK, SUM=sum_type)((cdiv(count, BLOCK),), log_sums, shifts, ratios, count)
    return shifts, ratios
