// graph_conv's second order: tiles of K_ij and of its tangent K˙_ij = K_ij (ė_i·e_j + e_i·ė_j)/σ², K˙_ii = 0.
#pragma once
#include "kernel_sums.h"

namespace gkd::GKD_ISA {

// Σ_j (K˙_ij x_j + K_ij ẋ_j), and the degrees' tangents Σ_j K˙_ij.
template <class T>
struct KernelTangentTiles {
  static constexpr int N = Lanes<T>::count;

  const KernelSumsTangent<T>& args;
  Operand<T> rows, columns, row_tangents, column_tangents;
  Values<T> values[2], extra;
  T *tiles, *column_sums;
  int64_t stride;

  // c ← K and moving ← K˙ of G rows, from the similarities and their tangents.
  template <int G>
  GKD_INLINE void weigh_rows(const Tile& t, T* c, T* moving, int64_t r, T* below) const {
    Vec<T> totals[G];
    for (int g = 0; g < G; ++g) totals[g] = Vec<T>{};
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> kernel[G], column = load(below + x);
      kernel_of(c + r * stride + x, stride, args.scale, args.scale, kernel);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        T* out = moving + (r + g) * stride + x;
        const Vec<T> tangent = kernel[g] * args.inverse_variance * load(out);
        store(c + (r + g) * stride + x, kernel[g]);
        store(out, tangent);
        column += tangent;
        totals[g] += x + N <= t.columns ? tangent : keep<T>(tangent, t.columns - x);
      }
      store(below + x, column);
    }
    if (!args.degrees) return;
    for (int g = 0; g < G; ++g) args.degrees[t.i + r + g] += sum<T>(totals[g]);
  }

  // weights ← K˙_ij + K_ij a, a the rate of what is multiplied: of the columns, or mirrored of the rows.
  void add_rates(const Tile& t, const T* c, const T* moving, const T* row_rates, const T* column_rates, T* weights) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      for (int64_t x = 0; x < t.columns; x += N) {
        const int64_t at = r * stride + x;
        const Vec<T> rate = column_rates ? load(column_rates + t.j + x) : broadcast<T>(row_rates[t.i + r]);
        store(weights + at, load(moving + at) + load(c + at) * rate);
      }
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    T* c = tiles + worker * 3 * tile_elements(stride);
    T *moving = c + tile_elements(stride), *weights = moving + tile_elements(stride);
    T* below = column_sums + worker * stride;
    similarities(t, rows, columns, c, stride);
    moving_similarities(t, rows, columns, row_tangents, column_tangents, moving, stride);
    for (int64_t x = 0; x < stride; ++x) below[x] = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      if (const int64_t own = own_column(t, r); own >= 0) {
        c[r * stride + own] = 1;
        moving[r * stride + own] = 0;
      }
    }
    for_row_groups<kGraphGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G>(t, c, moving, r, below); });
    if (args.degrees && t.mirror) {
      for (int64_t x = 0; x < t.columns; ++x) args.degrees[t.j + x] += below[x];
    }
    for (int64_t p = 0; p < args.parts; ++p) {
      const int64_t width = args.widths[p], count = args.sides.column_count;
      if (p == 0 || args.rates[p].column != args.rates[p - 1].column || t.mirror) {
        add_rates(t, c, moving, nullptr, args.rates[p].column, weights);
      }
      add_to_rows(t, weights, stride, values[p], count, width, args.outputs[p]);
      if (p == 0 && extra) add_to_rows(t, c, stride, extra, count, width, args.outputs[p]);
      if (!t.mirror) continue;
      add_rates(t, c, moving, args.rates[p].row, nullptr, weights);
      add_to_columns(t, weights, stride, values[p], count, width, args.outputs[p]);
      if (p == 0 && extra) add_to_columns(t, c, stride, extra, count, width, args.outputs[p]);
    }
  }
};

template <class T>
void kernel_sums_tangent(const Host& host, const KernelSumsTangent<T>& args) {
  const Sides<T>& sides = args.sides;
  const int64_t stride = block_rows(host, sides.row_count), count = sides.column_count;
  KernelTangentTiles<T> op{args,
                           rows_of(host, sides.rows, sides.row_count, sides.dim, stride),
                           columns_of(host, sides.columns, count, sides.dim, stride),
                           rows_of(host, args.tangents.row, sides.row_count, sides.dim, stride),
                           columns_of(host, args.tangents.column, count, sides.dim, stride),
                           {},
                           values_of(host, args.extra, count, args.widths[0], sides.row_count),
                           allocate<T>(host, host.workers * 3 * tile_elements(stride)),
                           allocate<T>(host, host.workers * stride),
                           stride};
  for (int64_t p = 0; p < args.parts; ++p) {
    op.values[p] = values_of(host, args.values[p].column, count, args.widths[p], sides.row_count);
  }
  walk(host, sides, op);
}

// With m_ij = G'_i·H'_j + G'_j·H'_i + d_i + d_j: M_ij = K_ij m_ij/σ² and M˙_ij = (K˙_ij m_ij + K_ij ṁ_ij)/σ², 0 for
// i = j; Σ_j (M˙_ij e_j + M_ij ė_j).
template <class T>
struct NodeTangentTiles {
  static constexpr int N = Lanes<T>::count;

  const NodeGradientTangent<T>& args;
  Operand<T> rows, row_tangents, left_rows, right_rows, extra_rows;
  Operand<T> columns, column_tangents, left_columns, right_columns, extra_columns;
  Values<T> values, tangent_values;
  T* tiles;
  int64_t stride;

  // c ← M˙ and moving ← M; `ahead`: G'_i·H'_j, `behind`: G'_j·H'_i, `more`: what extra adds to ṁ.
  template <int G>
  GKD_INLINE void weigh_rows(const Tile& t, T* c, int64_t r) const {
    const NodeGradient<T>& first = args.gradient;
    const int64_t size = tile_elements(stride), j = t.j;
    T *moving = c + size, *ahead = moving + size, *behind = ahead + size, *more = behind + size;
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> kernel[G];
      kernel_of(c + r * stride + x, stride, first.scale, first.scale, kernel);
      const Vec<T> term = load(first.terms.column + j + x), term_tangent = load(args.terms.column + j + x);
      const Vec<T> left_rate = load(args.left_rates.column + j + x), right_rate = load(args.right_rates.column + j + x);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const int64_t at = (r + g) * stride + x, i = t.i + r + g;
        const Vec<T> forth = load(ahead + at), back = load(behind + at);
        const Vec<T> m = forth + back + (term + first.terms.row[i]);
        Vec<T> tangent = forth * (right_rate + args.left_rates.row[i]) + back * (left_rate + args.right_rates.row[i]) +
                         (term_tangent + args.terms.row[i]);
        if (extra_rows) tangent += load(more + at);
        const Vec<T> scaled = kernel[g] * first.inverse_variance;
        store(c + at, scaled * (load(moving + at) * first.inverse_variance * m + tangent));
        store(moving + at, scaled * m);
      }
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    const NodeGradient<T>& first = args.gradient;
    const int64_t size = tile_elements(stride), dim = first.sides.dim, width = first.width;
    T* c = tiles + worker * 5 * size;
    T *moving = c + size, *ahead = moving + size, *behind = ahead + size, *more = behind + size;
    similarities(t, rows, columns, c, stride);
    moving_similarities(t, rows, columns, row_tangents, column_tangents, moving, stride);
    similarities(t, left_rows, right_columns, ahead, stride);
    similarities(t, right_rows, left_columns, behind, stride);
    if (extra_rows) {
      moving_similarities(t, extra_rows, extra_columns, left_rows, left_columns, more, stride);
    }
    for_row_groups<kGraphGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G>(t, c, r); });
    for (int64_t r = 0; r < t.rows; ++r) {
      if (const int64_t own = own_column(t, r); own >= 0) c[r * stride + own] = moving[r * stride + own] = 0;
    }
    const int64_t count = first.sides.column_count;
    add_to_rows(t, c, stride, values, count, dim, first.gradient);
    add_to_rows(t, moving, stride, tangent_values, count, dim, first.gradient);
    if (!t.mirror) return;
    add_to_columns(t, c, stride, values, count, dim, first.gradient);
    add_to_columns(t, moving, stride, tangent_values, count, dim, first.gradient);
  }
};

template <class T>
void node_gradient_tangent(const Host& host, const NodeGradientTangent<T>& args) {
  const NodeGradient<T>& first = args.gradient;
  const Sides<T>& sides = first.sides;
  const int64_t stride = block_rows(host, sides.row_count), count = sides.column_count;
  auto rows = [&](const T* x, int64_t width) { return rows_of(host, x, sides.row_count, width, stride); };
  auto columns = [&](const T* x, int64_t width) { return columns_of(host, x, count, width, stride); };
  NodeTangentTiles<T> op{args,
                         rows(sides.rows, sides.dim),
                         rows(args.tangents.row, sides.dim),
                         rows(first.left.row, first.width),
                         rows(first.right.row, first.width),
                         rows(args.extra.row, first.width),
                         columns(sides.columns, sides.dim),
                         columns(args.tangents.column, sides.dim),
                         columns(first.left.column, first.width),
                         columns(first.right.column, first.width),
                         columns(args.extra.column, first.width),
                         values_of(host, sides.columns, count, sides.dim, sides.row_count),
                         values_of(host, args.tangents.column, count, sides.dim, sides.row_count),
                         allocate<T>(host, host.workers * 5 * tile_elements(stride)),
                         stride};
  walk(host, sides, op);
}

}  // namespace gkd::GKD_ISA
