// relation_kl's tiles. Base-2 logits l = R·log2(e)/τ with R_ij = exp((c_ij − 1)/σ²), R_ii = 0, and U = 2^(l − shift).
// The shift is log2(e)/τ ≥ l for everybody (Shared), or each row's own where that one could underflow: then a tile has
// a U for its rows and another for its columns.
#pragma once
#include "tile.h"

namespace gkd::GKD_ISA {

// A similarity that the exponential turns into R = 0.
template <class T>
constexpr T kFar = T(-1e30);

// The rows of logits and weights of all stages for one row of the tile.
template <class T>
struct StageRows {
  T* logits;   // [stage][stride]
  T* weights;  // [stage][stride], U of the row
  T* mirrored; // [stage][stride], U of the columns; the same memory when the shift is shared
};

// l and U of one row of one stage; c is overwritten with R.
template <class T, bool Shared>
GKD_INLINE void stage_row(const RelationKl<T>& args, int64_t stage, const Tile& t, int64_t r, T* c, T* logits,
                          T* weights, T* mirrored) {
  constexpr int N = Lanes<T>::count;
  const int64_t own = own_column(t, r);
  if (own >= 0) c[own] = kFar<T>;
  const T inner = args.inner, outer = args.outer;
  T shift = outer;
  if constexpr (!Shared) shift = T(args.shifts[stage].row[t.i + r]);
  for (int64_t x = 0; x < t.columns; x += N) {
    const Vec<T> relation = exp2_nonpositive<T>((load(c + x) - T(1)) * inner);
    store(c + x, relation);
    if constexpr (Shared) {
      store(weights + x, exp2_nonpositive<T>(relation * outer - shift));
      store(logits + x, relation * outer);
    } else {
      const Vec<T> l = relation * outer;
      Vec<T> column_shift;
      for (int k = 0; k < N; ++k) column_shift[k] = T(args.shifts[stage].column[t.j + x + k]);
      store(logits + x, l);
      store(weights + x, exp2_nonpositive<T>(l - shift));
      store(mirrored + x, exp2_nonpositive<T>(l - column_shift));
    }
  }
}

template <class T>
struct RelationTiles {
  const RelationKl<T>& args;
  const T* columns[kMaxStages];
  const T* values[kMaxStages];
  T *tiles, *rows;
  T* partial;  // column sums of one tile, per stage and pair
  int64_t stride, stages, pairs;

  void multiply_stages(const Tile& t, T* c) {
    for (int64_t q = 0; q < stages; ++q) {
      similarities(t, args.stages[q].rows, columns[q], args.stages[q].dim, c + q * tile_elements(stride), stride);
    }
  }

  T* tile_of(int64_t worker) { return tiles + worker * stages * tile_elements(stride); }
  StageRows<T> rows_of(int64_t worker) {
    T* base = rows + worker * 3 * stages * stride;
    return {base, base + stages * stride, base + 2 * stages * stride};
  }
};

// Z = Σ_j U_ij per stage, Q = Σ_j U^t_ij (l^t_ij − l^s_ij) per pair.
template <class T, bool Shared>
struct RelationForward : RelationTiles<T> {
  void tile(const Tile& t, int64_t worker) {
    constexpr int N = Lanes<T>::count;
    const RelationKl<T>& args = this->args;
    const int64_t stride = this->stride, stages = this->stages, S = args.students, count = args.stages[0].row_count;
    T* c = this->tile_of(worker);
    const StageRows<T> rows = this->rows_of(worker);
    T* below = this->partial + worker * (stages + this->pairs) * stride;
    for (int64_t x = 0; x < (stages + this->pairs) * stride; ++x) below[x] = 0;
    this->multiply_stages(t, c);
    for (int64_t r = 0; r < t.rows; ++r) {
      for (int64_t q = 0; q < stages; ++q) {
        T* u = rows.weights + q * stride;
        T* v = Shared ? u : rows.mirrored + q * stride;
        stage_row<T, Shared>(args, q, t, r, c + q * tile_elements(stride) + r * stride, rows.logits + q * stride, u, v);
        T* column = below + q * stride;
        Vec<T> total{};
        for (int64_t x = 0; x < t.columns; x += N) {
          total += x + N <= t.columns ? load(u + x) : keep<T>(load(u + x), t.columns - x);
          store(column + x, load(column + x) + load(v + x));
        }
        args.sums[q * count + t.i + r] += sum<T>(total);
      }
      for (int64_t p = 0; p < this->pairs; ++p) {
        const int64_t s = p / args.teachers, q = S + p % args.teachers;
        const T *student = rows.logits + s * stride, *teacher = rows.logits + q * stride;
        const T *u = rows.weights + q * stride, *v = Shared ? u : rows.mirrored + q * stride;
        T* column = below + (stages + p) * stride;
        Vec<T> total{};
        for (int64_t x = 0; x < t.columns; x += N) {
          const Vec<T> difference = load(teacher + x) - load(student + x);
          const Vec<T> term = load(u + x) * difference;
          total += x + N <= t.columns ? term : keep<T>(term, t.columns - x);
          store(column + x, load(column + x) + (Shared ? term : load(v + x) * difference));
        }
        args.pair_sums[p * count + t.i + r] += sum<T>(total);
      }
    }
    if (!t.mirror) return;
    for (int64_t q = 0; q < stages + this->pairs; ++q) {
      double* out = q < stages ? args.sums + q * count : args.pair_sums + (q - stages) * count;
      for (int64_t x = 0; x < t.columns; ++x) out[t.j + x] += below[q * stride + x];
    }
  }
};

// Student: M^s = R^s/(σ²τ) [U^s (α_i + α_j) − Σ_t U^t (β_it + β_jt)], α = a/Z^s, β = g/Z^t.
// Teacher: M^t = R^t/(σ²τ) U^t [Σ_s (L^t − L^s)(β_is + β_js) − (η_i + η_j)], η = Σ_s β_s (ℓ_s + log Z^t/Z^s).
// Without a shared shift U is P of the row or the column, each with its own factor. dE_i = Σ_j M_ij e_j.
template <class T, bool Shared>
struct RelationBackward : RelationTiles<T> {
  // U_ij·f_i + U_ji·f_j
  static GKD_INLINE Vec<T> both(const T* u, const T* v, Terms<T> f, int64_t i, int64_t j, int64_t x) {
    const Vec<T> own = broadcast(f.row[i]), other = load(f.column + j + x);
    if constexpr (Shared) return load(u + x) * (own + other);
    return load(u + x) * own + load(v + x) * other;
  }

  void student_row(const Tile& t, int64_t r, int64_t s, const StageRows<T>& rows, T* relation) {
    const RelationKl<T>& args = this->args;
    const int64_t stride = this->stride;
    for (int64_t x = 0; x < t.columns; x += Lanes<T>::count) {
      Vec<T> m = both(rows.weights + s * stride, rows.mirrored + s * stride, args.alpha[s], t.i + r, t.j, x);
      for (int64_t k = 0; k < args.teachers; ++k) {
        const int64_t q = args.students + k;
        m -= both(rows.weights + q * stride, rows.mirrored + q * stride, args.beta[s * args.teachers + k], t.i + r, t.j,
                  x);
      }
      store(relation + x, load(relation + x) * args.scale * m);
    }
  }

  void teacher_row(const Tile& t, int64_t r, int64_t k, const StageRows<T>& rows, T* relation) {
    const RelationKl<T>& args = this->args;
    const int64_t stride = this->stride, q = args.students + k;
    const T *u = rows.weights + q * stride, *v = rows.mirrored + q * stride;
    for (int64_t x = 0; x < t.columns; x += Lanes<T>::count) {
      Vec<T> m = -both(u, v, args.eta[k], t.i + r, t.j, x);
      for (int64_t s = 0; s < args.students; ++s) {
        const Vec<T> difference = (load(rows.logits + q * stride + x) - load(rows.logits + s * stride + x)) * kLn2;
        m += difference * both(u, v, args.beta[s * args.teachers + k], t.i + r, t.j, x);
      }
      store(relation + x, load(relation + x) * args.scale * m);
    }
  }

  void tile(const Tile& t, int64_t worker) {
    const RelationKl<T>& args = this->args;
    const int64_t stride = this->stride;
    T* c = this->tile_of(worker);
    const StageRows<T> rows = this->rows_of(worker);
    this->multiply_stages(t, c);
    for (int64_t r = 0; r < t.rows; ++r) {
      for (int64_t q = 0; q < this->stages; ++q) {
        stage_row<T, Shared>(args, q, t, r, c + q * tile_elements(stride) + r * stride, rows.logits + q * stride,
                             rows.weights + q * stride, rows.mirrored + q * stride);
      }
      for (int64_t q = 0; q < this->stages; ++q) {
        if (!args.gradients[q]) continue;
        T* relation = c + q * tile_elements(stride) + r * stride;
        if (q < args.students) {
          student_row(t, r, q, rows, relation);
        } else {
          teacher_row(t, r, q - args.students, rows, relation);
        }
      }
    }
    for (int64_t q = 0; q < this->stages; ++q) {
      if (!args.gradients[q]) continue;
      const Sides<T>& sides = args.stages[q];
      const T* m = c + q * tile_elements(stride);
      add_to_rows(t, m, stride, this->values[q], sides.column_count, sides.dim, args.gradients[q]);
      if (t.mirror) add_to_columns(t, m, stride, this->values[q], sides.row_count, sides.dim, args.gradients[q]);
    }
  }

  static constexpr T kLn2 = T(0.6931471805599453);
};

template <class T>
struct RowMaxima : RelationTiles<T> {
  T* const* maxima;

  // The largest similarity of each row and column off the diagonal.
  void tile(const Tile& t, int64_t worker) {
    T* c = this->tile_of(worker);
    this->multiply_stages(t, c);
    for (int64_t q = 0; q < this->stages; ++q) {
      T* out = maxima[q];
      for (int64_t r = 0; r < t.rows; ++r) {
        const T* row = c + q * tile_elements(this->stride) + r * this->stride;
        const int64_t own = own_column(t, r);
        for (int64_t x = 0; x < t.columns; ++x) {
          if (x == own) continue;
          if (row[x] > out[t.i + r]) out[t.i + r] = row[x];
          if (t.mirror && row[x] > out[t.j + x]) out[t.j + x] = row[x];
        }
      }
    }
  }
};

template <class T>
RelationTiles<T> relation_tiles(const Host& host, const RelationKl<T>& args, bool backward) {
  const int64_t stages = args.students + args.teachers, pairs = args.students * args.teachers;
  const int64_t stride = block_rows(host, args.stages[0].row_count);
  RelationTiles<T> op{args, {}, {}, nullptr, nullptr, nullptr, stride, stages, pairs};
  for (int64_t q = 0; q < stages; ++q) {
    const Sides<T>& sides = args.stages[q];
    op.columns[q] = columns_of(host, sides.columns, sides.column_count, sides.dim);
    if (backward && args.gradients[q]) op.values[q] = values_of(host, sides.columns, sides.column_count, sides.dim);
  }
  op.tiles = allocate<T>(host, host.workers * stages * tile_elements(stride));
  op.rows = allocate<T>(host, host.workers * 3 * stages * stride);
  op.partial = backward ? nullptr : allocate<T>(host, host.workers * (stages + pairs) * stride);
  return op;
}

template <class T>
void relation_kl_maxima(const Host& host, const RelationKl<T>& args, T* const* maxima) {
  RowMaxima<T> op{relation_tiles(host, args, false), maxima};
  walk(host, args.stages[0], op);
}

template <class T>
void relation_kl(const Host& host, const RelationKl<T>& args) {
  if (args.shifts[0].row) {
    RelationForward<T, false> op{relation_tiles(host, args, false)};
    walk(host, args.stages[0], op);
  } else {
    RelationForward<T, true> op{relation_tiles(host, args, false)};
    walk(host, args.stages[0], op);
  }
}

template <class T>
void relation_kl_backward(const Host& host, const RelationKl<T>& args) {
  if (args.shifts[0].row) {
    RelationBackward<T, false> op{relation_tiles(host, args, true)};
    walk(host, args.stages[0], op);
  } else {
    RelationBackward<T, true> op{relation_tiles(host, args, true)};
    walk(host, args.stages[0], op);
  }
}

}  // namespace gkd::GKD_ISA
