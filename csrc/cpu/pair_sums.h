// The tiles of losses over pairs of rows: both graphs' products x and y, and of these what the kind (pair_kinds.h) makes:
// sums over each row's partners, or weights M^s = ∂/∂x, M^t = ∂/∂y of Σ g·sum with dS_i = Σ_j M^s_ij s_j. Tangents come of
// the same formulas in duals: Ṡ_i = Σ_j (Ṁ^s_ij s_j + M^s_ij ṡ_j).
#pragma once
#include "pair_kinds.h"
#include "tile.h"

namespace gkd::GKD_ISA {

template <class T, template <class, bool> class KindOf, bool Moving>
struct PairTiles {
  using Kind = KindOf<T, Moving>;
  using V = Number<T, Moving>;
  static constexpr int N = Lanes<T>::count, P = Kind::kTerms, K = Kind::kSums, kSides = Kind::kSides;
  static constexpr int kParts = Moving ? 2 : 1;  // of a number: value and tangent
  static constexpr int kGroup = Moving ? 1 : GKD_VECTOR_BYTES == 64 ? 4 : 2;  // rows at a time
  static constexpr int kTermArray = P > 0 ? P : 1;

  const PairSums<T>& args;
  Kind kind;
  bool backward;
  int64_t stride;
  Operand<T> rows[2], columns[2], row_tangents[2], column_tangents[2];
  Values<T> values[2], tangent_values[2];
  T* tiles;
  T* partial;  // column sums of one tile

  GKD_INLINE T* tile_of(int64_t worker, int side, int part) const {
    return tiles + ((worker * kSides + side) * kParts + part) * tile_elements(stride);
  }

  GKD_INLINE V number(const T* v, const T* d) const {
    if constexpr (Moving) return {load(v), load(d)};
    else return load(v);
  }

  GKD_INLINE void put(T* v, T* d, V x) const {
    if constexpr (Moving) store(v, x.v), store(d, x.d);
    else store(v, x);
  }

  // What is wanted of a result.
  GKD_INLINE static Vec<T> wanted(V x) {
    if constexpr (Moving) return x.d;
    else return x;
  }

  GKD_INLINE void row_terms(int64_t i, V (&out)[kTermArray]) const {
    for (int p = 0; p < P; ++p) {
      if constexpr (Moving) out[p] = {broadcast<T>(args.terms[p].row[i]), broadcast<T>(args.term_tangents[p].row[i])};
      else out[p] = broadcast<T>(args.terms[p].row[i]);
    }
  }

  GKD_INLINE void column_terms(int64_t j, V (&out)[kTermArray]) const {
    for (int p = 0; p < P; ++p) out[p] = number(args.terms[p].column + j, args.term_tangents[p].column + j);
  }

  GKD_INLINE V upstream(Vec<T> g) const {
    if constexpr (Moving) return {g, Vec<T>{}};
    else return g;
  }

  void multiply_sides(const Tile& t, int64_t worker) const {
    for (int q = 0; q < kSides; ++q) {
      T* c = tile_of(worker, q, 0);
      similarities(t, rows[q], columns[q], c, stride);
      if constexpr (Moving) {
        T* moving = tile_of(worker, q, 1);
        if (row_tangents[q] || column_tangents[q]) {
          moving_similarities(t, rows[q], columns[q], row_tangents[q], column_tangents[q], moving, stride);
        } else {
          for (int64_t k = 0; k < t.rows * stride; ++k) moving[k] = 0;
        }
      }
      for (int64_t r = 0; Kind::kSkipsOwn && r < t.rows; ++r) {
        if (const int64_t own = own_column(t, r); own >= 0) c[r * stride + own] = kOwn<T>;
      }
    }
  }

  // x and y at an element of the tile.
  GKD_INLINE void products(int64_t worker, int64_t at, V (&out)[2]) const {
    for (int q = 0; q < 2; ++q) {
      out[q] = q < kSides ? number(tile_of(worker, q, 0) + at, tile_of(worker, q, kParts - 1) + at) : still<T, Moving>(0);
    }
  }

  template <int G>
  GKD_INLINE void add_rows(const Tile& t, int64_t worker, int64_t r, T* below) const {
    Vec<T> totals[K][G];
    V A[G][kTermArray];
    for (int g = 0; g < G; ++g) {
      for (int k = 0; k < K; ++k) totals[k][g] = Vec<T>{};
      row_terms(t.i + r + g, A[g]);
    }
    for (int64_t x = 0; x < t.columns; x += N) {
      V B[kTermArray];
      column_terms(t.j + x, B);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        V c[2], own[K], mirrored[K];
        products(worker, (r + g) * stride + x, c);
        kind.sums(c[0], c[1], A[g], B, own);
        if (t.mirror && !Kind::kSymmetric) kind.sums(c[0], c[1], B, A[g], mirrored);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          const Vec<T> summand = wanted(own[k]);
          totals[k][g] += x + N <= t.columns ? summand : keep<T>(summand, t.columns - x);
          if (!t.mirror) continue;
          T* column = below + k * stride + x;
          store(column, load(column) + (Kind::kSymmetric ? summand : wanted(mirrored[k])));
        }
      }
    }
    for (int k = 0; k < K; ++k) {
      for (int g = 0; g < G; ++g) args.sums[k * args.sides[0].row_count + t.i + r + g] += sum<T>(totals[k][g]);
    }
  }

  // The weights of G rows in place of their products.
  template <int G>
  GKD_INLINE void weigh_rows(const Tile& t, int64_t worker, int64_t r, T* below) const {
    const bool teacher = kSides == 2 && args.gradients[1];
    Vec<T> totals[kTermArray][G];
    V A[G][kTermArray];
    for (int g = 0; g < G; ++g) {
      for (int p = 0; p < P; ++p) totals[p][g] = Vec<T>{};
      row_terms(t.i + r + g, A[g]);
    }
    for (int64_t x = 0; x < t.columns; x += N) {
      V B[kTermArray];
      column_terms(t.j + x, B);
      const Vec<T> h = load(args.upstream.column + t.j + x);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        V c[2];
        const int64_t at = (r + g) * stride + x;
        const Vec<T> own_upstream = broadcast<T>(args.upstream.row[t.i + r + g]);
        products(worker, at, c);
        Slopes<V, P> slopes;
        if constexpr (Kind::kSymmetric) {
          kind.slopes(c[0], c[1], A[g], B, upstream(own_upstream + h), teacher, slopes);
        } else {
          Slopes<V, P> mirrored;
          kind.slopes(c[0], c[1], A[g], B, upstream(own_upstream), teacher, slopes);
          kind.slopes(c[0], c[1], B, A[g], upstream(h), teacher, mirrored);
          slopes.x = slopes.x + mirrored.x;
          if (teacher) slopes.y = slopes.y + mirrored.y;
          for (int p = 0; p < P; ++p) {
            slopes.a[p] = slopes.a[p] + mirrored.b[p];
            slopes.b[p] = slopes.b[p] + mirrored.a[p];
          }
        }
        put(tile_of(worker, 0, 0) + at, tile_of(worker, 0, kParts - 1) + at, slopes.x);
        if (teacher) put(tile_of(worker, 1, 0) + at, tile_of(worker, 1, kParts - 1) + at, slopes.y);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          if (p > 0 && !teacher) continue;
          const Vec<T> own = wanted(slopes.a[p]);
          totals[p][g] += x + N <= t.columns ? own : keep<T>(own, t.columns - x);
          if (!t.mirror) continue;
          T* column = below + p * stride + x;
          store(column, load(column) + wanted(slopes.b[p]));
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      for (int g = 0; g < G; ++g) args.term_sums[p * args.sides[0].row_count + t.i + r + g] += sum<T>(totals[p][g]);
    }
  }

  void multiply_values(const Tile& t, int64_t worker) const {
    for (int q = 0; q < kSides; ++q) {
      const Sides<T>& sides = args.sides[q];
      T* out = args.gradients[q];
      if (!out) continue;
      const T *weights = tile_of(worker, q, 0), *moving = tile_of(worker, q, kParts - 1);
      add_to_rows(t, moving, stride, values[q], sides.column_count, sides.dim, out);
      if (t.mirror) add_to_columns(t, moving, stride, values[q], sides.row_count, sides.dim, out);
      if (!tangent_values[q]) continue;
      add_to_rows(t, weights, stride, tangent_values[q], sides.column_count, sides.dim, out);
      if (t.mirror) add_to_columns(t, weights, stride, tangent_values[q], sides.row_count, sides.dim, out);
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    const int sums = backward ? P : K;
    T* below = partial + worker * (K + P) * stride;
    multiply_sides(t, worker);
    for (int64_t x = 0; x < sums * stride; ++x) below[x] = 0;
    if (backward) {
      for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G>(t, worker, r, below); });
      multiply_values(t, worker);
    } else {
      for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { add_rows<G>(t, worker, r, below); });
    }
    if (!t.mirror) return;
    double* out = backward ? args.term_sums : args.sums;
    for (int k = 0; k < sums; ++k) {
      double* column = out + k * args.sides[0].row_count + t.j;
      for (int64_t x = 0; x < t.columns; ++x) column[x] += below[k * stride + x];
    }
  }
};

template <template <class, bool> class Kind, bool Moving, class T>
void walk_pairs(const Host& host, const PairSums<T>& args, bool backward) {
  using Tiles = PairTiles<T, Kind, Moving>;
  const int64_t stride = block_rows(host, args.sides[0].row_count);
  Tiles op{args, typename Tiles::Kind(args), backward, stride, {}, {}, {}, {}, {}, {}, nullptr, nullptr};
  for (int q = 0; q < Tiles::kSides; ++q) {
    const Sides<T>& sides = args.sides[q];
    const int64_t count = sides.column_count;
    const bool gradient = backward && args.gradients[q];
    op.rows[q] = rows_of(host, sides.rows, sides.row_count, sides.dim, stride);
    op.columns[q] = columns_of(host, sides.columns, count, sides.dim, stride);
    if (gradient) op.values[q] = values_of(host, sides.columns, count, sides.dim, sides.row_count);
    if (!Moving) continue;
    op.row_tangents[q] = rows_of(host, args.tangents[q].row, sides.row_count, sides.dim, stride);
    op.column_tangents[q] = columns_of(host, args.tangents[q].column, count, sides.dim, stride);
    if (gradient) op.tangent_values[q] = values_of(host, args.tangents[q].column, count, sides.dim, sides.row_count);
  }
  op.tiles = allocate<T>(host, host.workers * Tiles::kSides * Tiles::kParts * tile_elements(stride));
  op.partial = allocate<T>(host, host.workers * (Tiles::K + Tiles::P) * stride);
  walk(host, args.sides[0], op);
}

template <template <class, bool> class Kind, class T>
void walk_pairs(const Host& host, const PairSums<T>& args, bool backward) {
  if (args.moving) walk_pairs<Kind, true>(host, args, backward);
  else walk_pairs<Kind, false>(host, args, backward);
}

template <class T>
void walk_pairs(const Host& host, const PairSums<T>& args, bool backward) {
  switch (args.kind) {
    case PairKind::absolute_sums: return walk_pairs<AbsoluteSums>(host, args, backward);
    case PairKind::distances: return walk_pairs<Distances>(host, args, backward);
    case PairKind::rkd_distance: return walk_pairs<RkdDistance>(host, args, backward);
    case PairKind::polynomial: return walk_pairs<Polynomial>(host, args, backward);
    case PairKind::pkt: return walk_pairs<Pkt>(host, args, backward);
  }
}

template <class T>
void pair_sums(const Host& host, const PairSums<T>& args) {
  walk_pairs(host, args, false);
}

template <class T>
void pair_sums_backward(const Host& host, const PairSums<T>& args) {
  walk_pairs(host, args, true);
}

}  // namespace gkd::GKD_ISA
