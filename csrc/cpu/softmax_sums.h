// node_contrast's tiles: w_ij = exp2(c_ij·scale − row_shift_i − column_shift_j)·column_factor_j, their row sums and
// Σ_j w_ij values_j. The forward shifts by its row bound, the backward by the log-sums of either side.
#pragma once
#include "centre.h"

namespace gkd::GKD_ISA {

template <class T>
struct SoftmaxTiles {
  static constexpr int N = Lanes<T>::count;
  static constexpr int kGroup = 4;  // rows at a time

  const SoftmaxSums<T>& args;
  UnitSides<T> units;
  Values<T> values;
  T* tiles;
  int64_t stride;

  template <int G>
  GKD_INLINE void weigh_rows(const Tile& t, T* c, int64_t r) const {
    T shift[G];
    Vec<T> totals[G], weight_totals[G];
    for (int g = 0; g < G; ++g) {
      // Less what a tile's cosines lack.
      shift[g] = (args.row_shift ? args.row_shift[t.i + r + g] : T(0)) - (1 - units.one) * args.scale;
      totals[g] = weight_totals[g] = Vec<T>{};
    }
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> w[G];
      const Vec<T> column_shift = args.column_shift ? load(args.column_shift + t.j + x) : Vec<T>{};
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = load(c + (r + g) * stride + x) * args.scale - (column_shift + shift[g]);
      exp2_nonpositive<T>(w);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        if (args.column_factor) w[g] *= load(args.column_factor + t.j + x);
        store(c + (r + g) * stride + x, w[g]);
        const Vec<T> valid = x + N <= t.columns ? w[g] : keep<T>(w[g], t.columns - x);
        totals[g] += valid;
        if (args.weight_sums) weight_totals[g] += as_multiplied<T>(t.host, valid);
      }
    }
    for (int g = 0; g < G; ++g) {
      if (args.sums) args.sums[t.i + r + g] += sum<T>(totals[g]);
      if (args.weight_sums) args.weight_sums[t.i + r + g] += sum<T>(weight_totals[g]);
    }
  }

  void take_own(const Tile& t, T* w) const {
    for (int64_t r = 0; (args.own || args.own_weights) && r < t.rows; ++r) {
      const int64_t own = own_column(t, r);
      if (own < 0) continue;
      T& weight = w[r * stride + own];
      if (args.own) weight -= args.own[t.i + r];
      if (args.own_weights) {
        T* kept = args.own_weights + 2 * (t.i + r);
        kept[0] = as_multiplied<T>(t.host, Vec<T>{} + weight)[0];
        kept[1] = kept[0] - weight;
        weight = 0;
      }
    }
  }

  // What take_own kept of the weights, times the own columns as they are.
  void add_own(const Host& host) const {
    if (!args.own_weights) return;
    const int64_t dim = args.sides.dim;
    parallel(host, args.sides.row_count, [&](int64_t i, int64_t) {
      const T weight = args.own_weights[2 * i], *own = args.values + (i + args.sides.offset) * dim;
      for (int64_t k = 0; k < dim; ++k) args.weighted[i * dim + k] += weight * own[k];
    }, grain_of(dim));
  }

  void find_maxima(const Tile& t, const T* c) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      T& largest = args.maxima[t.i + r];
      for (int64_t x = 0; x < t.columns; ++x) {
        const T cosine = c[r * stride + x] + (1 - units.one);
        largest = cosine > largest ? cosine : largest;
      }
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    T* c = tiles + worker * tile_elements(stride);
    similarities(t, units.rows, units.columns, c, stride);
    if (args.maxima) return find_maxima(t, c);
    for (int64_t r = 0; args.own_cosines && r < t.rows; ++r) {
      if (const int64_t own = own_column(t, r); own >= 0) {
        args.own_cosines[t.i + r] = c[r * stride + own] + (1 - units.one);
      }
    }
    for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G>(t, c, r); });
    take_own(t, c);
    if (values) add_to_rows(t, c, stride, values, args.sides.column_count, args.sides.dim, args.weighted);
  }
};

template <class T>
void softmax_sums(const Host& host, const SoftmaxSums<T>& args) {
  const Sides<T>& sides = args.sides;
  const int64_t stride = block_rows(host, sides.row_count);
  const UnitSides<T> units(host, sides, stride, false, args.centred_on, args.centred_on_count);
  Centre<T> centre{};
  if (units.centre.row && args.values) {
    centre = {unit_mean(host, args.values, sides.column_count, sides.dim), units.centre.shares, nullptr};
  }
  SoftmaxTiles<T> op{args,
                     units,
                     values_of(host, args.values, sides.column_count, sides.dim, sides.row_count, centre),
                     allocate<T>(host, host.workers * tile_elements(stride)),
                     stride};
  walk(host, sides, op);
  op.add_own(host);
  if (!op.values.sums) return;
  // What is divided by the sums of the rounded weights has its centre by these too: the others' roundings are added.
  for (int64_t i = 0; args.weight_sums && i < sides.row_count; ++i) {
    const double own = args.own_weights ? args.own_weights[2 * i + 1] : 0;
    op.values.sums[i] += T(args.weight_sums[i] - args.sums[i] - own);
  }
  add_centre(host, op.values, sides.row_count, sides.dim, args.weighted);
}

}  // namespace gkd::GKD_ISA
