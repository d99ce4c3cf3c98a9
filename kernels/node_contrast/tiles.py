"""node_contrast's kernels. In base 2, w_ij = 2^(c_ij·scale − shift_i): Z_i = Σ_j w_ij, W_i = Σ_j w_ij t_j / Z_i."""

import triton
import triton.language as tl

from gkd_fast.kernels.common.log_sums import LN2, log_sum
from gkd_fast.kernels.common.tile import (
    COUNTS,
    add_product,
    column_range,
    convert,
    load_columns,
    load_rows,
    load_tile,
    load_vector,
    number,
    pick,
    product,
    replace_missing,
    store_rows,
    store_tile,
    store_vector,
)  # fmt: skip


@triton.jit
def nth_set_bit(bits, n, COUNT: tl.constexpr):
    """The place of set bit number ``n`` of ``bits``."""
    place = bits * 0
    seen = bits * 0
    for k in tl.static_range(COUNT):
        is_set = (bits >> k) & 1
        place = tl.where((is_set == 1) & (seen == n), k, place)
        seen += is_set
    return place


@triton.jit
def set_bits_below(bits, place, COUNT: tl.constexpr):
    seen = bits * 0
    for k in tl.static_range(COUNT):
        seen += tl.where(k < place, (bits >> k) & 1, 0)
    return seen


@triton.jit
def add_weights(
    z, total, rows, teacher, weighted, row_shift, i, j, row_count, column_count, dim, scale, EDGE: tl.constexpr,
    KEEP: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z and, with KEEP, W with those of the tile at (i, j) added; columns are missing only from one at an EDGE."""
    if STRIP:
        c = load_tile(teacher, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        columns = load_columns(teacher, j, column_count, dim, BLOCK_COLUMNS, WIDTH, TYPE, ALIGNED)
        c = product(rows, tl.trans(columns), PRECISION)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    weights = tl.exp2(c * scale - row_shift[:, None])
    if EDGE:
        weights = replace_missing(weights, j, column_count, 0.0, BLOCK_COLUMNS)
    z += tl.sum(weights, 1)
    if KEEP and STRIP:
        store_tile(weighted, convert(weights, TYPE), i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS)
    elif KEEP:
        total = add_product(convert(weights, TYPE), columns, total, PRECISION)
    return z, total


@triton.jit(do_not_specialize=COUNTS)
def contrast_sums(
    students, teachers, own, sums, weighted, shifts, losses, log_sums, dim, row_count, column_count, wanted,
    parts, accumulate, is_last, scale: tl.float64, shift: tl.float64, S: tl.constexpr, T: tl.constexpr,
    KEEP: tl.constexpr, OWN_SHIFT: tl.constexpr, STRIP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Z and, with KEEP, W of one wanted pair over the part's columns; complete, they become losses and log-sums.

    ``own``: the rows' own partners, per teacher. With STRIP the teachers are strips of similarities
    [row_count, column_count], ``own`` the partners' similarities and W a strip of weights.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    place = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    pair = nth_set_bit(number(wanted, tl.int64), place, S * T)
    student, teacher = pick(students, pair // T), pick(teachers, pair % T)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    scale = number(scale, SUM)
    # Before the walk, when registers are free.
    if STRIP:
        own_similarity = load_vector(pick(own, pair % T), i, row_count, BLOCK_ROWS)
        rows = own_similarity
    else:
        rows = load_rows(student, i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE)
        partner = load_rows(pick(own, pair % T), i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE).to(SUM)
        own_similarity = tl.sum(rows.to(SUM) * partner, 1)
    pair_rows = (number(part, tl.int64) * (tl.num_programs(1) // parts) + place) * row_count
    if OWN_SHIFT:
        row_shift = load_vector(shifts + number(place, tl.int64) * row_count, i, row_count, BLOCK_ROWS)
    else:
        row_shift = tl.zeros([BLOCK_ROWS], SUM) + number(shift, SUM)
    z = load_vector(sums + pair_rows, i, row_count * accumulate, BLOCK_ROWS)
    total = z
    if KEEP and not STRIP:
        total = load_rows(weighted + pair_rows * dim, i, row_count * accumulate, dim, BLOCK_ROWS, WIDTH, SUM)
    ragged = tl.maximum(start, stop - (stop - start) % BLOCK_COLUMNS)
    for j in range(start, ragged, BLOCK_COLUMNS):
        z, total = add_weights(z, total, rows, teacher, weighted, row_shift, i, j, row_count, column_count, dim, scale,
                               False, KEEP, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                               PRECISION)  # fmt: skip
    for j in tl.range(ragged, stop, BLOCK_COLUMNS, num_stages=1):
        z, total = add_weights(z, total, rows, teacher, weighted, row_shift, i, j, row_count, column_count, dim, scale,
                               True, KEEP, STRIP, ALIGNED, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                               PRECISION)  # fmt: skip
    if (is_last != 0) & (parts == 1):
        store_contrast(z, row_shift, own_similarity * scale, losses + pair,
                       log_sums + number(place, tl.int64) * row_count, i, row_count, S * T, BLOCK_ROWS)  # fmt: skip
        if KEEP and not STRIP:
            total = total / z[:, None]
    else:
        store_vector(sums + pair_rows, z, i, row_count, BLOCK_ROWS)
    if KEEP and not STRIP:
        store_rows(weighted + pair_rows * dim, total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit
def store_contrast(
    z, row_shift, own_logit, loss, log_sums, i, row_count, PAIRS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """log Z and ℓ = log Z − c_own/τ of a block of rows, ℓ not below 0."""
    row = i + tl.arange(0, BLOCK_ROWS)
    store_vector(log_sums, log_sum(z, row_shift), i, row_count, BLOCK_ROWS)
    # The shift and the own logit first, which nearly cancel where the own column has the largest logit.
    difference = (tl.log2(z) + (row_shift - own_logit)) * LN2
    difference = tl.where(difference < 0, 0.0, difference)
    tl.store(loss + row.to(tl.int64) * PAIRS, difference, mask=row < row_count)


@triton.jit(do_not_specialize=COUNTS)
def contrast_losses(
    students, own, sums, weighted, out, shifts, losses, log_sums, dim, row_count, wanted, parts,
    scale: tl.float64, shift: tl.float64, S: tl.constexpr, T: tl.constexpr, KEEP: tl.constexpr, OWN_SHIFT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The results from the sums of several parts, added in the order of the parts."""
    i = tl.program_id(0) * BLOCK_ROWS
    place = tl.program_id(1)
    pair = nth_set_bit(number(wanted, tl.int64), place, S * T)
    pair_rows = number(place, tl.int64) * row_count
    stride = number(tl.num_programs(1), tl.int64) * row_count
    if OWN_SHIFT:
        row_shift = load_vector(shifts + pair_rows, i, row_count, BLOCK_ROWS)
    else:
        row_shift = tl.zeros([BLOCK_ROWS], SUM) + number(shift, SUM)
    z = tl.zeros([BLOCK_ROWS], SUM)
    for part in range(parts):
        z += load_vector(sums + pair_rows + part * stride, i, row_count, BLOCK_ROWS)
    rows = load_rows(pick(students, pair // T), i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE).to(SUM)
    partner = load_rows(pick(own, pair % T), i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE).to(SUM)
    store_contrast(z, row_shift, tl.sum(rows * partner, 1) * number(scale, SUM), losses + pair, log_sums + pair_rows, i,
                   row_count, S * T, BLOCK_ROWS)  # fmt: skip
    if KEEP:
        total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
        for part in range(parts):
            total += load_rows(weighted + (pair_rows + part * stride) * dim, i, row_count, dim, BLOCK_ROWS, WIDTH, SUM)
        store_rows(out + pair_rows * dim, total / z[:, None], i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def contrast_differences(
    own, weighted, upstream, gradients, dim, row_count, wanted, needed, inverse_temperature: tl.float64,
    S: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, TYPE: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """dS_i = Σ_t (g_it/τ)(W_i − t_own) from the kept W."""
    i = tl.program_id(0) * BLOCK_ROWS
    s = nth_set_bit(number(needed, tl.int64), tl.program_id(1), S)
    bits = number(wanted, tl.int64)
    row = i + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
    for t in range(T):
        if (bits >> (s * T + t)) & 1:
            mean = weighted + set_bits_below(bits, s * T + t, S * T) * row_count * dim
            g = tl.load(upstream + row.to(tl.int64) * (S * T) + s * T + t, mask=row < row_count, other=0)
            partner = load_rows(pick(own, t), i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE).to(SUM)
            difference = load_rows(mean, i, row_count, dim, BLOCK_ROWS, WIDTH, SUM) - partner
            total += (g * number(inverse_temperature, SUM))[:, None] * difference
    store_rows(pick(gradients, tl.program_id(1)), total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def contrast_gradients(
    rows, columns, own, upstream, own_upstream, shifts, ratios, gradients, power, dim, row_count, column_count,
    wanted, needed, parts, accumulate, stride, partner_stride, scale: tl.float64, inverse_temperature: tl.float64,
    STAGES: tl.constexpr, PARTNERS: tl.constexpr, BY_COLUMN: tl.constexpr, SCALED: tl.constexpr, STRIP: tl.constexpr,
    ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one stage: Σ over its partners of (1/τ)(Σ_j g P columns_j − g_own own_i).

    g and P = ratio · 2^(c·scale − shift), ``log_sums.shift_and_ratio``, are those of the row (students) or BY_COLUMN
    those of the column (teachers).
    Pair (stage, partner) is bit stage·stride + partner·partner_stride of ``wanted`` and that place in the upstream
    [count, pairs]; ``needed`` says which stages have a gradient; ``own`` holds each row's own partners. With STRIP the
    columns are strips of similarities, of one pair, and the gradient a strip of the weights g P/τ.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1) % parts
    stage = nth_set_bit(number(needed, tl.int64), tl.program_id(1) // parts, STAGES)
    bits = number(wanted, tl.int64)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    scale = number(scale, SUM)
    unit = number(inverse_temperature, SUM)
    if SCALED:
        unit = unit * tl.load(power)
    row = i + tl.arange(0, BLOCK_ROWS)
    if not STRIP:
        mine = load_rows(pick(rows, stage), i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE)
        total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
    for k in range(PARTNERS):
        pair = stage * stride + k * partner_stride
        is_wanted = (bits >> pair) & 1
        place = set_bits_below(bits, pair, STAGES * PARTNERS)
        matrix = pick(columns, k)
        if not BY_COLUMN:
            g = tl.load(upstream + row.to(tl.int64) * (STAGES * PARTNERS) + pair, mask=row < row_count, other=0) * unit
            g *= load_vector(ratios + place * row_count, i, row_count, BLOCK_ROWS)
            shift = load_vector(shifts + place * row_count, i, row_count, BLOCK_ROWS)
        for j in range(start, tl.where(is_wanted == 1, stop, start), BLOCK_COLUMNS):
            if STRIP:
                logits = load_tile(matrix, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS) * scale
            else:
                other = load_columns(matrix, j, column_count, dim, BLOCK_COLUMNS, WIDTH, TYPE, ALIGNED)
                logits = product(mine, tl.trans(other), PRECISION) * scale
            if BY_COLUMN:
                column = j + tl.arange(0, BLOCK_COLUMNS)
                inside = column < column_count
                g = tl.load(upstream + column.to(tl.int64) * (STAGES * PARTNERS) + pair, mask=inside, other=0) * unit
                g *= load_vector(ratios + place * column_count, j, column_count, BLOCK_COLUMNS)
                shift = load_vector(shifts + place * column_count, j, column_count, BLOCK_COLUMNS)
                weights = tl.exp2(logits - shift[None, :]) * g[None, :]
            else:
                # log2 P ≤ 0; a column that does not exist could give inf, and its zero row NaN.
                exponent = logits - shift[:, None]
                weights = tl.exp2(tl.where(exponent > 1.0, 1.0, exponent)) * g[:, None]
            if STRIP:
                store_tile(
                    gradients[0], convert(weights, TYPE), i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS
                )
            else:
                total = add_product(convert(weights, TYPE), other, total, PRECISION)
    if not STRIP:
        if SCALED:
            total = total * (1.0 / tl.load(power))
        if part == 0 and accumulate == 0:
            for k in range(PARTNERS):
                pair = stage * stride + k * partner_stride
                inside = (row < row_count) & (((bits >> pair) & 1) == 1)
                g = tl.load(own_upstream + row.to(tl.int64) * (STAGES * PARTNERS) + pair, mask=inside, other=0)
                partner = load_rows(pick(own, k), i, row_count, dim, BLOCK_ROWS, WIDTH, TYPE).to(SUM)
                total -= (g * number(inverse_temperature, SUM))[:, None] * partner
        out = pick(gradients, tl.program_id(1) // parts) + number(part, tl.int64) * row_count * dim
        before = load_rows(out, i, row_count * accumulate, dim, BLOCK_ROWS, WIDTH, SUM)
        store_rows(out, before + total, i, row_count, dim, BLOCK_ROWS, WIDTH)
