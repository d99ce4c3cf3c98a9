// relation_kl's second order: along a direction of a stage its relations move at R˙_ij = R_ij ċ_ij/σ² and its U at
// U˙ = U R˙/τ. One pass for the tangents of the sums, another for those of the gradients.
#pragma once
#include "relation_kl.h"

namespace gkd::GKD_ISA {

// What the two passes share, on top of the tiles of the first order's Base.
template <class T, template <class, bool, int> class Base, bool Shared, int Fixed>
struct RelationTangentTiles : Base<T, Shared, Fixed> {
  using Tiles = RelationTiles<T, Shared, Fixed>;
  template <int G>
  using Relations = typename Tiles::template Relations<G>;

  const RelationKlTangent<T>& second;
  Operand<T> row_tangents[kMaxStages], column_tangents[kMaxStages];
  Values<T> tangent_values[kMaxStages];
  T* moving_tiles;
  int64_t moving_count;
  int64_t places[kMaxStages];  // of a moving stage's tile, or -1

  RelationTangentTiles(const Host& host, const RelationKlTangent<T>& second, bool backward)
      : Base<T, Shared, Fixed>{relation_tiles<T, Shared, Fixed>(host, second.relations, backward, false)},
        second(second), moving_count(0) {
    this->inner_one = 0;
    for (int64_t q = 0; q < this->stages(); ++q) {
      const Sides<T>& sides = this->args.stages[q];
      const Terms<T>& tangent = second.tangents[q];
      places[q] = tangent.row ? moving_count++ : -1;
      const CentredSides<T> units(host, sides, tangent, this->stride);
      this->rows[q] = units.rows;
      this->columns[q] = units.columns;
      row_tangents[q] = units.row_tangents;
      column_tangents[q] = units.column_tangents;
      if (!tangent.row) continue;
      if (!this->values[q]) continue;
      tangent_values[q] = values_of(host, tangent.column, sides.column_count, sides.dim, sides.row_count);
    }
    moving_tiles = allocate<T>(host, host.workers * moving_count * tile_elements(this->stride));
  }

  GKD_INLINE T* moving_tile(int64_t worker, int64_t q) const {
    return moving_tiles + (worker * moving_count + places[q]) * tile_elements(this->stride);
  }

  // The similarities of all stages and the tangents of the moving ones'.
  T* multiply_all(const Tile& t, int64_t worker) const {
    T* c = this->tile_of(worker);
    this->multiply_stages(t, c);
    for (int64_t q = 0; q < this->stages(); ++q) {
      if (places[q] < 0) continue;
      moving_similarities(t, this->rows[q], this->columns[q], row_tangents[q], column_tangents[q],
                          moving_tile(worker, q), this->stride);
    }
    return c;
  }

  // ċ/σ² and R˙ of all stages at one vector of G rows.
  template <int G>
  struct Rates {
    Vec<T> similarity[Tiles::kStages][G], relation[Tiles::kStages][G];
  };

  template <int G>
  GKD_INLINE void rates(const Relations<G>& now, int64_t worker, int64_t r, int64_t x, Rates<G>& out) const {
    repeat<Tiles::kFixedStages>(this->stages(), [&](int64_t q) GKD_LAMBDA {
      const T* tile = places[q] < 0 ? nullptr : moving_tile(worker, q) + r * this->stride + x;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        out.similarity[q][g] = tile ? load(tile + g * this->stride) * second.inverse_variance : Vec<T>{};
        out.relation[q][g] = now.r[q][g] * out.similarity[q][g];
      }
    });
  }
};

// Σ_j U R˙ and, after those of all stages, Σ_j U: a quotient of sums with the same roundings loses least where tangents
// cancel. Σ_j U^t [Δ R˙^t − R˙^s] per pair, Δ = log U^t/U^s.
template <class T, bool Shared, int Fixed>
struct RelationSumsTangent : RelationTangentTiles<T, RelationTiles, Shared, Fixed> {
  using All = RelationTangentTiles<T, RelationTiles, Shared, Fixed>;
  using Summand = typename All::Tiles::Summand;
  using All::All;

  template <int G>
  struct Summands {
    const typename All::template Relations<G>& now;
    int64_t stages;
    typename All::template Rates<G> rates;

    GKD_INLINE Summand both(int64_t q, int g, Vec<T> x) const { return {now.u[q][g] * x, now.mirrored(q, g) * x}; }
    GKD_INLINE Summand stage(int64_t q, int g) const {
      if (q >= stages) return {now.u[q - stages][g], now.mirrored(q - stages, g)};
      return both(q, g, rates.relation[q][g]);
    }
    GKD_INLINE Summand pair(int64_t s, int64_t q, int g, int64_t) const {
      auto summand = [&](const auto& logits, Vec<T> weight) GKD_LAMBDA {
        const Vec<T> difference = (logits[q][g] - logits[s][g]) * kLn2<T>;
        return weight * (difference * rates.relation[q][g] - rates.relation[s][g]);
      };
      const Vec<T> own = summand(now.log_u, now.u[q][g]);
      if constexpr (Shared) return {own, own};
      return {own, summand(now.log_v, now.v[q][g])};
    }
  };

  // An op of one worker's tile.
  struct Of {
    const RelationSumsTangent& all;
    int64_t worker;
    static constexpr int kSums = 2, kPairSums = 1;

    template <int G>
    GKD_INLINE Summands<G> summands(const typename All::template Relations<G>& now, int64_t r, int64_t x) const {
      Summands<G> out{now, all.stages(), {}};
      all.rates(now, worker, r, x, out.rates);
      return out;
    }
  };

  void tile(const Tile& t, int64_t worker) const {
    T* c = this->multiply_all(t, worker);
    this->add_tile(Of{*this, worker}, t, c, worker);
  }
};

// With X of M = R X (relation_kl.h), by the product rule  M˙ = (ċ/σ²) M + R X˙,  and α̇, β̇, ḣ the factors' tangents:
// Student: X˙^s = U^s [(α̇_i + α̇_j) + R˙^s/τ (α_i + α_j)] − Σ_t U^t [(β̇_it + β̇_jt) + R˙^t/τ (β_it + β_jt)].
// Teacher: X˙^t = U^t Σ_s [(Δ − h_is)(β̇_is + R˙^t/τ β_is) + ((R˙^t − R˙^s)/τ − ḣ_is) β_is] and as much of j.
// dE˙_i = Σ_j (M˙_ij e_j + M_ij ė_j).
template <class T, bool Shared, int Fixed>
struct RelationDoubleBackward : RelationTangentTiles<T, RelationBackward, Shared, Fixed> {
  using All = RelationTangentTiles<T, RelationBackward, Shared, Fixed>;
  using Tiles = typename All::Tiles;
  using All::All;

  template <int G>
  using Weights = typename RelationBackward<T, Shared, Fixed>::template Weights<G>;
  template <int G>
  using Rates = typename All::template Rates<G>;

  template <int G>
  GKD_INLINE Vec<T> student(const Weights<G>& weights, const Rates<G>& rates, int64_t s, int g) const {
    const RelationKl<T>& args = this->args;
    const int64_t S = this->students(), K = this->teachers();
    auto moved = [&](int64_t q, Terms<T> factor, Terms<T> tangent) GKD_LAMBDA {
      return weights.both(q, g, tangent) +
             weights.both(q, g, factor) * (rates.relation[q][g] * args.inverse_temperature);
    };
    Vec<T> x = moved(s, args.alpha[s], this->second.alpha[s]);
    repeat<Fixed>(K, [&](int64_t k) GKD_LAMBDA {
      x -= moved(S + k, args.beta[s * K + k], this->second.beta[s * K + k]);
    });
    return weights.now.r[s][g] * x;
  }

  template <int G>
  GKD_INLINE Vec<T> teacher(const Weights<G>& weights, const Rates<G>& rates, int64_t k, int g) const {
    const RelationKl<T>& args = this->args;
    const int64_t S = this->students(), K = this->teachers(), q = S + k;
    const Vec<T> own = rates.relation[q][g] * args.inverse_temperature;
    Vec<T> x{};
    repeat<Fixed>(S, [&](int64_t s) GKD_LAMBDA {
      const int64_t p = s * K + k;
      const Vec<T> rate = own - rates.relation[s][g] * args.inverse_temperature;
      x += weights.both(q, g, [&](const auto& side) GKD_LAMBDA {
        const Vec<T> beta = side(args.beta[p]);
        const WideTerms<T>& level = this->second.levels[p];
        return side.excess(s, q, args.levels[p]) * kLn2<T> * (side(this->second.beta[p]) + own * beta) +
               (rate - side(level.high) - side(level.low)) * beta;
      });
    });
    return weights.now.r[q][g] * x;
  }

  // Turns the similarities of G rows into M˙ and their tangents into M.
  template <int G>
  GKD_INLINE void move_rows(const Tile& t, T* c, int64_t worker, int64_t r) const {
    const int64_t S = this->students(), stride = this->stride;
    for (int64_t x = 0; x < t.columns; x += Tiles::N) {
      typename All::template Relations<G> now;
      Rates<G> rates;
      this->relations(t, c, r, x, now);
      this->rates(now, worker, r, x, rates);
      const Weights<G> weights{*this, now, t.i + r, t.j + x};
      repeat<Tiles::kFixedStages>(this->stages(), [&](int64_t q) GKD_LAMBDA {
        if (!this->args.gradients[q]) return;
        T* out = c + q * tile_elements(stride) + r * stride + x;
        T* first = this->places[q] < 0 ? nullptr : this->moving_tile(worker, q) + r * stride + x;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          Vec<T> m = q < S ? student(weights, rates, q, g) : teacher(weights, rates, q - S, g);
          if (first) {
            const Vec<T> still = q < S ? weights.student(q, g) : weights.teacher(q - S, g);
            m += rates.similarity[q][g] * still;
            store(first + g * stride, still);
          }
          store(out + g * stride, m);
        }
      });
    }
  }

  void tile(const Tile& t, int64_t worker) const {
    T* c = this->multiply_all(t, worker);
    for_row_groups<Tiles::kGroup>(t.rows, [&]<int G>(int64_t r) { move_rows<G>(t, c, worker, r); });
    for (int64_t q = 0; q < this->stages(); ++q) {
      if (!this->args.gradients[q]) continue;
      gather(t, q, c + q * tile_elements(this->stride), this->values[q]);
      if (this->places[q] >= 0) gather(t, q, this->moving_tile(worker, q), this->tangent_values[q]);
    }
  }

  void gather(const Tile& t, int64_t q, const T* m, const Values<T>& values) const {
    const Sides<T>& sides = this->args.stages[q];
    T* gradient = this->args.gradients[q];
    add_to_rows(t, m, this->stride, values, sides.column_count, sides.dim, gradient);
    if (t.mirror) add_to_columns(t, m, this->stride, values, sides.row_count, sides.dim, gradient);
  }
};

template <class T>
void relation_kl_tangent(const Host& host, const RelationKlTangent<T>& args) {
  specialise(args.relations, [&]<bool Shared, int Fixed>() {
    RelationSumsTangent<T, Shared, Fixed> op(host, args, false);
    walk(host, args.relations.stages[0], op);
  });
}

template <class T>
void relation_kl_double_backward(const Host& host, const RelationKlTangent<T>& args) {
  specialise(args.relations, [&]<bool Shared, int Fixed>() {
    RelationDoubleBackward<T, Shared, Fixed> op(host, args, true);
    walk(host, args.relations.stages[0], op);
  });
}

}  // namespace gkd::GKD_ISA
