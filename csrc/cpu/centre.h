// Rows that are multiplied in bfloat16 are rounded less their mean, see Centre; what follows from it.
#pragma once
#include "row_dots.h"
#include "tile.h"

namespace gkd::GKD_ISA {

// The mean of the rows x·factor, without zero rows where these have no share in it: so x̂ is 0 on average, and what weights
// that are all alike are rounded by alike does not matter. It depends on no number of threads.
template <class T>
T* mean_row(const Host& host, const T* rows, int64_t count, int64_t dim, const T* factors, bool counts_zeros) {
  const int64_t part = larger(64, ceil_div(count, 64)), parts = ceil_div(count, part);
  T *sums = allocate<T>(host, parts * dim), *mean = allocate<T>(host, dim);
  int64_t *counts = cleared<int64_t>(host, parts), all = 0;
  parallel(host, parts, [&](int64_t p, int64_t) {
    T* sum = sums + p * dim;
    for (int64_t k = 0; k < dim; ++k) sum[k] = 0;
    for (int64_t i = p * part; i < smaller(count, (p + 1) * part); ++i) {
      const T *x = rows + i * dim, factor = factors ? factors[i] : T(1);
      for (int64_t k = 0; k < dim; ++k) sum[k] += x[k] * factor;
      counts[p] += counts_zeros || wide_dot(x, x, dim) != 0;
    }
  }, grain_of(part * dim));
  for (int64_t p = 0; p < parts; ++p) all += counts[p];
  for (int64_t k = 0; k < dim; ++k) {
    double total = 0;
    for (int64_t p = 0; p < parts; ++p) total += sums[p * dim + k];
    mean[k] = T(total / larger(1, all));
  }
  return mean;
}

template <class T>
T* unit_mean(const Host& host, const T* rows, int64_t count, int64_t dim) {
  return mean_row<T>(host, rows, count, dim, nullptr, false);
}

// A centre for any rows: their mean. None where they are not rounded.
template <class T>
Centre<T> centre_of(const Host& host, const T* rows, int64_t count, int64_t dim, const T* factors = nullptr) {
  if (!rounds<T>(host) || !rows) return {};
  return {mean_row(host, rows, count, dim, factors, true), nullptr, nullptr};
}

// The rows as products of rows about their centre take them, with the centre added again: these rows where none is.
template <class T>
const T* rounded_rows(const Host& host, const T* rows, int64_t count, int64_t dim, const Centre<T>& centre) {
  if (!centre.row || !rows) return rows;
  T* out = allocate<T>(host, count * dim);
  if constexpr (kRounds<T>) {
    parallel(host, count, [&](int64_t i, int64_t) {
      const T* x = rows + i * dim;
      T* y = out + i * dim;
      for (int64_t k = 0; k < dim; ++k) y[k] = value_of(nearest(x[k] - centre.row[k])) + centre.row[k];
    }, grain_of(dim));
  }
  return out;
}

// The centre `mean` for these unit rows, with the halves of their squares; zero rows have no share in it.
template <class T>
Centre<T> unit_centre(const Host& host, const T* mean, const T* rows, int64_t count, int64_t dim) {
  T *shares = cleared<T>(host, count), *halves = allocate<T>(host, count);
  const Centre<T> centre{mean, shares, halves};
  if constexpr (kRounds<T>) {
    parallel(host, count, [&](int64_t i, int64_t) {
      shares[i] = wide_dot(rows + i * dim, rows + i * dim, dim) < 0.5 ? 0 : 1;
      halves[i] = rounded_square(Row(rows, nullptr, centre, i, dim), dim) / 2;
    }, grain_of(dim));
  }
  return centre;
}

// The unit rows of both sides as operands of tiles: of cosines, or where they are rounded of cosines less 1.
template <class T>
struct UnitSides {
  Operand<T> rows, columns;
  Centre<T> centre;  // of the columns
  T one;             // what a cosine of 1 is in a tile

  // `known`: nothing is multiplied. The centre of both sides is the mean of the columns, or of `others`, so that a pass in
  // which the sides change places rounds as the one before it.
  UnitSides(const Host& host, const Sides<T>& sides, int64_t block, bool known = false, const T* others = nullptr,
            int64_t other_count = 0)
      : rows{}, columns{}, centre{}, one(rounds<T>(host) ? 0 : 1) {
    Centre<T> of_rows{};
    if (rounds<T>(host)) {
      const T* mean = unit_mean(host, others ? others : sides.columns, others ? other_count : sides.column_count, sides.dim);
      of_rows = centre = unit_centre(host, mean, sides.columns, sides.column_count, sides.dim);
      if (!sides.symmetric && !known) of_rows = unit_centre(host, mean, sides.rows, sides.row_count, sides.dim);
    }
    if (known) return;
    rows = rows_of(host, sides.rows, sides.row_count, sides.dim, block, of_rows);
    columns = columns_of(host, sides.columns, sides.column_count, sides.dim, block, centre);
  }
};

// The unit rows of both sides and their directions as operands, in their own type, of tiles of cosines less 1 and of the
// cosines' tangents. Of rows that are nearly alike a cosine keeps few digits in float32 and its tangent fewer, since
// directions are orthogonal to all rows alike. With x̂ = x − m, m the mean of the columns, h = ‖x̂‖²/2 and a = ẋ·m
//   c_ij − 1 = [x̂_i, −h_i, 1]·[x̂_j, 1, −h_j]
//   ċ_ij = [ẋ_i, a_i, 0]·[x̂_j, 1, −h_j] + [x̂_i, −h_i, 1]·[ẋ_j, 0, a_j].
// Of a zero row x̂ = −m and h = (‖m‖² + 1)/2.
template <class T>
struct CentredSides {
  Operand<T> rows, columns, row_tangents, column_tangents;

  // What stands still has no tangent.
  CentredSides(const Host& host, const Sides<T>& sides, const Terms<T>& tangents, int64_t block)
      : rows{}, columns{}, row_tangents{}, column_tangents{} {
    const T* mean = unit_mean(host, sides.columns, sides.column_count, sides.dim);
    const int64_t scratch = block * (sides.dim + 2);
    T* memory = allocate<T>(host, host.workers * scratch);
    auto packed = [&](const T* given, int64_t count, bool moves, bool as_columns) {
      const int64_t dim = sides.dim, depth = dim + 2, blocks = ceil_div(count, block);
      Operand<T> out{};
      if (!given) return out;
      const int64_t elements =
          as_columns ? packed_columns<T>(count, depth) : blocks * round_up(block, kMicroRows) * depth;
      out = {allocate<T>(host, elements), nullptr, depth};
      parallel(host, blocks, [&](int64_t p, int64_t worker) {
        T* wide = memory + worker * scratch;
        const int64_t begin = p * block, rows = smaller(count, begin + block) - begin;
        for (int64_t r = 0; r < rows; ++r) {
          const T* x = given + (begin + r) * dim;
          T *y = wide + r * depth, *own = y + dim + as_columns, *other = y + dim + !as_columns;
          for (int64_t k = 0; k < dim; ++k) y[k] = moves ? x[k] : x[k] - mean[k];
          const bool is_zero = !moves && wide_dot(x, x, dim) < 0.5;
          *own = T(moves ? wide_dot(x, mean, dim) : -(wide_dot(y, y, dim) + is_zero) / 2);
          *other = moves ? T(0) : T(1);
        }
        if (as_columns) return pack_columns<T>(wide, nullptr, 0, rows, depth, out.own + begin * depth);
        pack_rows<T>(wide, nullptr, 0, rows, depth, out.own + p * round_up(block, kMicroRows) * depth);
      }, grain_of(block * depth));
      return out;
    };
    rows = packed(sides.rows, sides.row_count, false, false);
    columns = packed(sides.columns, sides.column_count, false, true);
    row_tangents = packed(tangents.row, sides.row_count, true, false);
    column_tangents = packed(tangents.column, sides.column_count, true, true);
  }
};

// The rows of a matrix times the row `other`, each times its factor, are added to out.
template <class T>
void add_dots(const Host& host, const T* rows, const T* factors, const T* other, int64_t count, int64_t dim, double* out) {
  parallel(host, count, [&](int64_t i, int64_t) {
    out[i] += wide_dot(rows + i * dim, other, dim) * (factors ? double(factors[i]) : 1.0);
  }, grain_of(dim));
}

// The centre's part of what weights·values gave: out_i += sums_i·centre.
template <class T>
void add_centre(const Host& host, const Values<T>& values, int64_t count, int64_t dim, T* out) {
  if (!values.sums) return;
  parallel(host, count, [&](int64_t i, int64_t) {
    const T total = T(values.sums[i]);
    for (int64_t k = 0; k < dim; ++k) out[i * dim + k] += total * values.centre.row[k];
  }, grain_of(dim));
}

}  // namespace gkd::GKD_ISA
