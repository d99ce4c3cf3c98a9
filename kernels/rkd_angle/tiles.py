"""rkd_angle's kernels. With G = rows·rowsᵀ and r_ij = 1/‖x_i − x_j‖, 0 where x_i and x_j are alike, the cosine of the
angle at i between j and k is

    cos_ijk = (G_jk − G_ij − G_ik + G_ii) r_ij r_ik.

A program makes a tile (a, b) of G and walks some nodes k, whose rows of G are in a strip: what it needs of k are
vectors over a and over b, so that no sum goes across a tile before the end. Forward, the angles at a: Σ_bk ρ(z),
z = cos^s − cos^t. Backward, with E = g ρ'(z) of the node that the angle is at (for the teachers −E), of all three
angles of the triangle:

    W_ab = Σ_k r_ab² (E_abk cos_abk + E_bak cos_bak) − r_ab (E_abk r_ak + E_bak r_bk) + E_kab r_ka r_kb,

and dX_a = 2 Σ_b W_ab (x_b − x_a).

The third dimension of the grid is the graph: everything is [graphs, …, row_length, …], and the first graph_counts[g]
rows of graph g count; of the others all sums and weights are 0.
"""

import triton
import triton.language as tl

from gkd_fast.kernels.common.tile import (
    COUNTS,
    add_tile_product,
    count_of_graph,
    load_vector,
    number,
    of_graph,
    place_of,
    store_tile,
    store_vector,
)

GRAPHS = tl.constexpr(True)


@triton.jit(do_not_specialize=COUNTS)
def angle_products(
    rows, products, dim, first_node, node_count, row_length, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A strip of G, of the ``node_count`` nodes from ``first_node``."""
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    rows = of_graph(rows, row_length, dim, GRAPHS)
    c = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    c = add_tile_product(rows, rows, first_node + i, j, row_length, row_length, dim, c, BLOCK_ROWS, BLOCK_COLUMNS,
                         BLOCK_WIDTH, TYPE, PRECISION)  # fmt: skip
    products = of_graph(products, node_count, row_length, GRAPHS)
    store_tile(products, c, i, j, node_count, row_length, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def inverse_distances(product, squares, is_apart):
    """r of pairs of rows that are apart, where more than roundings is left of the difference."""
    square = squares - 2 * product
    if square.dtype == tl.float64:
        rounding = squares * 4e-15
    else:
        rounding = squares * 2e-6
    known = is_apart & (square > rounding) & (square > 1e-24)
    # A NaN stays one.
    known = known | (square != square)
    return tl.where(known, 1 / tl.sqrt(tl.where(known, square, 1.0)), 0.0)


@triton.jit
def side_tile(
    rows, norms, dim, i, j, count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G_ab and r_ab of the tile at (i, j), and the squared norms over a and over b."""
    c = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    c = add_tile_product(rows, rows, i, j, count, count, dim, c, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, TYPE,
                         PRECISION)  # fmt: skip
    a, b = i + tl.arange(0, BLOCK_ROWS), j + tl.arange(0, BLOCK_COLUMNS)
    n_a = load_vector(norms, i, count, BLOCK_ROWS)
    n_b = load_vector(norms, j, count, BLOCK_COLUMNS)
    is_apart = (a[:, None] != b[None, :]) & (a[:, None] < count) & (b[None, :] < count)
    return c, inverse_distances(c, n_a[:, None] + n_b[None, :], is_apart), n_a, n_b


@triton.jit
def of_node(strip, n_k, norms, node, k, start, count, row_length, BLOCK: tl.constexpr):
    """G_kx and r_kx of row k of the strip, which is that of ``node``, at a block of x."""
    g = load_vector(strip + k * number(row_length, tl.int64), start, count, BLOCK)
    x = start + tl.arange(0, BLOCK)
    return g, inverse_distances(g, norms + n_k, (x != node) & (x < count))


@triton.jit
def nodes_of_tile(first_node, node_count, i, j, count):
    """How many nodes of the strip a tile at (i, j) walks: those that count, none where the tile's rows do not."""
    return tl.where((i < count) & (j < count), tl.minimum(node_count, count - first_node), 0)


@triton.jit
def huber_slope(z):
    """ρ' of Huber's function ρ(z) = ρ'(z − ρ'/2); a NaN stays one."""
    return tl.where(z > 1, 1.0, tl.where(z < -1, -1.0, z))


@triton.jit(do_not_specialize=COUNTS)
def angle_sums(
    students, teachers, student_norms, teacher_norms, student_strip, teacher_strip, totals, graph_counts, student_dim,
    teacher_dim, first_node, node_count, row_length, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """totals[b block, g, a] = Σ_bk ρ(z_abk), k over the ``node_count`` nodes of the strip, from ``first_node``."""
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    count = count_of_graph(graph_counts, row_length, GRAPHS)
    students = of_graph(students, row_length, student_dim, GRAPHS)
    teachers = of_graph(teachers, row_length, teacher_dim, GRAPHS)
    student_norms = of_graph(student_norms, row_length, 1, GRAPHS)
    teacher_norms = of_graph(teacher_norms, row_length, 1, GRAPHS)
    student_strip = of_graph(student_strip, node_count, row_length, GRAPHS)
    teacher_strip = of_graph(teacher_strip, node_count, row_length, GRAPHS)
    s, r_s, s_a, s_b = side_tile(students, student_norms, student_dim, i, j, count, BLOCK_ROWS, BLOCK_COLUMNS,
                                 BLOCK_WIDTH, TYPE, SUM, PRECISION)  # fmt: skip
    t, r_t, t_a, t_b = side_tile(teachers, teacher_norms, teacher_dim, i, j, count, BLOCK_ROWS, BLOCK_COLUMNS,
                                 BLOCK_WIDTH, TYPE, SUM, PRECISION)  # fmt: skip
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    for k in range(0, nodes_of_tile(first_node, node_count, i, j, count)):
        node = first_node + k
        n_s, n_t = tl.load(student_norms + node), tl.load(teacher_norms + node)
        g_s, r_as = of_node(student_strip, n_s, s_a, node, k, i, count, row_length, BLOCK_ROWS)
        g_t, r_at = of_node(teacher_strip, n_t, t_a, node, k, i, count, row_length, BLOCK_ROWS)
        k_s = load_vector(student_strip + k * number(row_length, tl.int64), j, count, BLOCK_COLUMNS)
        k_t = load_vector(teacher_strip + k * number(row_length, tl.int64), j, count, BLOCK_COLUMNS)
        cos_s = (k_s[None, :] - s + (s_a - g_s)[:, None]) * r_as[:, None]
        cos_t = (k_t[None, :] - t + (t_a - g_t)[:, None]) * r_at[:, None]
        z = cos_s * r_s - cos_t * r_t
        rho = huber_slope(z)
        total += rho * (z - 0.5 * rho)
    place = place_of(tl.program_id(0), row_length, GRAPHS)
    store_vector(totals + place, tl.sum(total, 1), i, row_length, BLOCK_ROWS)


@triton.jit(do_not_specialize=COUNTS)
def angle_weights(
    students, teachers, student_norms, teacher_norms, student_strip, teacher_strip, upstream, student_weights,
    teacher_weights, graph_counts, student_dim, teacher_dim, first_node, node_count, first_row, row_count, row_length,
    WANTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strips of W of the sides whose bit of WANTED is set; rows a from ``first_row``, k the nodes of the strip."""
    j = tl.program_id(0) * BLOCK_COLUMNS
    i = tl.program_id(1) * BLOCK_ROWS
    a = first_row + i
    count = count_of_graph(graph_counts, row_length, GRAPHS)
    students = of_graph(students, row_length, student_dim, GRAPHS)
    teachers = of_graph(teachers, row_length, teacher_dim, GRAPHS)
    student_norms = of_graph(student_norms, row_length, 1, GRAPHS)
    teacher_norms = of_graph(teacher_norms, row_length, 1, GRAPHS)
    student_strip = of_graph(student_strip, node_count, row_length, GRAPHS)
    teacher_strip = of_graph(teacher_strip, node_count, row_length, GRAPHS)
    upstream = of_graph(upstream, row_length, 1, GRAPHS)
    s, r_s, s_a, s_b = side_tile(students, student_norms, student_dim, a, j, count, BLOCK_ROWS, BLOCK_COLUMNS,
                                 BLOCK_WIDTH, TYPE, SUM, PRECISION)  # fmt: skip
    t, r_t, t_a, t_b = side_tile(teachers, teacher_norms, teacher_dim, a, j, count, BLOCK_ROWS, BLOCK_COLUMNS,
                                 BLOCK_WIDTH, TYPE, SUM, PRECISION)  # fmt: skip
    u_a = load_vector(upstream, a, count, BLOCK_ROWS)[:, None]
    u_b = load_vector(upstream, j, count, BLOCK_COLUMNS)[None, :]
    by_s = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    by_t = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    for k in range(0, nodes_of_tile(first_node, node_count, a, j, count)):
        node = first_node + k
        n_s, n_t = tl.load(student_norms + node), tl.load(teacher_norms + node)
        a_s, r_as = of_node(student_strip, n_s, s_a, node, k, a, count, row_length, BLOCK_ROWS)
        a_t, r_at = of_node(teacher_strip, n_t, t_a, node, k, a, count, row_length, BLOCK_ROWS)
        b_s, r_bs = of_node(student_strip, n_s, s_b, node, k, j, count, row_length, BLOCK_COLUMNS)
        b_t, r_bt = of_node(teacher_strip, n_t, t_b, node, k, j, count, row_length, BLOCK_COLUMNS)
        g = tl.load(upstream + node)
        # At a: between b and k.
        cos_s = (b_s[None, :] - s + (s_a - a_s)[:, None]) * r_as[:, None] * r_s
        cos_t = (b_t[None, :] - t + (t_a - a_t)[:, None]) * r_at[:, None] * r_t
        e = huber_slope(cos_s - cos_t) * u_a
        if WANTED & 1:
            by_s += e * r_s * (r_s * cos_s - r_as[:, None])
        if WANTED & 2:
            by_t -= e * r_t * (r_t * cos_t - r_at[:, None])
        # At b: between a and k.
        cos_s = (a_s[:, None] - s + (s_b - b_s)[None, :]) * r_bs[None, :] * r_s
        cos_t = (a_t[:, None] - t + (t_b - b_t)[None, :]) * r_bt[None, :] * r_t
        e = huber_slope(cos_s - cos_t) * u_b
        if WANTED & 1:
            by_s += e * r_s * (r_s * cos_s - r_bs[None, :])
        if WANTED & 2:
            by_t -= e * r_t * (r_t * cos_t - r_bt[None, :])
        # At k: between a and b.
        both_s, both_t = r_as[:, None] * r_bs[None, :], r_at[:, None] * r_bt[None, :]
        cos_s = (s - a_s[:, None] - b_s[None, :] + n_s) * both_s
        cos_t = (t - a_t[:, None] - b_t[None, :] + n_t) * both_t
        e = huber_slope(cos_s - cos_t) * g
        if WANTED & 1:
            by_s += e * both_s
        if WANTED & 2:
            by_t -= e * both_t
    if WANTED & 1:
        student_weights = of_graph(student_weights, row_count, row_length, GRAPHS)
        store_tile(student_weights, by_s, i, j, row_count, row_length, BLOCK_ROWS, BLOCK_COLUMNS)
    if WANTED & 2:
        teacher_weights = of_graph(teacher_weights, row_count, row_length, GRAPHS)
        store_tile(teacher_weights, by_t, i, j, row_count, row_length, BLOCK_ROWS, BLOCK_COLUMNS)
