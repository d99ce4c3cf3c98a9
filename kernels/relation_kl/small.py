"""relation_kl of small batches: a program per block of rows and stage pair (forward) or stage (backward)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_fast.kernels.common import small
from gkd_fast.kernels.common.launch import PRODUCTS, bits_of, on_device
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.log_sums import LN2, log_sum, shift_and_ratio
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.small import load_of_pair, negative_distances, store_weighted
from gkd_fast.kernels.common.tile import COUNTS, NOWHERE, number, pick, replace_edges, store_vector
from gkd_fast.kernels.node_contrast.tiles import nth_set_bit
from gkd_fast.kernels.relation_kl.tiles import divergence, pair_loss


@triton.jit
def small_relations(
    rows, dims, stage, i, j, count, inner, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R of a stage's tile at (i, j)."""
    matrix = pick(rows, stage)
    c = negative_distances(matrix, i, j, count, pick(dims, stage), BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                           PRECISION)  # fmt: skip
    return replace_edges(tl.exp2(c * inner), i, j, 0, count, 0.0, NOWHERE, True, True, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def logits_and_sums(relations, outer):
    """l, Z and log Z with each row's own shift."""
    shift = tl.max(relations, 1) * outer
    logits = relations * outer - shift[:, None]
    z = tl.sum(tl.exp2(logits), 1)
    return logits, z, log_sum(z, shift)


@triton.jit(do_not_specialize=COUNTS)
def relation_small_losses(
    rows, dims, losses, student_log_sums, teacher_log_sums, count, inner: tl.float64, outer: tl.float64,
    S: tl.constexpr, T: tl.constexpr, SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The losses of one pair and, from the first pair of each stage, its log-sums; as in ``tiles``."""
    i = tl.program_id(0) * BLOCK_ROWS
    s, t = tl.program_id(1) // T, tl.program_id(1) % T
    inner, outer = number(inner, SUM), number(outer, SUM)
    student = small_relations(rows, dims, s, i, 0, count, inner, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                              PRECISION)  # fmt: skip
    student_logits, student_z, student_log_sum = logits_and_sums(student, outer)
    teacher = small_relations(rows, dims, S + t, i, 0, count, inner, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE, SUM,
                              PRECISION)  # fmt: skip
    logits, z, teacher_log_sum = logits_and_sums(teacher, outer)
    u, x = tl.exp2(logits), student_logits - logits
    q = -tl.sum(u * x, 1)
    if SUM == tl.float64:
        # Differences have digits enough, and tiles fewer registers.
        v = student_z - z
        d = v + q * LN2
    else:
        student_u = tl.exp2(student_logits)
        v = tl.sum(student_u - u, 1)
        d = tl.sum(divergence(x * LN2, u, student_u), 1)
    loss = pair_loss(q, student_z, z, v, d)
    row = i + tl.arange(0, BLOCK_ROWS)
    tl.store(losses + row * (S * T) + tl.program_id(1), loss, mask=row < count)
    if t == 0:
        store_vector(student_log_sums + s * count, student_log_sum, i, count, BLOCK_ROWS)
    if s == 0:
        store_vector(teacher_log_sums + t * count, teacher_log_sum, i, count, BLOCK_ROWS)


@triton.jit
def side(place, count, pair, sums, other_sums, upstream, losses, PAIRS: tl.constexpr, SUM: tl.constexpr):
    """Of rows or of columns: shifts of a stage and of its partner, with g times the ratios to P, and h."""
    log_z = load_of_pair(sums, place, count, 1)
    other_log_z = load_of_pair(other_sums, place, count, 1)
    g = load_of_pair(upstream + pair, place, count, PAIRS)
    h = load_of_pair(losses + pair, place, count, PAIRS) + (log_z - other_log_z).to(SUM)
    shift, ratio = shift_and_ratio(log_z, SUM)
    other_shift, other_ratio = shift_and_ratio(other_log_z, SUM)
    return shift, other_shift, g * ratio, g * other_ratio, h


@triton.jit
def pair_gradient(logits, other_logits, of_side, AXIS: tl.constexpr, is_student):
    """dL_ij of the rows' (AXIS 1) or dL_ji of the columns' losses (0), for a student and its teacher or the reverse."""
    p = tl.exp2(logits - tl.expand_dims(of_side[0], AXIS)) * tl.expand_dims(of_side[2], AXIS)
    other = tl.exp2(other_logits - tl.expand_dims(of_side[1], AXIS)) * tl.expand_dims(of_side[3], AXIS)
    of_teacher = p * ((logits - other_logits) * LN2 - tl.expand_dims(of_side[4], AXIS))
    return tl.where(is_student, p - other, of_teacher)


@triton.jit(do_not_specialize=COUNTS)
def relation_small_gradients(
    rows, dims, gradients, upstream, losses, student_log_sums, teacher_log_sums, count, wanted, inner: tl.float64,
    outer: tl.float64, slope: tl.float64, S: tl.constexpr, T: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dE_i = Σ_j M_ij e_j of a wanted stage, M_ij = R_ij (dL_ij + dL_ji)/(σ²τ), with all its partners.

    dL^s_ij = Σ_t g_ist (P^s_ij − P^t_ij), dL^t_ij = Σ_s g_ist P^t_ij (L^t_ij − L^s_ij − h_ist), and
    h_ist = ℓ_ist + log Z^t_i − log Z^s_i.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    stage = nth_set_bit(number(wanted, tl.int64), tl.program_id(1), S + T).to(tl.int32)
    is_student = stage < S
    inner, outer = number(inner, SUM), number(outer, SUM)
    matrix, dim, out = pick(rows, stage), pick(dims, stage), pick(gradients, tl.program_id(1))
    sums = tl.where(is_student, student_log_sums + stage * count, teacher_log_sums + (stage - S) * count)
    row = i + tl.arange(0, BLOCK_ROWS)
    for j in range(0, count, BLOCK_COLUMNS):
        relation = small_relations(rows, dims, stage, i, j, count, inner, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE,
                                   SUM, PRECISION)  # fmt: skip
        column = j + tl.arange(0, BLOCK_COLUMNS)
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
        for k in range(tl.where(is_student, T, S)):
            partner = tl.where(is_student, S + k, k)
            other = small_relations(rows, dims, partner, i, j, count, inner, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                                    TYPE, SUM, PRECISION)  # fmt: skip
            pair = tl.where(is_student, stage * T + k, k * T + stage - S)
            other_sums = tl.where(is_student, teacher_log_sums + k * count, student_log_sums + k * count)
            of_rows = side(row, count, pair, sums, other_sums, upstream, losses, S * T, SUM)
            of_columns = side(column, count, pair, sums, other_sums, upstream, losses, S * T, SUM)
            total += pair_gradient(relation * outer, other * outer, of_rows, 1, is_student)
            total += pair_gradient(relation * outer, other * outer, of_columns, 0, is_student)
        weights = relation * total * number(slope, SUM)
        store_weighted(out, weights, matrix, i, j, count, dim, tl.minimum(j, 1), SCALED, BLOCK_ROWS, BLOCK_COLUMNS,
                       BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip


@planned
def _losses(S: int, T: int, arch: str, product: str) -> Launch:
    return launch(relation_small_losses, S=S, T=T, **small.constants(arch, PRODUCTS[product]))


def relation_kl(problem, losses: Tensor, student_log_sums: Tensor, teacher_log_sums: Tensor):
    """Writes the results to the given memory."""
    S, T, count = problem.num_students, problem.num_teachers, problem.row_count
    with on_device(losses):
        _losses(S, T, problem.arch, problem.product.name)(
            (small.row_blocks(count), S * T), tuple(problem.rows), problem.dims, losses, student_log_sums,
            teacher_log_sums, count, problem.inner, problem.outer,
        )  # fmt: skip


@planned
def _gradients(S: int, T: int, arch: str, product: str) -> Launch:
    return launch(relation_small_gradients, S=S, T=T, **small.gradient_constants(arch, PRODUCTS[product]))


def relation_kl_backward(problem, upstream, losses, student_log_sums, teacher_log_sums, needs) -> list[Tensor]:
    gradients = [torch.empty_like(x) for x, needed in zip(problem.rows, needs, strict=True) if needed]
    if not gradients:
        return []
    with on_device(upstream):
        _gradients(problem.num_students, problem.num_teachers, problem.arch, problem.product.name)(
            (small.row_blocks(problem.row_count), len(gradients)), tuple(problem.rows), problem.dims, tuple(gradients),
            upstream, losses, student_log_sums, teacher_log_sums, problem.row_count, bits_of(needs), problem.inner,
            problem.outer, problem.slope,
        )  # fmt: skip
    return gradients
