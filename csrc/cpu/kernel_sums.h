// graph_conv's tiles: K_ij = exp((c_ij − 1)/σ²), K_ii = 1; degrees, Σ_j K_ij values_j, and the nodes' gradient.
#pragma once
#include "centre.h"

namespace gkd::GKD_ISA {

constexpr int kGraphGroup = 4;  // rows at a time

// w ← K_ij of G rows at column x, from their tile; `one`: what a cosine of 1 is in it, times the scale.
template <int G, class T>
GKD_INLINE void kernel_of(const T* c, int64_t stride, T scale, T one, Vec<T> (&w)[G]) {
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) w[g] = load(c + g * stride) * scale - one;
  exp2_nonpositive<T>(w);
}

template <class T>
struct KernelTiles {
  static constexpr int N = Lanes<T>::count;

  const KernelSums<T>& args;
  UnitSides<T> units;
  Values<T> values;
  T *tiles, *column_sums;
  int64_t stride;

  template <int G>
  GKD_INLINE void weigh_rows(const Tile& t, T* c, int64_t r, T* below) const {
    Vec<T> totals[G];
    for (int g = 0; g < G; ++g) totals[g] = Vec<T>{};
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> w[G], column = load(below + x);
      T* row = c + r * stride + x;
      kernel_of(row, stride, args.scale, args.scale * units.one, w);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        store(row + g * stride, w[g]);
        column += w[g];
        totals[g] += x + N <= t.columns ? w[g] : keep<T>(w[g], t.columns - x);
      }
      store(below + x, column);
    }
    if (!args.degrees) return;
    for (int g = 0; g < G; ++g) args.degrees[t.i + r + g] += sum<T>(totals[g]);
  }

  // The tile's K, and what it adds to the degrees.
  void weigh(const Tile& t, T* c, T* below) const {
    similarities(t, units.rows, units.columns, c, stride);
    for (int64_t x = 0; x < stride; ++x) below[x] = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      if (const int64_t own = own_column(t, r); own >= 0) c[r * stride + own] = units.one;
    }
    for_row_groups<kGraphGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G>(t, c, r, below); });
    if (args.degrees && t.mirror) {
      for (int64_t x = 0; x < t.columns; ++x) args.degrees[t.j + x] += below[x];
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    T* c = args.affinities ? args.affinities + t.place * stride * stride : tiles + worker * tile_elements(stride);
    if (!args.known) weigh(t, c, column_sums + worker * stride);
    if (args.affinities && !args.known) clear_beyond(t, c, stride);
    if (!args.output) return;
    add_to_rows(t, c, stride, values, args.sides.column_count, args.width, args.output);
    if (t.mirror) add_to_columns(t, c, stride, values, args.sides.row_count, args.width, args.output);
  }
};

template <class T>
void kernel_sums(const Host& host, const KernelSums<T>& args) {
  const Sides<T>& sides = args.sides;
  const int64_t stride = block_rows(host, sides.row_count);
  const Centre<T> centre = centre_of(host, args.values, sides.column_count, args.width, args.factors);
  KernelTiles<T> op{args,
                    UnitSides<T>(host, sides, stride, args.known),
                    values_of(host, args.values, sides.column_count, args.width, sides.row_count, centre, args.factors),
                    allocate<T>(host, host.workers * tile_elements(stride)),
                    allocate<T>(host, host.workers * stride),
                    stride};
  walk(host, sides, op);
  if (args.output) add_centre(host, op.values, sides.row_count, args.width, args.output);
}

// m (+)= rows_i·columns_j of a tile. These rows are packed tile by tile, into the worker's block of `room`, which costs a
// hundredth of the product and spares the memory.
template <class T>
GKD_INLINE void multiply_own_rows(const Tile& t, int64_t worker, const Operand<T>& room, const T* rows,
                                  const T* factors, int64_t width, const Centre<T>& centre, const Operand<T>& columns,
                                  T* m, int64_t stride, bool accumulate) {
  pack_block(room, worker, rows, factors, t.i, t.i + t.rows, width, stride, centre);
  Tile packed = t;
  packed.i = worker * stride;
  similarities(packed, room, columns, m, stride, accumulate);
}

// M_ij = K_ij/σ² (G'_i·H'_j + H'_i·G'_j + d_i + d_j), M_ii = 0;  dE_i = Σ_j M_ij e_j, and Σ_j K_ij G'_j.
template <class T>
struct NodeTiles {
  static constexpr int N = Lanes<T>::count;

  const NodeGradient<T>& args;
  Terms<T> terms;  // d, and what the centre of H' takes from the products
  UnitSides<T> units;
  Centre<T> right;
  Operand<T> left_columns, right_columns;
  Values<T> values;
  T* tiles;
  Operand<T> tile_rows;  // a block per worker
  Values<T> messages;    // G' of the columns, for the messages' gradient
  int64_t stride;

  // m (+)= G'_i·H'_j or H'_i·G'_j
  GKD_INLINE void multiply_rows(const Tile& t, int64_t worker, const T* rows, const T* factors, const Centre<T>& centre,
                                const Operand<T>& columns, T* m, bool accumulate) const {
    multiply_own_rows(t, worker, tile_rows, rows, factors, args.width, centre, columns, m, stride, accumulate);
  }

  // M of G rows in place of m, from K, which takes the place of the similarities.
  template <int G>
  GKD_INLINE void weigh_rows(const Tile& t, T* c, T* m, int64_t r) const {
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> kernel[G];
      T* row = c + r * stride + x;
      if (args.affinities) {
        for (int g = 0; g < G; ++g) kernel[g] = load(row + g * stride);
      } else {
        kernel_of(row, stride, args.scale, args.scale * units.one, kernel);
        for (int g = 0; messages && g < G; ++g) store(row + g * stride, kernel[g]);
      }
      const Vec<T> other = load(terms.column + t.j + x);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        T* out = m + (r + g) * stride + x;
        store(out, kernel[g] * args.inverse_variance * (load(out) + (other + terms.row[t.i + r + g])));
      }
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    T* m = tiles + worker * 2 * tile_elements(stride);
    T* c = args.affinities ? args.affinities + t.place * stride * stride : m + tile_elements(stride);
    if (!args.affinities) similarities(t, units.rows, units.columns, c, stride);
    multiply_rows(t, worker, args.left.row, args.left_factors.row, {}, right_columns, m, false);
    if (left_columns) multiply_rows(t, worker, args.right.row, args.right_factors.row, right, left_columns, m, true);
    for_row_groups<kGraphGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G>(t, c, m, r); });
    for (int64_t r = 0; r < t.rows; ++r) {
      if (const int64_t own = own_column(t, r); own >= 0) m[r * stride + own] = 0, c[r * stride + own] = 1;
    }
    add_to_rows(t, m, stride, values, args.sides.column_count, args.sides.dim, args.gradient);
    if (t.mirror) add_to_columns(t, m, stride, values, args.sides.row_count, args.sides.dim, args.gradient);
    if (!messages) return;
    add_to_rows(t, c, stride, messages, args.sides.column_count, args.width, args.messages_gradient);
    if (t.mirror) add_to_columns(t, c, stride, messages, args.sides.row_count, args.width, args.messages_gradient);
  }
};

// With H' = Ĥ + h, h being the centre:  G'_i·H'_j + H'_i·G'_j = G'_i·Ĥ_j + Ĥ_i·G'_j + z_i + z_j,  z_i = G'_i·h, which joins the
// terms; without an upstream of the columns G'_j is 0. G' needs no centre: its roundings are multiplied by Ĥ.
template <class T>
Terms<T> centred_terms(const Host& host, const NodeGradient<T>& args, const Centre<T>& right) {
  if (!right.row) return args.terms;
  const Sides<T>& sides = args.sides;
  auto side = [&](const T* terms, const T* g, const T* factors, int64_t count) {
    double* total = cleared<double>(host, count);
    T* out = cleared<T>(host, count);
    if (g) add_dots(host, g, factors, right.row, count, args.width, total);
    for (int64_t i = 0; i < count; ++i) out[i] = T(terms[i] + total[i]);
    return out;
  };
  const T* row = side(args.terms.row, args.left.row, args.left_factors.row, sides.row_count);
  if (sides.symmetric) return {row, row};
  return {row, side(args.terms.column, args.left.column, args.left_factors.column, sides.column_count)};
}

template <class T>
void node_gradient(const Host& host, const NodeGradient<T>& args) {
  const Sides<T>& sides = args.sides;
  const Terms<T>&g = args.left_factors, &h = args.right_factors;
  const int64_t stride = block_rows(host, sides.row_count), rows = sides.row_count, count = sides.column_count;
  const UnitSides<T> units(host, sides, stride, args.affinities != nullptr);
  const Centre<T> right = centre_of(host, args.right.column, count, args.width, h.column);
  const T* messages = args.messages_gradient ? args.left.column : nullptr;
  const Centre<T> of_messages = centre_of(host, messages, count, args.width, g.column);
  NodeTiles<T> op{args,
                  centred_terms(host, args, right),
                  units,
                  right,
                  columns_of(host, args.left.column, count, args.width, stride, {}, g.column),
                  columns_of(host, args.right.column, count, args.width, stride, right, h.column),
                  values_of(host, sides.columns, count, sides.dim, rows, units.centre),
                  allocate<T>(host, host.workers * 2 * tile_elements(stride)),
                  row_blocks<T>(host, host.workers, args.width, stride, right),
                  values_of(host, messages, count, args.width, rows, of_messages, g.column),
                  stride};
  walk(host, sides, op);
  add_centre(host, op.values, rows, sides.dim, args.gradient);
  if (messages) add_centre(host, op.messages, rows, args.width, args.messages_gradient);
}

}  // namespace gkd::GKD_ISA
