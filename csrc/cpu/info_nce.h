// info_nce's tiles: U_ij = exp2(c_ij·scale − shift) of the students' rows and the teachers', summed by row and by column,
// and the weights w_ij = U_ij (a_i + b_j) − [i = j] own_i of both gradients, dS_i = Σ_j w_ij t_j and dT_j = Σ_i w_ij s_i. The
// product is not symmetric, but where blocks a and b meet in the symmetric walk, both tiles between them are made: so
// every row and every column is served in one order, by one worker at a time.
#pragma once
#include "tile.h"

namespace gkd::GKD_ISA {

template <class T>
struct InfoNceTiles {
  static constexpr int N = Lanes<T>::count;
  static constexpr int kGroup = 4;  // rows at a time

  const InfoNce<T>& args;
  Operand<T> students, teachers;
  Values<T> student_values, teacher_values;
  T *tiles, *partial;
  int64_t stride;

  // U under the row's shift, and with OwnShifts that under the column's.
  template <int G, bool OwnShifts>
  GKD_INLINE void exponentials(const Tile& t, const T* c, int64_t r, int64_t x, Vec<T> (&u)[G], Vec<T> (&v)[G]) const {
    const Vec<T> column_shift = OwnShifts ? load(args.column_shift + t.j + x) : Vec<T>{};
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Vec<T> logit = load(c + (r + g) * stride + x) * args.scale;
      u[g] = logit - (OwnShifts ? args.row_shift[t.i + r + g] : args.scale);
      if (OwnShifts) v[g] = logit - column_shift;
    }
    exp2_nonpositive<T>(u);
    if (OwnShifts) exp2_nonpositive<T>(v);
  }

  template <int G, bool OwnShifts>
  GKD_INLINE void add_rows(const Tile& t, const T* c, int64_t r, T* below) const {
    Vec<T> totals[G];
    for (int g = 0; g < G; ++g) totals[g] = Vec<T>{};
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> u[G], v[G], column = load(below + x);
      exponentials<G, OwnShifts>(t, c, r, x, u, v);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        totals[g] += x + N <= t.columns ? u[g] : keep<T>(u[g], t.columns - x);
        column += OwnShifts ? v[g] : u[g];
      }
      store(below + x, column);
    }
    for (int g = 0; g < G; ++g) args.row_sums[t.i + r + g] += sum<T>(totals[g]);
  }

  template <int G, bool OwnShifts>
  GKD_INLINE void weigh_rows(const Tile& t, T* c, int64_t r) const {
    for (int64_t x = 0; x < t.columns; x += N) {
      Vec<T> u[G], v[G];
      const Vec<T> b = load(args.column_factor + t.j + x);
      exponentials<G, OwnShifts>(t, c, r, x, u, v);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const T a = args.row_factor[t.i + r + g];
        store(c + (r + g) * stride + x, OwnShifts ? u[g] * a + v[g] * b : u[g] * (b + a));
      }
    }
  }

  void find_maxima(const Tile& t, const T* c) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      T& largest = args.row_maxima[t.i + r];
      for (int64_t x = 0; x < t.columns; ++x) {
        const T value = c[r * stride + x];
        if (value > largest) largest = value;
        if (value > args.column_maxima[t.j + x]) args.column_maxima[t.j + x] = value;
      }
    }
  }

  template <bool OwnShifts>
  void one_tile(const Tile& t, int64_t worker) const {
    T* c = tiles + worker * tile_elements(stride);
    const int64_t dim = args.sides.dim, count = args.sides.row_count;
    similarities(t, students, teachers, c, stride);
    if (args.row_maxima) return find_maxima(t, c);
    if (args.row_sums) {
      T* below = partial + worker * stride;
      for (int64_t r = 0; r < t.rows; ++r) {
        if (const int64_t x = own_column(t, r); x >= 0) args.own_products[t.i + r] = c[r * stride + x];
      }
      for (int64_t x = 0; x < stride; ++x) below[x] = 0;
      for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { add_rows<G, OwnShifts>(t, c, r, below); });
      for (int64_t x = 0; x < t.columns; ++x) args.column_sums[t.j + x] += below[x];
      return;
    }
    for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G, OwnShifts>(t, c, r); });
    for (int64_t r = 0; r < t.rows; ++r) {
      if (const int64_t own = own_column(t, r); own >= 0) c[r * stride + own] -= args.own[t.i + r];
    }
    if (args.gradients[0]) add_to_rows(t, c, stride, teacher_values, count, dim, args.gradients[0]);
    if (args.gradients[1]) add_to_columns(t, c, stride, student_values, count, dim, args.gradients[1]);
  }

  void both(const Tile& t, int64_t worker) const {
    if (args.row_shift) one_tile<true>(t, worker);
    else one_tile<false>(t, worker);
  }

  void tile(const Tile& t, int64_t worker) const {
    both(t, worker);
    if (!t.mirror) return;
    Tile other = t;
    other.i = t.j, other.rows = t.columns;
    other.j = t.i, other.columns = t.rows;
    other.diagonal = -t.diagonal;
    both(other, worker);
  }
};

template <class T>
void info_nce(const Host& host, const InfoNce<T>& args) {
  const Sides<T>& sides = args.sides;
  const int64_t stride = block_rows(host, sides.row_count), count = sides.row_count;
  InfoNceTiles<T> op{args,
                     rows_of(host, sides.rows, count, sides.dim, stride),
                     columns_of(host, sides.columns, count, sides.dim, stride),
                     values_of(host, args.gradients[1] ? sides.rows : nullptr, count, sides.dim, count),
                     values_of(host, args.gradients[0] ? sides.columns : nullptr, count, sides.dim, count),
                     allocate<T>(host, host.workers * tile_elements(stride)),
                     allocate<T>(host, host.workers * stride),
                     stride};
  walk(host, sides, op);
}

}  // namespace gkd::GKD_ISA
