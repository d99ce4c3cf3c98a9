// neighbor_conv's tiles, over the others: x_ij = (c_ij − 1)/σ², in base 2, and own columns out of reach.
#pragma once
#include "kernel_sums.h"

namespace gkd::GKD_ISA {

// The exponents of tiles.
template <class T>
struct NeighborTiles {
  static constexpr int N = Lanes<T>::count;

  int64_t stride;
  KeptCosines<T> kept;
  UnitSides<T> units;
  T scale, one;  // one: what a cosine of 1 is in a tile, times the scale

  template <class Arguments>
  NeighborTiles(const Host& host, const Arguments& args)
      : stride(block_rows(host, args.sides.row_count)), kept(args.kept), units(host, args.sides, stride, kept.known),
        scale(args.scale), one(scale * units.one) {}

  // Where they are kept, else in the worker's `room`.
  GKD_INLINE const T* similarities_of(const Tile& t, T* room) const {
    T* c = kept.tiles ? kept.tiles + t.place * stride * stride : room;
    if (kept.known) return c;
    similarities(t, units.rows, units.columns, c, stride);
    put_own_columns_far(t, c, stride);
    if (kept.tiles) clear_beyond(t, c, stride);
    return c;
  }

  GKD_INLINE Vec<T> exponents(const T* c) const { return load(c) * scale - one; }
};

// Each row's largest exponent so far is its shift; sums grow smaller as it rises. What is below the diagonal is summed by
// column, under the columns' shifts.
template <class T>
struct NeighborSumTiles : NeighborTiles<T> {
  using NeighborTiles<T>::N, NeighborTiles<T>::stride;
  static constexpr int kSums = 4, kGroup = 2;

  const NeighborSums<T>& args;
  T *tiles, *partial;  // partial: sums of one tile's columns

  NeighborSumTiles(const Host& host, const NeighborSums<T>& args)
      : NeighborTiles<T>(host, args), args(args),
        tiles(allocate<T>(host, host.workers * tile_elements(stride))),
        partial(allocate<T>(host, host.workers * kSums * stride)) {}

  GKD_INLINE void raise(int64_t i, T similarity) const {
    const T shift = similarity * this->scale - this->one;
    if (!(shift > args.shifts[i])) return;
    const double less = __builtin_exp2(double(args.shifts[i]) - double(shift));
    args.shifts[i] = shift;
    for (int q = 0; q < kSums; ++q) args.sums[q * args.sides.row_count + i] *= q % 2 ? less * less : less;
  }

  // `largest`: memory for a number per column.
  void raise_shifts(const Tile& t, const T* c, T* largest) const {
    for (int64_t x = 0; x < stride; ++x) largest[x] = kFar<T>;
    for (int64_t r = 0; r < t.rows; ++r) {
      const T* row = c + r * stride;
      Vec<T> most = broadcast<T>(kFar<T>);
      for (int64_t x = 0; x < t.columns; x += N) {
        const Vec<T> now = load(row + x), column = load(largest + x);
        store(largest + x, now > column ? now : column);
        if (x + N <= t.columns) most = now > most ? now : most;
      }
      T own = kFar<T>;
      for (int k = 0; k < N; ++k) own = most[k] > own ? most[k] : own;
      for (int64_t x = t.columns / N * N; x < t.columns; ++x) own = row[x] > own ? row[x] : own;
      raise(t.i + r, own);
    }
    for (int64_t x = 0; t.mirror && x < t.columns; ++x) raise(t.j + x, largest[x]);
  }

  // w, w², w x and w² x
  GKD_INLINE static void summands(Vec<T> w, Vec<T> x, Vec<T> (&out)[kSums]) {
    out[0] = w;
    out[1] = w * w;
    out[2] = w * x;
    out[3] = out[1] * x;
  }

  template <bool Mirror, int G>
  GKD_INLINE void add_rows(const Tile& t, const T* c, int64_t r, T* below) const {
    Vec<T> totals[G][kSums];
    for (int g = 0; g < G; ++g) {
      for (int q = 0; q < kSums; ++q) totals[g][q] = Vec<T>{};
    }
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> exponents[G], w[Mirror ? 2 * G : G];
      const Vec<T> shifts = Mirror ? load(args.shifts + t.j + x) : Vec<T>{};
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        exponents[g] = this->exponents(c + (r + g) * stride + x);
        w[g] = exponents[g] - args.shifts[t.i + r + g];
        if constexpr (Mirror) w[G + g] = exponents[g] - shifts;
      }
      exp2_nonpositive<T>(w);
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        Vec<T> own[kSums];
        summands(x + N <= t.columns ? w[g] : keep<T>(w[g], t.columns - x), exponents[g], own);
#pragma GCC unroll 4
        for (int q = 0; q < kSums; ++q) totals[g][q] += own[q];
      }
      if constexpr (Mirror) {
        Vec<T> column[kSums];
#pragma GCC unroll 4
        for (int q = 0; q < kSums; ++q) column[q] = load(below + q * stride + x);
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) {
          Vec<T> mirrored[kSums];
          summands(w[G + g], exponents[g], mirrored);
#pragma GCC unroll 4
          for (int q = 0; q < kSums; ++q) column[q] += mirrored[q];
        }
#pragma GCC unroll 4
        for (int q = 0; q < kSums; ++q) store(below + q * stride + x, column[q]);
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int q = 0; q < kSums; ++q) args.sums[q * args.sides.row_count + t.i + r + g] += sum<T>(totals[g][q]);
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    const T* c = this->similarities_of(t, tiles + worker * tile_elements(stride));
    T* below = partial + worker * kSums * stride;
    raise_shifts(t, c, below);
    if (!t.mirror) {
      return for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { add_rows<false, G>(t, c, r, below); });
    }
    for (int64_t x = 0; x < kSums * stride; ++x) below[x] = 0;
    for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { add_rows<true, G>(t, c, r, below); });
    for (int q = 0; q < kSums; ++q) {
      double* out = args.sums + q * args.sides.row_count + t.j;
      for (int64_t x = 0; x < t.columns; ++x) out[x] += below[q * stride + x];
    }
  }
};

template <class T>
void neighbor_sums(const Host& host, const NeighborSums<T>& args) {
  NeighborSumTiles<T> op(host, args);
  walk(host, args.sides, op);
}

// Σ_j A_ij values_j with A_ij = exp(x_ij − shares_i − shares_j). Rounded weights are scaled row by row to the sum of the
// unrounded ones: a weight just below 1 that becomes 1 would be as far off as all the others together.
template <class T>
struct NeighborConvTiles : NeighborTiles<T> {
  using NeighborTiles<T>::N, NeighborTiles<T>::stride;

  const NeighborConv<T>& args;
  Values<T> values;
  T* tiles;

  NeighborConvTiles(const Host& host, const NeighborConv<T>& args)
      : NeighborTiles<T>(host, args), args(args),
        values(values_of(host, args.values, args.sides.column_count, args.width, args.sides.row_count,
                         centre_of(host, args.values, args.sides.column_count, args.width))),
        tiles(allocate<T>(host, host.workers * 2 * tile_elements(stride))) {
    if (values.sums) values.rounded_sums = cleared<double>(host, args.sides.row_count);
  }

  void scale_to_sums(const Host& host) const {
    if (!values.sums) return;
    parallel(host, args.sides.row_count, [&](int64_t i, int64_t) {
      const double rounded = values.rounded_sums[i];
      const T factor = rounded > 0 ? T(values.sums[i] / rounded) : T(1);
      for (int64_t k = 0; k < args.width; ++k) args.output[i * args.width + k] *= factor;
    }, grain_of(args.width));
  }

  void weigh(const Tile& t, const T* c, const WideTerms<T>& shares, T* w) const {
    const Terms<T>&high = shares.high, &low = shares.low;
    for_row_groups<kGraphGroup>(t.rows, [&]<int G>(int64_t r) {
      const int64_t i = t.i + r;
      for (int64_t x = 0; x < t.columns; x += N) {
        const Vec<T> column = load(high.column + t.j + x), rest = load(low.column + t.j + x);
        Vec<T> now[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          now[g] = this->exponents(c + (r + g) * stride + x) - high.row[i + g] - column - (rest + low.row[i + g]);
        }
        exp2_nonpositive<T>(now);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) store(w + (r + g) * stride + x, now[g]);
      }
    });
  }

  void tile(const Tile& t, int64_t worker) const {
    const Sides<T>& sides = args.sides;
    T* w = tiles + worker * 2 * tile_elements(stride);
    const T* c = this->similarities_of(t, w + tile_elements(stride));
    weigh(t, c, args.shares, w);
    add_to_rows(t, w, stride, values, sides.column_count, args.width, args.output);
    if (!t.mirror) return;
    if (args.transposes) weigh(t, c, args.transposed_shares, w);
    add_to_columns(t, w, stride, values, sides.row_count, args.width, args.output);
  }
};

template <class T>
void neighbor_conv(const Host& host, const NeighborConv<T>& args) {
  NeighborConvTiles<T> op(host, args);
  walk(host, args.sides, op);
  op.scale_to_sums(host);
  add_centre(host, op.values, args.sides.row_count, args.width, args.output);
}

// With u = exp((x_ij − l_i)/2) and t = exp((x_ij − l_j)/2):
//   M_ij = v (u² (G_i·m_j + d_i) + t² (G_j·m_i + d_j))              (row)
//   M_ij = v (u t (G_i·m_j + G_j·m_i) + u² d_i + t² d_j)            (symmetric)
// and dE_i = Σ_j M_ij e_j. About the centres h of messages and g of the upstream,
//   G_i·m_j = ĝ_i·m̂_j + a_i + b_j,  a_i = G_i·h − g·h/2,  b_j = g·m_j − g·h/2.
// Where a weight is 1 all of M cancels: G and m are the rounded rows in all of it, in the node terms too.
template <class T>
struct NeighborGradientTiles : NeighborTiles<T> {
  using NeighborTiles<T>::N, NeighborTiles<T>::stride;

  const NeighborGradient<T>& args;
  Centre<T> left_centre, right_centre;  // of the columns' upstream, if there is any, and messages
  // What is added to a row's products: own terms to G_i·m_j, other ones to G_j·m_i; of the symmetric normalization the
  // other ones to both, and the own ones are the node terms.
  Terms<T> own_terms, other_terms;
  Operand<T> left_columns, right_columns;
  Values<T> values;
  Operand<T> tile_rows;  // a block per worker
  T* tiles;

  NeighborGradientTiles(const Host& host, const NeighborGradient<T>& args)
      : NeighborTiles<T>(host, args), args(args),
        left_centre(centre_of(host, args.left.column, args.sides.column_count, args.width)),
        right_centre(centre_of(host, args.right.column, args.sides.column_count, args.width)),
        left_columns(columns_of(host, args.left.column, args.sides.column_count, args.width, stride, left_centre)),
        right_columns(columns_of(host, args.right.column, args.sides.column_count, args.width, stride, right_centre)),
        values(values_of(host, args.sides.columns, args.sides.column_count, args.sides.dim, args.sides.row_count,
                         this->units.centre)),
        tile_rows(row_blocks<T>(host, host.workers, args.width, stride, right_centre)),
        tiles(cleared<T>(host, host.workers * 3 * tile_elements(stride))) {
    add_terms(host, args.left.row, args.right.row, args.terms.row, args.sides.row_count, own_terms.row,
              other_terms.row);
    own_terms.column = own_terms.row;
    other_terms.column = other_terms.row;
    if (args.sides.symmetric) return;
    add_terms(host, args.left.column, args.right.column, args.terms.column, args.sides.column_count, own_terms.column,
              other_terms.column);
  }

  void add_terms(const Host& host, const T* upstream, const T* messages, const T* given, int64_t count,
                 const T*& own_terms, const T*& other_terms) const {
    T *own = cleared<T>(host, count), *other = cleared<T>(host, count);
    own_terms = own;
    other_terms = other;
    const int64_t width = args.width;
    const T *left = rounded_rows(host, upstream, count, width, left_centre), *g = left_centre.row;
    const T *right = rounded_rows(host, messages, count, width, right_centre), *h = right_centre.row;
    const double half = g ? wide_dot(g, h, width) / 2 : 0;
    parallel(host, count, [&](int64_t i, int64_t) {
      const T *of_left = left ? left + i * width : nullptr, *of_right = right + i * width;
      const double a = h && left ? wide_dot(of_left, h, width) - half : 0;
      const double b = g ? wide_dot(g, of_right, width) - half : 0;
      double d = given ? given[i] : 0;
      if (args.output) {
        d = -wide_dot(of_left, args.output + i * width, width);
        if (args.symmetric) d = (d - wide_dot(of_right, args.messages_gradient + i * width, width)) / 2;
        if (args.weight_sums && args.weight_sums[i] > 0) d /= args.weight_sums[i];
      }
      own[i] = T(args.symmetric ? d : d + a);
      other[i] = T(args.symmetric ? a + b : b);
    }, grain_of(4 * width));
  }

  // M of G rows in place of m, which holds ĝ_i·m̂_j, and of the symmetric normalization ĝ_j·m̂_i too, else `back`.
  template <bool Symmetric, int G>
  GKD_INLINE void weigh_rows(const Tile& t, const T* c, T* m, const T* back, int64_t r) const {
    const Terms<T>&high = args.log_sums.high, &low = args.log_sums.low;
    const int64_t i = t.i + r;
    for (int64_t x = 0; x < t.columns; x += N) {
      const int64_t j = t.j + x;
      Vec<T> w[2 * G];
      const Vec<T> log_sum = load(high.column + j), rest = load(low.column + j);
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        const Vec<T> exponents = this->exponents(c + (r + g) * stride + x);
        w[g] = (exponents - high.row[i + g] - low.row[i + g]) * T(0.5);
        w[G + g] = (exponents - log_sum - rest) * T(0.5);
      }
      exp2_nonpositive<T>(w);
      const Vec<T> own_column = load(own_terms.column + j), other_column = load(other_terms.column + j);
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        T* out = m + (r + g) * stride + x;
        const Vec<T> u = w[g], t = w[G + g], forth = load(out);
        const T own = own_terms.row[i + g], other = other_terms.row[i + g];
        Vec<T> weight;
        if constexpr (Symmetric) {
          weight = u * (t * (forth + (other + other_column)) + u * own) + t * t * own_column;
        } else {
          const Vec<T> behind = load(back + (r + g) * stride + x);
          weight = u * u * (forth + (own + other_column)) + t * t * (behind + (other + own_column));
        }
        store(out, args.inverse_variance * weight);
      }
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    const Sides<T>& sides = args.sides;
    T *m = tiles + worker * 3 * tile_elements(stride), *back = m + tile_elements(stride);
    const T* c = this->similarities_of(t, back + tile_elements(stride));
    auto multiply = [&](const T* rows, const Centre<T>& of_rows, const Operand<T>& columns, T* out, bool accumulate) {
      multiply_own_rows(t, worker, tile_rows, rows, static_cast<const T*>(nullptr), args.width, of_rows, columns, out,
                        stride, accumulate);
    };
    multiply(args.left.row, left_centre, right_columns, m, false);
    if (left_columns) multiply(args.right.row, right_centre, left_columns, args.symmetric ? m : back, args.symmetric);
    for_row_groups<2>(t.rows, [&]<int G>(int64_t r) {
      if (args.symmetric) weigh_rows<true, G>(t, c, m, back, r);
      else weigh_rows<false, G>(t, c, m, back, r);
    });
    add_to_rows(t, m, stride, values, sides.column_count, sides.dim, args.gradient);
    if (t.mirror) add_to_columns(t, m, stride, values, sides.row_count, sides.dim, args.gradient);
  }
};

template <class T>
void neighbor_gradient(const Host& host, const NeighborGradient<T>& args) {
  NeighborGradientTiles<T> op(host, args);
  walk(host, args.sides, op);
  add_centre(host, op.values, args.sides.row_count, args.sides.dim, args.gradient);
}

}  // namespace gkd::GKD_ISA
