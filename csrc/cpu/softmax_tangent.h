// node_contrast's second order: with ċ_ij = ẋ_i·y_j + x_i·ẏ_j the weights w_ij of softmax_sums.h move at
// ẇ_ij = w_ij (ċ_ij/τ − row_term_i − column_term_j): their row sums, and Σ_j (ẇ_ij y_j + w_ij ẏ_j).
#pragma once
#include "softmax_sums.h"

namespace gkd::GKD_ISA {

template <class T>
struct SoftmaxTangentTiles {
  static constexpr int N = Lanes<T>::count;

  const SoftmaxTangent<T>& args;
  SoftmaxTiles<T> softmax;
  Operand<T> row_tangents, column_tangents;
  Values<T> tangent_values;
  int64_t stride;

  template <int G>
  GKD_INLINE void move_rows(const Tile& t, const T* w, T* moving, int64_t r) const {
    Vec<T> totals[G];
    for (int g = 0; g < G; ++g) totals[g] = Vec<T>{};
    for (int64_t x = 0; x < t.columns; x += N) {
      const Vec<T> column_term = args.column_term ? load(args.column_term + t.j + x) : Vec<T>{};
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const int64_t at = (r + g) * stride + x;
        const T row_term = args.row_term ? args.row_term[t.i + r + g] : T(0);
        const Vec<T> tangent = load(w + at) * (load(moving + at) * args.inverse_temperature - (column_term + row_term));
        store(moving + at, tangent);
        totals[g] += x + N <= t.columns ? tangent : keep<T>(tangent, t.columns - x);
      }
    }
    if (!args.softmax.sums) return;
    for (int g = 0; g < G; ++g) args.softmax.sums[t.i + r + g] += sum<T>(totals[g]);
  }

  void tile(const Tile& t, int64_t worker) const {
    const Sides<T>& sides = args.softmax.sides;
    T* w = softmax.tiles + worker * 2 * tile_elements(stride);
    T* moving = w + tile_elements(stride);
    similarities(t, softmax.units.rows, softmax.units.columns, w, stride);
    moving_similarities(t, softmax.units.rows, softmax.units.columns, row_tangents, column_tangents, moving, stride);
    for_row_groups<SoftmaxTiles<T>::kGroup>(t.rows, [&]<int G>(int64_t r) {
      softmax.template weigh_rows<G>(t, w, r);
      move_rows<G>(t, w, moving, r);
    });
    if (!softmax.values) return;
    add_to_rows(t, moving, stride, softmax.values, sides.column_count, sides.dim, args.softmax.weighted);
    if (!tangent_values) return;
    softmax.take_own(t, w);
    add_to_rows(t, w, stride, tangent_values, sides.column_count, sides.dim, args.softmax.weighted);
  }
};

template <class T>
void softmax_tangent(const Host& host, const SoftmaxTangent<T>& args) {
  const Sides<T>& sides = args.softmax.sides;
  const int64_t stride = block_rows(host, sides.row_count), count = sides.column_count;
  SoftmaxSums<T> weights = args.softmax;
  weights.sums = weights.weight_sums = nullptr;
  SoftmaxTangentTiles<T> op{
      args,
      {weights,
       UnitSides<T>(host, sides, stride),
       values_of(host, args.softmax.values, count, sides.dim, sides.row_count),
       allocate<T>(host, host.workers * 2 * tile_elements(stride)),
       stride},
      rows_of(host, args.tangents.row, sides.row_count, sides.dim, stride),
      columns_of(host, args.tangents.column, count, sides.dim, stride),
      values_of(host, args.softmax.values ? args.tangents.column : nullptr, count, sides.dim, sides.row_count),
      stride};
  walk(host, sides, op);
}

}  // namespace gkd::GKD_ISA
