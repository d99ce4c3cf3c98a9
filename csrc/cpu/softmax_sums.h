// node_contrast's tiles: w_ij = exp2(c_ij·scale − row_shift_i − column_shift_j)·column_factor_j, their row sums and
// Σ_j w_ij values_j. The forward shifts by its row bound, the backward by the log-sums of either side.
#pragma once
#include "tile.h"

namespace gkd::GKD_ISA {

template <class T>
struct SoftmaxTiles {
  const SoftmaxSums<T>& args;
  const T *columns, *values;
  T* tiles;
  int64_t stride;

  void tile(const Tile& t, int64_t worker) {
    constexpr int N = Lanes<T>::count;
    T* c = tiles + worker * tile_elements(stride);
    similarities(t, args.sides.rows, columns, args.sides.dim, c, stride);
    for (int64_t r = 0; r < t.rows; ++r) {
      T* row = c + r * stride;
      if (args.maxima) {
        T largest = args.maxima[t.i + r];
        for (int64_t x = 0; x < t.columns; ++x) largest = row[x] > largest ? row[x] : largest;
        args.maxima[t.i + r] = largest;
        continue;
      }
      const T shift = args.row_shift ? args.row_shift[t.i + r] : T(0);
      Vec<T> total{};
      for (int64_t x = 0; x < t.columns; x += N) {
        Vec<T> v = load(row + x) * args.scale - shift;
        if (args.column_shift) v -= load(args.column_shift + t.j + x);
        Vec<T> w = exp2_nonpositive<T>(v);
        if (args.column_factor) w *= load(args.column_factor + t.j + x);
        store(row + x, w);
        total += x + N <= t.columns ? w : keep<T>(w, t.columns - x);
      }
      if (args.sums) args.sums[t.i + r] += sum<T>(total);
    }
    if (values) add_to_rows(t, c, stride, values, args.sides.column_count, args.sides.dim, args.weighted);
  }
};

template <class T>
void softmax_sums(const Host& host, const SoftmaxSums<T>& args) {
  const int64_t stride = block_rows(host, args.sides.row_count);
  SoftmaxTiles<T> op{args, columns_of(host, args.sides.columns, args.sides.column_count, args.sides.dim),
                     args.values ? values_of(host, args.values, args.sides.column_count, args.sides.dim) : nullptr,
                     allocate<T>(host, host.workers * tile_elements(stride)), stride};
  walk(host, args.sides, op);
}

}  // namespace gkd::GKD_ISA
