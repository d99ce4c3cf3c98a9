// graph_conv's tiles: K_ij = exp((c_ij − 1)/σ²), K_ii = 1; degrees, Σ_j K_ij values_j, and the nodes' gradient.
#pragma once
#include "tile.h"

namespace gkd::GKD_ISA {

template <class T>
struct KernelTiles {
  const KernelSums<T>& args;
  const T *columns, *values;
  T *tiles, *column_sums;
  int64_t stride;

  void tile(const Tile& t, int64_t worker) {
    constexpr int N = Lanes<T>::count;
    T* c = tiles + worker * tile_elements(stride);
    T* below = column_sums + worker * stride;
    similarities(t, args.sides.rows, columns, args.sides.dim, c, stride);
    for (int64_t x = 0; x < stride; ++x) below[x] = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      T* row = c + r * stride;
      const int64_t own = own_column(t, r);
      if (own >= 0) row[own] = 1;
      Vec<T> total{};
      for (int64_t x = 0; x < t.columns; x += N) {
        const Vec<T> w = exp2_nonpositive<T>((load(row + x) - T(1)) * args.scale);
        store(row + x, w);
        store(below + x, load(below + x) + w);
        total += x + N <= t.columns ? w : keep<T>(w, t.columns - x);
      }
      if (args.degrees) args.degrees[t.i + r] += sum<T>(total);
    }
    if (args.degrees && t.mirror) {
      for (int64_t x = 0; x < t.columns; ++x) args.degrees[t.j + x] += below[x];
    }
    if (!args.output) return;
    add_to_rows(t, c, stride, values, args.sides.column_count, args.width, args.output);
    if (t.mirror) add_to_columns(t, c, stride, values, args.sides.row_count, args.width, args.output);
  }
};

template <class T>
void kernel_sums(const Host& host, const KernelSums<T>& args) {
  const Sides<T>& sides = args.sides;
  const int64_t stride = block_rows(host, sides.row_count);
  const T* values = args.output ? values_of(host, args.values.column, sides.column_count, args.width) : nullptr;
  KernelTiles<T> op{args,
                    columns_of(host, sides.columns, sides.column_count, sides.dim),
                    values,
                    allocate<T>(host, host.workers * tile_elements(stride)),
                    allocate<T>(host, host.workers * stride),
                    stride};
  walk(host, sides, op);
}

// M_ij = K_ij/σ² (G'_i·H'_j + H'_i·G'_j + d_i + d_j), M_ii = 0;  dE_i = Σ_j M_ij e_j.
template <class T>
struct NodeTiles {
  const NodeGradient<T>& args;
  const T *columns, *left_columns, *right_columns, *values;
  T* tiles;
  int64_t stride;

  void tile(const Tile& t, int64_t worker) {
    constexpr int N = Lanes<T>::count;
    T* c = tiles + worker * 2 * tile_elements(stride);
    T* m = c + tile_elements(stride);
    similarities(t, args.sides.rows, columns, args.sides.dim, c, stride);
    if (right_columns) similarities(t, args.left.row, right_columns, args.width, m, stride);
    if (left_columns) similarities(t, args.right.row, left_columns, args.width, m, stride, true);
    for (int64_t r = 0; r < t.rows; ++r) {
      const T* row = c + r * stride;
      T* out = m + r * stride;
      const T own_term = args.terms.row[t.i + r];
      for (int64_t x = 0; x < t.columns; x += N) {
        const Vec<T> kernel = exp2_nonpositive<T>((load(row + x) - T(1)) * args.scale);
        const Vec<T> terms = load(out + x) + (load(args.terms.column + t.j + x) + own_term);
        store(out + x, kernel * args.inverse_variance * terms);
      }
      const int64_t own = own_column(t, r);
      if (own >= 0) out[own] = 0;
    }
    add_to_rows(t, m, stride, values, args.sides.column_count, args.sides.dim, args.gradient);
    if (t.mirror) add_to_columns(t, m, stride, values, args.sides.row_count, args.sides.dim, args.gradient);
  }
};

template <class T>
void node_gradient(const Host& host, const NodeGradient<T>& args) {
  const Sides<T>& sides = args.sides;
  const int64_t stride = block_rows(host, sides.row_count), count = sides.column_count;
  NodeTiles<T> op{args,
                  columns_of(host, sides.columns, count, sides.dim),
                  args.left.column ? columns_of(host, args.left.column, count, args.width) : nullptr,
                  columns_of(host, args.right.column, count, args.width),
                  values_of(host, sides.columns, count, sides.dim),
                  allocate<T>(host, host.workers * 2 * tile_elements(stride)),
                  stride};
  walk(host, sides, op);
}

}  // namespace gkd::GKD_ISA
