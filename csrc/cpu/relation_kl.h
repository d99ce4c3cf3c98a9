// relation_kl's tiles. R_ij = exp((c_ij − 1)/σ²), R_ii = 0, and U_ij = exp(R_ij/τ − shift), computed in base 2.
// The shift is 1/τ ≥ R/τ for everybody (shared), or each row's own where that one could underflow: then a tile has
// a U for its rows and another, V, for its columns.
#pragma once
#include "centre.h"

namespace gkd::GKD_ISA {

template <class T>
constexpr T kLn2 = T(0.6931471805599453);
constexpr int kMostSums = 2;      // per stage
constexpr int kMostPairSums = 2;  // per pair

// Fixed: S = T = Fixed, known to the compiler, so that 1 lives in registers; 0: any S and T.
template <class T, bool Shared, int Fixed>
struct RelationTiles {
  static constexpr int N = Lanes<T>::count;
  static constexpr int kFixedStages = 2 * Fixed, kFixedPairs = Fixed * Fixed;
  static constexpr int kStages = Fixed ? kFixedStages : kMaxStages;
  static constexpr int kPairs = Fixed ? kFixedPairs : kMaxPairs;
  static constexpr int kGroup = GKD_VECTOR_BYTES == 64 ? 3 : 2;  // rows at a time

  // R, the exponents of U and V, and these, of all stages at one vector of G rows.
  template <int G>
  struct Relations {
    Vec<T> r[kStages][G], log_u[kStages][G], log_v[kStages][G], u[kStages][G], v[kStages][G];
    GKD_INLINE const Vec<T>& mirrored(int64_t q, int g) const { return Shared ? u[q][g] : v[q][g]; }
  };

  const RelationKl<T>& args;
  Operand<T> rows[kMaxStages], columns[kMaxStages];
  Values<T> values[kMaxStages];
  T inner_one;  // what the inner exponent's product is where rows coincide
  T* tiles;
  T* partial;  // column sums of one tile
  int64_t stride;
  int64_t step;
  bool known;  // R is read from args.affinities

  GKD_INLINE int64_t students() const { return Fixed ? Fixed : args.students; }
  GKD_INLINE int64_t teachers() const { return Fixed ? Fixed : args.teachers; }
  GKD_INLINE int64_t stages() const { return students() + teachers(); }
  GKD_INLINE int64_t pairs() const { return students() * teachers(); }
  GKD_INLINE T* tile_of(int64_t worker) const { return tiles + worker * stages() * tile_elements(stride); }
  // Where R is kept, or computed in place of the similarities: a tile per stage, `step` apart.
  GKD_INLINE T* affinities_of(const Tile& t, int64_t worker) const {
    return args.affinities ? args.affinities + t.place * stages() * step : tile_of(worker);
  }

  // The similarities of all stages, with the diagonal out of reach.
  GKD_INLINE void multiply_stages(const Tile& t, T* c) const {
    if (known) return;
    for (int64_t q = 0; q < stages(); ++q) {
      T* tile = c + q * step;
      similarities(t, rows[q], columns[q], tile, stride);
      put_own_columns_far(t, tile, stride);
    }
  }

  // Of the stages [first, first + Q) at row r and column x of the tile.
  template <int Q, int G>
  GKD_INLINE void relate(const Tile& t, T* c, int64_t r, int64_t x, int64_t first, Relations<G>& out) const {
    const T inner = args.inner, one = inner_one, outer = args.outer;
    Vec<T> w[Q * G], mirrored[Q * G];
    auto place = [&](int k) GKD_LAMBDA { return c + (first + k / G) * step + (r + k % G) * stride + x; };
#pragma GCC unroll 8
    for (int k = 0; k < Q * G; ++k) w[k] = load(place(k));
    if (!known) {
#pragma GCC unroll 8
      // Cosines can exceed 1 by roundings, and R/τ − 1/τ large.
      for (int k = 0; k < Q * G; ++k) w[k] = at_most<T>(w[k] * inner - one, 0);
      exp2_nonpositive<T>(w);
      if (args.affinities) {
#pragma GCC unroll 8
        for (int k = 0; k < Q * G; ++k) store(place(k), w[k]);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < Q * G; ++k) {
      const int64_t q = first + k / G;
      out.r[q][k % G] = w[k];
      if constexpr (Shared) {
        w[k] = w[k] * outer - outer;
      } else {
        mirrored[k] = w[k] * outer - load(args.shifts[q].column + t.j + x);
        w[k] = w[k] * outer - args.shifts[q].row[t.i + r + k % G];
        out.log_v[q][k % G] = mirrored[k];
      }
      out.log_u[q][k % G] = w[k];
    }
    if constexpr (Shared) {
      exp2_normal<T>(w);
    } else {
      exp2_nonpositive<T>(w);
      exp2_nonpositive<T>(mirrored);
    }
#pragma GCC unroll 8
    for (int k = 0; k < Q * G; ++k) {
      out.u[first + k / G][k % G] = w[k];
      if constexpr (!Shared) out.v[first + k / G][k % G] = mirrored[k];
    }
  }

  template <int G>
  GKD_INLINE void relations(const Tile& t, T* c, int64_t r, int64_t x, Relations<G>& out) const {
    constexpr int at_once = 2;
    repeat<Fixed>(stages() / at_once, [&](int64_t k) GKD_LAMBDA { relate<at_once>(t, c, r, x, k * at_once, out); });
    if (!Fixed && stages() % at_once) relate<1>(t, c, r, x, stages() - 1, out);
  }

  // What a stage or a pair adds to the sum of a row, and mirrored to that of a column.
  struct Summand {
    Vec<T> own, mirrored;
  };

  // Adds op's summands of G rows, Op::kSums per stage and Op::kPairSums per pair, to the rows' sums, and to `below` for
  // the columns.
  template <int G, class Op>
  GKD_INLINE void add_rows(const Op& op, const Tile& t, T* c, int64_t r, T* below) const {
    const int64_t count = args.stages[0].row_count, sums = Op::kSums * stages(), pair_sums = Op::kPairSums * pairs();
    constexpr int kFixedSums = Op::kSums * kFixedStages, kFixedPairSums = Op::kPairSums * kFixedPairs;
    Vec<T> stage_totals[Op::kSums * kStages][G], pair_totals[Op::kPairSums * kPairs][G];
    repeat<kFixedSums>(sums, [&](int64_t q) GKD_LAMBDA {
      for (int g = 0; g < G; ++g) stage_totals[q][g] = Vec<T>{};
    });
    repeat<kFixedPairSums>(pair_sums, [&](int64_t p) GKD_LAMBDA {
      for (int g = 0; g < G; ++g) pair_totals[p][g] = Vec<T>{};
    });
    for (int64_t x = 0; x < t.columns; x += N) {
      Relations<G> now;
      relations(t, c, r, x, now);
      const auto summands = op.template summands<G>(now, r, x);
      auto add = [&](Vec<T> (&totals)[G], T* column, auto summand) GKD_LAMBDA {
        Vec<T> mirrored = load(column + x);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const Summand now = summand(g);
          mirrored += now.mirrored;
          totals[g] += x + N <= t.columns ? now.own : keep<T>(now.own, t.columns - x);
        }
        store(column + x, mirrored);
      };
      repeat<kFixedSums>(sums, [&](int64_t q) GKD_LAMBDA {
        add(stage_totals[q], below + q * stride, [&](int g) GKD_LAMBDA { return summands.stage(q, g); });
      });
      repeat<kFixedPairSums>(pair_sums, [&](int64_t k) GKD_LAMBDA {
        const int64_t p = k / Op::kPairSums, which = k % Op::kPairSums;
        const int64_t s = p / teachers(), q = students() + p % teachers();
        add(pair_totals[k], below + (sums + k) * stride, [&](int g) GKD_LAMBDA { return summands.pair(s, q, g, which); });
      });
    }
    for (int g = 0; g < G; ++g) {
      const int64_t i = t.i + r + g;
      for (int64_t q = 0; q < sums; ++q) args.sums[q * count + i] += sum<T>(stage_totals[q][g]);
      for (int64_t p = 0; p < pair_sums; ++p) args.pair_sums[p * count + i] += sum<T>(pair_totals[p][g]);
    }
  }

  // The sums of a tile whose similarities are in c.
  template <class Op>
  GKD_INLINE void add_tile(const Op& op, const Tile& t, T* c, int64_t worker) const {
    const int64_t count = args.stages[0].row_count, sums = Op::kSums * stages();
    const int64_t all = sums + Op::kPairSums * pairs();
    T* below = partial + worker * (kMostSums * stages() + kMostPairSums * pairs()) * stride;
    for (int64_t x = 0; x < all * stride; ++x) below[x] = 0;
    for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { add_rows<G>(op, t, c, r, below); });
    if (!t.mirror) return;
    for (int64_t q = 0; q < all; ++q) {
      double* out = (q < sums ? args.sums + q * count : args.pair_sums + (q - sums) * count) + t.j;
      for (int64_t x = 0; x < t.columns; ++x) out[x] += below[q * stride + x];
    }
  }
};

// u (e^d − 1 − d) ≥ 0 with d = ln2·x and u e^d = v: for small x by its series, since of a student near its teacher the
// difference would be the roundings of u and v.
template <class T>
GKD_INLINE Vec<T> divergence(Vec<T> x, Vec<T> u, Vec<T> v) {
  // ln2^n/n!, n = 6 … 2: relative error 5e-7 below 0.35.
  constexpr T series[] = {T(0.000154035304), T(0.00133335581), T(0.00961812911), T(0.0555041087), T(0.240226507)};
  Vec<T> p = x * series[0] + series[1];
#pragma GCC unroll 3
  for (int term = 2; term < 5; ++term) p = p * x + series[term];
  const Vec<T> square = x * x;
  return square < T(0.35 * 0.35) ? u * (square * p) : v - u - u * (x * kLn2<T>);
}

// Z = Σ_j U_ij per stage, Q = Σ_j U^t_ij (log2 U^t_ij − log2 U^s_ij) per pair: of the exponents that U was made of, so that
// their roundings cancel in the losses. Divergences: after each Q also Σ_j [U^t_ij (log U^t_ij − log U^s_ij) − U^t_ij +
// U^s_ij], which keeps its digits where student and teacher are nearly alike.
template <class T, bool Shared, int Fixed, bool Divergences>
struct RelationForward : RelationTiles<T, Shared, Fixed> {
  using Tiles = RelationTiles<T, Shared, Fixed>;
  using Summand = typename Tiles::Summand;
  static constexpr int kSums = 1, kPairSums = Divergences ? 2 : 1;

  template <int G>
  struct Summands {
    const typename Tiles::template Relations<G>& now;

    GKD_INLINE Summand stage(int64_t q, int g) const { return {now.u[q][g], now.mirrored(q, g)}; }
    GKD_INLINE static Vec<T> summand(Vec<T> x, Vec<T> u, Vec<T> v, int64_t which) {
      if constexpr (Divergences) {
        if (which == 1) return divergence<T>(x, u, v);
      }
      return -u * x;
    }
    GKD_INLINE Summand pair(int64_t s, int64_t q, int g, int64_t which) const {
      const Vec<T> own = summand(now.log_u[s][g] - now.log_u[q][g], now.u[q][g], now.u[s][g], which);
      if constexpr (Shared) return {own, own};
      return {own, summand(now.log_v[s][g] - now.log_v[q][g], now.v[q][g], now.v[s][g], which)};
    }
  };

  template <int G>
  GKD_INLINE Summands<G> summands(const typename Tiles::template Relations<G>& now, int64_t, int64_t) const {
    return {now};
  }

  void tile(const Tile& t, int64_t worker) const {
    T* c = this->affinities_of(t, worker);
    this->multiply_stages(t, c);
    this->add_tile(*this, t, c, worker);
    for (int64_t q = 0; this->args.affinities && q < this->stages(); ++q) clear_beyond(t, c + q * this->step, this->stride);
  }
};

// Student: M^s = R^s [U^s (α_i + α_j) − Σ_t U^t (β_it + β_jt)], α = a/Z^s, β = g/Z^t.
// Teacher: M^t = R^t U^t Σ_s [β_is (Δ − h_is) + β_js (Δ − h_js)], Δ = log U^t/U^s, h = Σ_j P^t Δ = ℓ + log Z^t/Z^s.
// α and β hold 1/(σ²τ). Without a shared shift U is P of the row or the column, each with its own factors.
// Where one partner has most of a row's weight Δ − h is what two numbers up to 1/τ large leave. So Δ is made of the very
// exponents that the forward pass made h of, in base 2, and h, which all the row shares, is wide.
// dE_i = Σ_j M_ij e_j.
template <class T, bool Shared, int Fixed>
struct RelationBackward : RelationTiles<T, Shared, Fixed> {
  using Tiles = RelationTiles<T, Shared, Fixed>;
  using Tiles::N;

  // The factors of U, those of the row `at`, or of V, those of the columns from `at` on.
  template <bool Mirrored, int G>
  struct Side {
    const typename Tiles::template Relations<G>& now;
    int64_t at;
    int g;

    GKD_INLINE Vec<T> operator()(Terms<T> f) const {
      if constexpr (Mirrored) return load(f.column + at);
      return broadcast<T>(f.row[at]);
    }
    // (Δ − h)/ln2
    GKD_INLINE Vec<T> excess(int64_t s, int64_t q, const WideTerms<T>& level) const {
      constexpr bool of_v = Mirrored && !Shared;
      const Vec<T> difference =
          of_v ? now.log_v[q][g] - now.log_v[s][g] : now.log_u[q][g] - now.log_u[s][g];
      return difference - (*this)(level.high) - (*this)(level.low);
    }
  };

  // M of one stage at row r + g and column x.
  template <int G>
  struct Weights {
    const RelationBackward& op;
    const typename Tiles::template Relations<G>& now;
    int64_t i, j;

    // U_ij f(row) + V_ij f(column)
    template <class F>
    GKD_INLINE Vec<T> both(int64_t q, int g, const F& f) const {
      const Vec<T> own = f(Side<false, G>{now, i + g, g}), mirrored = f(Side<true, G>{now, j, g});
      if constexpr (Shared) return now.u[q][g] * (own + mirrored);
      return now.u[q][g] * own + now.v[q][g] * mirrored;
    }
    GKD_INLINE Vec<T> both(int64_t q, int g, Terms<T> f) const {
      return both(q, g, [&](const auto& side) GKD_LAMBDA { return side(f); });
    }

    GKD_INLINE Vec<T> student(int64_t s, int g) const {
      const int64_t S = op.students(), K = op.teachers();
      Vec<T> m = both(s, g, op.args.alpha[s]);
      repeat<Fixed>(K, [&](int64_t k) GKD_LAMBDA { m -= both(S + k, g, op.args.beta[s * K + k]); });
      return now.r[s][g] * m;
    }

    GKD_INLINE Vec<T> teacher(int64_t k, int g) const {
      const int64_t S = op.students(), K = op.teachers(), q = S + k;
      Vec<T> m{};
      repeat<Fixed>(S, [&](int64_t s) GKD_LAMBDA {
        const int64_t p = s * K + k;
        m += both(q, g, [&](const auto& side) GKD_LAMBDA {
          return side.excess(s, q, op.args.levels[p]) * side(op.args.beta[p]);
        });
      });
      return now.r[q][g] * kLn2<T> * m;
    }
  };

  // M of G rows, from their similarities or R.
  template <int G>
  GKD_INLINE void weigh_rows(const Tile& t, T* c, T* m, int64_t r) const {
    const int64_t stages = this->stages(), S = this->students();
    for (int64_t x = 0; x < t.columns; x += N) {
      typename Tiles::template Relations<G> now;
      this->relations(t, c, r, x, now);
      const Weights<G> weights{*this, now, t.i + r, t.j + x};
      repeat<Tiles::kFixedStages>(stages, [&](int64_t q) GKD_LAMBDA {
        if (!this->args.gradients[q]) return;
        T* out = m + q * tile_elements(this->stride) + r * this->stride + x;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          store(out + g * this->stride, q < S ? weights.student(q, g) : weights.teacher(q - S, g));
        }
      });
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    T *c = this->affinities_of(t, worker), *weights = this->tile_of(worker);
    this->multiply_stages(t, c);
    for_row_groups<Tiles::kGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G>(t, c, weights, r); });
    for (int64_t q = 0; q < this->stages(); ++q) {
      T* gradient = this->args.gradients[q];
      if (!gradient) continue;
      const Sides<T>& sides = this->args.stages[q];
      const T* m = weights + q * tile_elements(this->stride);
      add_to_rows(t, m, this->stride, this->values[q], sides.column_count, sides.dim, gradient);
      if (t.mirror) add_to_columns(t, m, this->stride, this->values[q], sides.row_count, sides.dim, gradient);
    }
  }
};

// The largest inner exponent, (c − 1) log2(e)/σ², of each row and column off the diagonal.
template <class T>
struct RowMaxima : RelationTiles<T, true, 0> {
  T* const* maxima;

  void tile(const Tile& t, int64_t worker) const {
    const int64_t stride = this->stride;
    T* c = this->tile_of(worker);
    this->multiply_stages(t, c);
    for (int64_t q = 0; q < this->stages(); ++q) {
      T* out = maxima[q];
      for (int64_t r = 0; r < t.rows; ++r) {
        const T* row = c + q * this->step + r * stride;
        for (int64_t x = 0; x < t.columns; ++x) {
          const T exponent = row[x] * this->args.inner - this->inner_one;
          if (exponent > out[t.i + r]) out[t.i + r] = exponent;
          if (t.mirror && exponent > out[t.j + x]) out[t.j + x] = exponent;
        }
      }
    }
  }
};

// Not `packs`: rows and columns are the caller's to pack.
template <class T, bool Shared, int Fixed>
RelationTiles<T, Shared, Fixed> relation_tiles(const Host& host, const RelationKl<T>& args, bool backward,
                                               bool packs = true) {
  const int64_t stages = args.students + args.teachers, pairs = args.students * args.teachers;
  const int64_t stride = block_rows(host, args.stages[0].row_count);
  const bool known = backward && args.affinities;
  RelationTiles<T, Shared, Fixed> tiles{args, {}, {}, {}, 0, nullptr, nullptr, stride,
                                         args.affinities ? stride * stride : tile_elements(stride), known};
  for (int64_t q = 0; q < stages; ++q) {
    const Sides<T>& sides = args.stages[q];
    const bool gathers = backward && args.gradients[q];
    if (known && !gathers) continue;
    const UnitSides<T> units(host, sides, stride, known || !packs);
    tiles.rows[q] = units.rows;
    tiles.columns[q] = units.columns;
    tiles.inner_one = units.one * args.inner;
    if (!gathers) continue;
    tiles.values[q] = values_of(host, sides.columns, sides.column_count, sides.dim, sides.row_count, units.centre);
  }
  tiles.tiles = allocate<T>(host, host.workers * stages * tile_elements(stride));
  if (!backward) tiles.partial = allocate<T>(host, host.workers * (kMostSums * stages + kMostPairSums * pairs) * stride);
  return tiles;
}

template <class T>
void relation_kl_maxima(const Host& host, const RelationKl<T>& args, T* const* maxima) {
  RowMaxima<T> op{relation_tiles<T, true, 0>(host, args, false), maxima};
  walk(host, args.stages[0], op);
}

// Calls f.operator()<Shared, Fixed>() as suits the arguments.
template <class T, class F>
void specialise(const RelationKl<T>& args, const F& f) {
  if (args.shifts[0].row) return f.template operator()<false, 0>();
  if (args.students == 1 && args.teachers == 1) return f.template operator()<true, 1>();
  return f.template operator()<true, 0>();
}

template <class T>
void relation_kl(const Host& host, const RelationKl<T>& args) {
  specialise(args, [&]<bool Shared, int Fixed>() {
    auto add = [&]<bool Divergences>() {
      RelationForward<T, Shared, Fixed, Divergences> op{relation_tiles<T, Shared, Fixed>(host, args, false)};
      walk(host, args.stages[0], op);
    };
    if constexpr (kRounds<T>) {
      if (args.divergences) return add.template operator()<true>();
    }
    add.template operator()<false>();
  });
}

template <class T>
void relation_kl_backward(const Host& host, const RelationKl<T>& args) {
  specialise(args, [&]<bool Shared, int Fixed>() {
    RelationBackward<T, Shared, Fixed> op{relation_tiles<T, Shared, Fixed>(host, args, true)};
    walk(host, args.stages[0], op);
    for (int64_t q = 0; q < op.stages(); ++q) {
      if (args.gradients[q]) add_centre(host, op.values[q], args.stages[q].row_count, args.stages[q].dim, args.gradients[q]);
    }
  });
}

}  // namespace gkd::GKD_ISA
