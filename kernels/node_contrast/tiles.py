"""node_contrast's kernels. In base 2, w_ij = 2^(c_ij·scale − shift_i): Z_i = Σ_j w_ij, W_i = Σ_j w_ij t_j / Z_i.

Rows and columns are ``operands`` about their stages' means m and n, so that roundings are no larger than rows differ:

    c_ij = x̂_i·ŷ_j + p_i + q_j,   p = (x − m/2)·n,   q = (y − n/2)·m,

and where the sides change places, for the teachers' gradient, all is rounded as before. A row's own column, whose
weight cancels with 1 where a student is near its teacher, is no part of the walks: its weight is that of exact rows.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.log_sums import LN2, log_sum
from gkd_fast.kernels.common.operands import ROW_MULTIPLE
from gkd_fast.kernels.common.strips import store_strip, strip_stride
from gkd_fast.kernels.common.tile import (
    COUNTS,
    NOWHERE,
    column_range,
    divide_walk,
    edge_tile,
    gather,
    inner_products,
    inner_tile,
    load_block,
    load_numbers,
    load_rows,
    load_tile,
    load_vector,
    number,
    pick,
    replace_diagonal,
    replace_missing,
    store_rows,
    store_vector,
)  # fmt: skip

# Numbers of a pair's rows or columns are as many as operands have rows.
MULTIPLE = tl.constexpr(ROW_MULTIPLE)


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
def length_of(count):
    """Rows of an operand of ``count`` rows."""
    return tl.cdiv(count, MULTIPLE) * MULTIPLE


@triton.jit(do_not_specialize=COUNTS)
def cross_numbers(
    rows, centres, student_numbers, teacher_numbers, own_rows, own_similarities, dim, row_count, column_count, count,
    owned, wanted, S: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """p of the students and q of the teachers of every wanted pair, ``row_count`` and ``column_count`` of them, and x·y
    of the ``count`` rows and own columns of ``own_rows``, 0 unless ``owned``.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    pair, kind = tl.program_id(1) % (S * T), tl.program_id(1) // (S * T)
    student, teacher = pair // T, S + pair % T
    is_wanted = (number(wanted, tl.int64) >> pair) & 1 == 1
    total = tl.zeros([BLOCK_ROWS], SUM)
    if is_wanted & (kind == 2):
        for k in range(0, dim, WIDTH):
            x = load_tile(pick(own_rows, student), i, k, count * owned, dim, BLOCK_ROWS, WIDTH)
            total += tl.sum(x * load_tile(pick(own_rows, teacher), i, k, count * owned, dim, BLOCK_ROWS, WIDTH), 1)
        store_vector(own_similarities + number(pair, tl.int64) * count, total, i, count, BLOCK_ROWS)
    elif is_wanted:
        own, other = tl.where(kind == 1, teacher, student), tl.where(kind == 1, student, teacher)
        stage_count = tl.where(kind == 1, column_count, row_count)
        for k in range(0, dim, WIDTH):
            x = load_tile(pick(rows, own), i, k, stage_count, dim, BLOCK_ROWS, WIDTH)
            m = load_vector(pick(centres, own), k, dim, WIDTH)
            n = load_vector(pick(centres, other), k, dim, WIDTH)
            total += tl.sum((x - 0.5 * m[None, :]) * n[None, :], 1)
        out = pick((student_numbers, teacher_numbers), kind) + number(pair, tl.int64) * length_of(stage_count)
        store_vector(out, total, i, stage_count, BLOCK_ROWS)


@triton.jit
def others_similarities(
    rows, columns, i, j, column_count, offset, EDGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i·ŷ_j of the tile at (i, j), at an EDGE without own and missing columns, and ŷ_j."""
    values = load_block(columns, j, BLOCK_COLUMNS, WIDTH, PRECISION)
    c = inner_products(rows, values, PRECISION)
    if EDGE:
        c = without_own(c, i, j, column_count, offset, BLOCK_ROWS, BLOCK_COLUMNS)
    return c, values


@triton.jit
def without_own(c, i, j, column_count, offset, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The similarities of the tile at (i, j), those of own and missing columns so small that they weigh nothing."""
    c = replace_diagonal(c, i, j, offset, NOWHERE, BLOCK_ROWS, BLOCK_COLUMNS)
    return replace_missing(c, j, column_count, NOWHERE, BLOCK_COLUMNS)


@triton.jit
def add_weights(
    z, total, rows, teacher, numbers, level, i, j, column_count, offset, scale, EDGE: tl.constexpr,
    KEEP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Z and, with KEEP, W with those of the tile at (i, j) added."""
    c, columns = others_similarities(rows, teacher, i, j, column_count, offset, EDGE, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS,
                                     PRECISION)  # fmt: skip
    column_level = load_vector(numbers, j, column_count, BLOCK_COLUMNS) * scale
    weights = tl.exp2(c * scale + (column_level[None, :] - level[:, None]))
    z += tl.sum(weights, 1)
    if KEEP:
        total = gather(total, weights, columns, TYPE, PRECISION)
    return z, total


@triton.jit(do_not_specialize=COUNTS)
def contrast_sums(
    rows, columns, centres, partners, numbers, column_numbers, own_similarities, sums, weighted, shifts, losses,
    log_sums, dim, row_count, column_count, offset, owned, wanted, parts, scale: tl.float64, shift: tl.float64,
    S: tl.constexpr, T: tl.constexpr, KEEP: tl.constexpr, OWN_SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Z and, with KEEP, W of one wanted pair over the part's columns; complete, they become losses and log-sums.

    rows, columns: x̂ and ŷ; centres: n; numbers, column_numbers: p and q of every pair.
    partners: y as they are; row i's is its own column i + offset, if ``owned``, and ``own_similarities`` is x·y.
    """
    i = tl.program_id(0) * BLOCK_ROWS
    place = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    pair = nth_set_bit(number(wanted, tl.int64), place, S * T)
    teacher = pick(columns, pair % T)
    start, stop = column_range(column_count, part, parts, BLOCK_COLUMNS)
    scale = number(scale, SUM)
    if OWN_SHIFT:
        row_shift = load_vector(shifts + number(place, tl.int64) * row_count, i, row_count, BLOCK_ROWS)
    else:
        row_shift = tl.zeros([BLOCK_ROWS], SUM) + number(shift, SUM)
    of_pair = number(pair, tl.int64)
    numbers += of_pair * length_of(row_count)
    column_numbers += of_pair * length_of(column_count)
    own_similarity = load_vector(own_similarities + of_pair * row_count, i, row_count, BLOCK_ROWS)
    own_weight = tl.where((part == 0) & (owned != 0), tl.exp2(own_similarity * scale - row_shift), 0.0)
    pair_rows = (number(part, tl.int64) * (tl.num_programs(1) // parts) + place) * row_count
    z = own_weight
    total = z
    if KEEP:
        y = load_rows(pick(partners, pair % T), i, row_count * owned, dim, BLOCK_ROWS, WIDTH, SUM)
        total = own_weight[:, None] * (y - load_numbers(pick(centres, pair % T), 0, WIDTH)[None, :])
    mine = load_block(pick(rows, pair // T), i, BLOCK_ROWS, WIDTH, PRECISION)
    level = row_shift - load_vector(numbers, i, row_count, BLOCK_ROWS) * scale
    whole, first, crossed, ragged = divide_walk(start, stop, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
    for k in range(whole - crossed):
        j = inner_tile(k, start, first, crossed, BLOCK_COLUMNS)
        z, total = add_weights(z, total, mine, teacher, column_numbers, level, i, j, column_count, offset, scale, False,
                               KEEP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION)  # fmt: skip
    for k in tl.range(0, crossed + ragged, num_stages=1):
        j = edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS)
        z, total = add_weights(z, total, mine, teacher, column_numbers, level, i, j, column_count, offset, scale, True,
                               KEEP, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE, PRECISION)  # fmt: skip
    if parts == 1:
        store_contrast(z, row_shift, own_similarity * scale, losses + pair,
                       log_sums + number(place, tl.int64) * row_count, i, row_count, owned, S * T,
                       BLOCK_ROWS)  # fmt: skip
        if KEEP:
            total = total / z[:, None] + load_numbers(pick(centres, pair % T), 0, WIDTH)[None, :]
    else:
        store_vector(sums + pair_rows, z, i, row_count, BLOCK_ROWS)
    if KEEP:
        store_rows(weighted + pair_rows * dim, total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit
def store_contrast(
    z, row_shift, own_logit, loss, log_sums, i, row_count, owned, PAIRS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """log Z and ℓ = log Z − c_own/τ of a block of rows; ℓ not below 0 where the own columns are ``owned``."""
    row = i + tl.arange(0, BLOCK_ROWS)
    store_vector(log_sums, log_sum(z, row_shift), i, row_count, BLOCK_ROWS)
    # The shift and the own logit first, which nearly cancel where the own column has the largest logit.
    difference = (tl.log2(z) + (row_shift - own_logit)) * LN2
    difference = tl.where((owned != 0) & (difference < 0), 0.0, difference)
    tl.store(loss + row.to(tl.int64) * PAIRS, difference, mask=row < row_count)


@triton.jit(do_not_specialize=COUNTS)
def contrast_losses(
    centres, own_similarities, sums, weighted, out, shifts, losses, log_sums, dim, row_count, owned, wanted, parts,
    scale: tl.float64, shift: tl.float64, S: tl.constexpr, T: tl.constexpr, KEEP: tl.constexpr, OWN_SHIFT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, SUM: tl.constexpr,
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
    own_similarity = load_vector(own_similarities + number(pair, tl.int64) * row_count, i, row_count, BLOCK_ROWS)
    store_contrast(z, row_shift, own_similarity * number(scale, SUM), losses + pair, log_sums + pair_rows, i, row_count,
                   owned, S * T, BLOCK_ROWS)  # fmt: skip
    if KEEP:
        total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
        for part in range(parts):
            total += load_rows(weighted + (pair_rows + part * stride) * dim, i, row_count, dim, BLOCK_ROWS, WIDTH, SUM)
        total = total * (1 / z)[:, None] + load_numbers(pick(centres, pair % T), 0, WIDTH)[None, :]
        store_rows(out + pair_rows * dim, total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def contrast_differences(
    partners, weighted, upstream, gradients, dim, row_count, owned, wanted, needed, inverse_temperature: tl.float64,
    S: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, SUM: tl.constexpr,
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
            partner = load_rows(pick(partners, t), i, row_count * owned, dim, BLOCK_ROWS, WIDTH, SUM)
            difference = load_rows(mean, i, row_count, dim, BLOCK_ROWS, WIDTH, SUM) - partner
            total += (g * number(inverse_temperature, SUM))[:, None] * difference
    store_rows(pick(gradients, tl.program_id(1)), total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit
def add_pair(
    total, sums, rows, level, g, columns, numbers, upstream, shifts, ratios, i, j, column_count, offset, scale, unit,
    EDGE: tl.constexpr, PAIRS: tl.constexpr, BY_COLUMN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij ŷ_j and Σ_j w_ij, w = g P/τ, with those of the tile at (i, j) added; upstream, shifts and ratios: from
    the pair's place on.
    """
    c, values = others_similarities(rows, columns, i, j, column_count, offset, EDGE, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS,
                                    PRECISION)  # fmt: skip
    column_level = load_vector(numbers, j, column_count, BLOCK_COLUMNS) * scale
    if BY_COLUMN:
        column = j + tl.arange(0, BLOCK_COLUMNS)
        column_g = tl.load(upstream + column.to(tl.int64) * PAIRS, mask=column < column_count, other=0) * unit
        column_g *= load_vector(ratios, j, column_count, BLOCK_COLUMNS)
        column_level -= load_vector(shifts, j, column_count, BLOCK_COLUMNS)
        weights = tl.exp2(c * scale + (column_level[None, :] - level[:, None])) * column_g[None, :]
    else:
        weights = tl.exp2(c * scale + (column_level[None, :] - level[:, None])) * g[:, None]
    sums += tl.sum(weights, 1)
    return gather(total, weights, values, TYPE, PRECISION), sums


@triton.jit(do_not_specialize=COUNTS)
def contrast_gradients(
    rows, columns, centres, partners, numbers, column_numbers, own_similarities, upstream, shifts, ratios, own_upstream,
    own_shifts, own_ratios, gradients, power, dim, row_count, column_count, offset, owned, wanted, needed, parts,
    stride, partner_stride, scale: tl.float64, inverse_temperature: tl.float64, STAGES: tl.constexpr,
    PARTNERS: tl.constexpr, BY_COLUMN: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one stage: Σ over its partners of (1/τ)(Σ_j g P columns_j − g_own own_i).

    g and P = ratio · 2^(c·scale − shift), ``log_sums.shift_and_ratio``, are those of the row (students) or BY_COLUMN
    those of the column (teachers); of the own column i + offset, if ``owned``, they are those of the row's losses, and
    P is 0 where there are no columns.
    Pair (stage, partner) is bit stage·stride + partner·partner_stride of ``wanted`` and that place in the upstream
    [count, pairs]; ``needed`` says which stages have a gradient; the other arguments are as in ``contrast_sums``.
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
    mine = load_block(pick(rows, stage), i, BLOCK_ROWS, WIDTH, PRECISION)
    total = tl.zeros([BLOCK_ROWS, WIDTH], SUM)
    for n in range(PARTNERS):
        pair = stage * stride + n * partner_stride
        is_wanted = (bits >> pair) & 1
        place = set_bits_below(bits, pair, STAGES * PARTNERS)
        of_pair = number(pair, tl.int64)
        along = load_vector(numbers + of_pair * length_of(row_count), i, row_count, BLOCK_ROWS)
        of_columns = column_numbers + of_pair * length_of(column_count)
        g, level, count = along, -along * scale, column_count
        if not BY_COLUMN:
            g = tl.load(upstream + row.to(tl.int64) * (STAGES * PARTNERS) + pair, mask=row < row_count, other=0) * unit
            g *= load_vector(ratios + place * row_count, i, row_count, BLOCK_ROWS)
            level += load_vector(shifts + place * row_count, i, row_count, BLOCK_ROWS)
            count = row_count
        sums = tl.zeros([BLOCK_ROWS], SUM)
        end = tl.where(is_wanted == 1, stop, start)
        whole, first, crossed, ragged = divide_walk(start, end, i + offset, BLOCK_ROWS, BLOCK_COLUMNS)
        for k in range(whole - crossed):
            total, sums = add_pair(
                total, sums, mine, level, g, pick(columns, n), of_columns, upstream + pair, shifts + place * count,
                ratios + place * count, i, inner_tile(k, start, first, crossed, BLOCK_COLUMNS), column_count,
                offset, scale, unit, False, STAGES * PARTNERS, BY_COLUMN, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                PRECISION,
            )  # fmt: skip
        for k in tl.range(0, crossed + ragged, num_stages=1):
            total, sums = add_pair(
                total, sums, mine, level, g, pick(columns, n), of_columns, upstream + pair, shifts + place * count,
                ratios + place * count, i, edge_tile(k, start, whole, first, crossed, BLOCK_COLUMNS), column_count,
                offset, scale, unit, True, STAGES * PARTNERS, BY_COLUMN, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, TYPE,
                PRECISION,
            )  # fmt: skip
        total += sums[:, None] * load_numbers(pick(centres, n), 0, WIDTH)[None, :]
    if SCALED:
        total = total * (1.0 / tl.load(power))
    if part == 0:
        for n in range(PARTNERS):
            pair = stage * stride + n * partner_stride
            place = set_bits_below(bits, pair, STAGES * PARTNERS)
            inside = (row < row_count) & (((bits >> pair) & 1) == 1)
            g = tl.load(own_upstream + row.to(tl.int64) * (STAGES * PARTNERS) + pair, mask=inside, other=0)
            c = tl.load(own_similarities + number(pair, tl.int64) * row_count + row, mask=inside, other=0)
            own = load_rows(pick(partners, n), i, row_count * owned, dim, BLOCK_ROWS, WIDTH, SUM)
            shift = tl.load(own_shifts + place * row_count + row, mask=inside, other=0)
            ratio = tl.load(own_ratios + place * row_count + row, mask=inside & (column_count > 0), other=0)
            weight = ratio * tl.exp2(c * scale - shift)
            total += (g * number(inverse_temperature, SUM) * (weight - 1))[:, None] * own
    out = pick(gradients, tl.program_id(1) // parts) + number(part, tl.int64) * row_count * dim
    store_rows(out, total, i, row_count, dim, BLOCK_ROWS, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def contrast_strip(
    similarities, weights, sums, column_sums, levels, column_levels, factors, row_count, column_count, offset,
    accumulate, scale: tl.float64, KEEP: tl.constexpr, FACTORS: tl.constexpr, COLUMN_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Wide rows: weights w_ij = f·2^(c_ij·scale + level_i + level_j) from a strip of x̂·ŷ, 0 of own and missing
    columns; their sums over each part's columns [parts, row_count] and, with COLUMN_SUMS, over each block's rows
    [blocks, column_count].

    FACTORS: f is 1 (0), the row's (1) or the column's (2).
    """
    i = tl.program_id(0) * BLOCK_ROWS
    start, stop = column_range(column_count, tl.program_id(1), tl.num_programs(1), BLOCK_COLUMNS)
    scale = number(scale, SUM)
    level = load_vector(levels, i, row_count, BLOCK_ROWS)
    sums += number(tl.program_id(1), tl.int64) * row_count
    total = load_vector(sums, i, row_count * accumulate, BLOCK_ROWS)
    for j in range(start, stop, BLOCK_COLUMNS):
        c = load_tile(similarities, i, j, row_count, strip_stride(column_count), BLOCK_ROWS, BLOCK_COLUMNS)
        c = without_own(c, i, j, column_count, offset, BLOCK_ROWS, BLOCK_COLUMNS)
        column_level = load_vector(column_levels, j, column_count, BLOCK_COLUMNS)
        w = tl.exp2(c * scale + (column_level[None, :] + level[:, None]))
        if FACTORS == 1:
            w = w * load_vector(factors, i, row_count, BLOCK_ROWS)[:, None]
        elif FACTORS == 2:
            w = w * load_vector(factors, j, column_count, BLOCK_COLUMNS)[None, :]
        total += tl.sum(w, 1)
        if COLUMN_SUMS:
            of_block = column_sums + number(tl.program_id(0), tl.int64) * column_count
            store_vector(of_block, tl.sum(w, 0), j, column_count, BLOCK_COLUMNS)
        if KEEP:
            store_strip(weights, w, i, j, row_count, column_count, BLOCK_ROWS, BLOCK_COLUMNS, TYPE)
    store_vector(sums, total, i, row_count, BLOCK_ROWS)
