"""node_contrast of small batches: a program per block of rows and stage pair (forward) or stage (backward)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import small
from gkd_fast.kernels.common.launch import PRODUCTS, bits_of, on_device
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.log_sums import LN2, log_sum, shift_and_ratio
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.small import centred_product, load_of_pair, mean_row, store_weighted
from gkd_fast.kernels.common.tile import (
    COUNTS,
    NOWHERE,
    convert,
    load_tile,
    load_vector,
    number,
    pick,
    replace_missing,
    store_tile,
    store_vector,
)  # fmt: skip
from gkd_fast.kernels.node_contrast.tiles import nth_set_bit, set_bits_below


@triton.jit
def small_logits(
    rows, columns, i, j, count, dim, scale, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of the tile at (i, j); their weights are 0 in missing columns."""
    c = centred_product(rows, columns, i, j, count, dim, False, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                        PRECISION)  # fmt: skip
    return replace_missing(c * scale, j, count, NOWHERE, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=COUNTS)
def contrast_small_losses(
    students, teachers, losses, log_sums, weighted, dim, count, wanted, scale: tl.float64, S: tl.constexpr,
    T: tl.constexpr, KEEP: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ℓ, log Z and, with KEEP, W of one pair; ℓ is 0 where it is not wanted."""
    i = tl.program_id(0) * BLOCK_ROWS
    pair = tl.program_id(1)
    bits = number(wanted, tl.int64)
    scale = number(scale, SUM)
    row = i + tl.arange(0, BLOCK_ROWS)
    loss = tl.zeros([BLOCK_ROWS], SUM)
    if (bits >> pair) & 1:
        student, teacher = pick(students, pair // T), pick(teachers, pair % T)
        place = set_bits_below(bits, pair, S * T)
        logits = small_logits(student, teacher, i, 0, count, dim, scale, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE,
                              SUM, PRECISION)  # fmt: skip
        shift = tl.max(logits, 1)
        z = tl.sum(tl.exp2(logits - shift[:, None]), 1)
        own = tl.sum(tl.where(tl.arange(0, BLOCK_COLUMNS)[None, :] == row[:, None], logits, 0.0), 1)
        loss = (tl.log2(z) + (shift - own)) * LN2
        loss = tl.where(loss < 0, 0.0, loss)
        store_vector(log_sums + place * count, log_sum(z, shift), i, count, BLOCK_ROWS)
        if KEEP:
            out = weighted + place * count * dim
            for j in range(0, count, WEIGHT_COLUMNS):
                tile = small_logits(student, teacher, i, j, count, dim, scale, BLOCK_ROWS, WEIGHT_COLUMNS,
                                    BLOCK_WIDTH, TYPE, SUM, PRECISION)  # fmt: skip
                weights = tl.exp2(tile - shift[:, None]) / z[:, None]
                store_weighted(out, weights, teacher, i, j, count, dim, tl.minimum(j, 1), SCALED, BLOCK_ROWS,
                               WEIGHT_COLUMNS, BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
    tl.store(losses + row * (S * T) + pair, loss, mask=row < count)


@triton.jit
def add_difference(
    out, weighted, partner, g, i, count, dim, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """out_i += (g_i/τ)(W_i − partner_i), partners rounded as W has them: about their mean."""
    tl.debug_barrier()
    for k in range(0, dim, BLOCK_WIDTH):
        m = mean_row(partner, k, count, dim, BLOCK_WIDTH, SUM)[None, :]
        own = convert(load_tile(partner, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH) - m, TYPE).to(SUM) + m
        piece = g[:, None] * (load_tile(weighted, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH) - own)
        piece += load_tile(out, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH)
        store_tile(out, piece, i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH)


@triton.jit
def add_weighted_partners(
    out, matrix, partner, upstream, sums, g, is_student, i, count, dim, scale, unit, PAIRS: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i += Σ_j w_ij partner_j of one pair; upstream: from the pair's place on."""
    row = i + tl.arange(0, BLOCK_ROWS)
    row_shift, row_ratio = shift_and_ratio(load_vector(sums, i, count, BLOCK_ROWS), SUM)
    for j in range(0, count, BLOCK_COLUMNS):
        column = j + tl.arange(0, BLOCK_COLUMNS)
        column_g = load_of_pair(upstream, column, count, PAIRS) * unit
        column_shift, column_ratio = shift_and_ratio(load_vector(sums, j, count, BLOCK_COLUMNS), SUM)
        logits = small_logits(matrix, partner, i, j, count, dim, scale, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE,
                              SUM, PRECISION)  # fmt: skip
        shift = tl.where(is_student, row_shift[:, None], column_shift[None, :])
        factor = tl.where(is_student, (g * row_ratio)[:, None], (column_g * column_ratio)[None, :])
        weights = tl.exp2(logits - shift) * factor
        weights -= tl.where(column[None, :] == row[:, None], g[:, None], 0.0)
        store_weighted(out, weights, partner, i, j, count, dim, 1, SCALED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE,
                       PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def contrast_small_gradients(
    rows, gradients, upstream, log_sums, weighted, dim, count, wanted, needed, scale: tl.float64,
    inverse_temperature: tl.float64, S: tl.constexpr, T: tl.constexpr, KEPT: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a needed stage, Σ_j w_ij partner_j over its partners, w_ij = (g P_ij − [i = j] g_i)/τ.

    g and P are those of the row's loss for a student, those of the column's for a teacher. KEPT: Σ_j P_ij partner_j of
    students is there.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    stage = nth_set_bit(number(needed, tl.int64), tl.program_id(1), S + T).to(tl.int32)
    is_student = stage < S
    bits = number(wanted, tl.int64)
    scale, unit = number(scale, SUM), number(inverse_temperature, SUM)
    out = pick(gradients, tl.program_id(1))
    row = i + tl.arange(0, BLOCK_ROWS)
    for k in range(0, dim, BLOCK_WIDTH):
        store_tile(out, tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], SUM), i, k, count, dim, BLOCK_ROWS, BLOCK_WIDTH)
    for k in range(tl.where(is_student, T, S)):
        pair = tl.where(is_student, stage * T + k, k * T + stage - S)
        if (bits >> pair) & 1:
            partner = pick(rows, tl.where(is_student, S + k, k))
            place = set_bits_below(bits, pair, S * T) * count
            g = load_of_pair(upstream + pair, row, count, S * T) * unit
            if KEPT:
                if is_student:
                    add_difference(out, weighted + place * dim, partner, g, i, count, dim, BLOCK_ROWS, BLOCK_WIDTH,
                                   TYPE, SUM)  # fmt: skip
                else:
                    add_weighted_partners(
                        out, pick(rows, stage), partner, upstream + pair, log_sums + place, g, is_student, i, count,
                        dim, scale, unit, S * T, SCALED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM, PRECISION,
                    )  # fmt: skip
            else:
                add_weighted_partners(
                    out, pick(rows, stage), partner, upstream + pair, log_sums + place, g, is_student, i, count, dim,
                    scale, unit, S * T, SCALED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM, PRECISION,
                )  # fmt: skip


@planned
def _losses(S: int, T: int, keeps: bool, arch: str, name: str) -> Launch:
    product = PRODUCTS[name]
    constants = small.constants(arch, product, WEIGHT_COLUMNS=small.weight_columns(product))
    return launch(contrast_small_losses, S=S, T=T, KEEP=keeps, **constants)


def node_contrast(problem, losses: Tensor, log_sums: Tensor, weighted: Tensor):
    """Writes the results to the given memory, weighted sums where there is some for them."""
    count, S, T = problem.row_count, problem.S, problem.T
    with on_device(losses):
        _losses(S, T, weighted.numel() > 0, problem.arch, problem.product.name)(
            (small.row_blocks(count), S * T), tuple(problem.students), tuple(problem.teachers), losses, log_sums,
            weighted, problem.dim, count, problem.wanted, problem.scale,
        )  # fmt: skip


@planned
def _gradients(S: int, T: int, kept: bool, arch: str, name: str) -> Launch:
    constants = small.gradient_constants(arch, PRODUCTS[name])
    return launch(contrast_small_gradients, S=S, T=T, KEPT=kept, **constants)


def node_contrast_backward(problem, upstream, log_sums, weighted, needs: list[bool]) -> list[Tensor]:
    rows = [*problem.students, *problem.teachers]
    gradients = [torch.empty_like(x) for x, needed in zip(rows, needs, strict=True) if needed]
    if not gradients:
        return []
    with on_device(upstream):
        _gradients(problem.S, problem.T, weighted.numel() > 0, problem.arch, problem.product.name)(
            (small.row_blocks(problem.row_count), len(gradients)), tuple(rows), tuple(gradients), upstream, log_sums,
            weighted, problem.dim, problem.row_count, problem.wanted, bits_of(needs), problem.scale,
            1 / problem.temperature,
        )  # fmt: skip
    return gradients
