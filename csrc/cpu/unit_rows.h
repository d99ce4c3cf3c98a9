// unit_rows: e = x/‖x‖ and its gradient dx = (g − e (e·g))/‖x‖, rows in parallel.
#pragma once
#include "tile.h"

namespace gkd::GKD_ISA {

constexpr int64_t kRowsPerTask = 64;

// Below this largest entry, √(smallest normal number), a row counts as zero.
template <class T>
constexpr T kZeroRow = sizeof(T) == 4 ? T(1.0842021724855044e-19) : T(1.4916681462400413e-154);

template <class T>
GKD_INLINE T dot(const T* a, const T* b, int64_t count) {
  constexpr int N = Lanes<T>::count;
  Vec<T> total{};
  int64_t k = 0;
  for (; k + N <= count; k += N) total += load(a + k) * load(b + k);
  T rest = sum<T>(total);
  for (; k < count; ++k) rest += a[k] * b[k];
  return rest;
}

// The largest |x_k|; a NaN is dropped by a number that comes after it.
template <class T>
GKD_INLINE T largest_entry(const T* x, int64_t count) {
  constexpr int N = Lanes<T>::count;
  Vec<T> lanes{};
  int64_t k = 0;
  for (; k + N <= count; k += N) {
    const Vec<T> v = load(x + k), size = v < 0 ? -v : v;
    lanes = size <= lanes ? lanes : size;
  }
  T largest = 0;
  for (int n = 0; n < N; ++n) largest = lanes[n] <= largest ? largest : lanes[n];
  for (; k < count; ++k) {
    const T size = x[k] < 0 ? -x[k] : x[k];
    largest = size <= largest ? largest : size;
  }
  return largest;
}

template <class T>
void unit_row(const T* x, int64_t dim, T* unit, T* inverse_norm) {
  const T largest = largest_entry(x, dim);
  if (largest < kZeroRow<T>) {
    T total = 0;
    for (int64_t k = 0; k < dim; ++k) total += unit[k] = x[k] * 0;
    *inverse_norm = total;
    return;
  }
  // The largest entry is divided out first, so that no square over- or underflows.
  for (int64_t k = 0; k < dim; ++k) unit[k] = x[k] / largest;
  const T norm = __builtin_sqrt(dot(unit, unit, dim));
  for (int64_t k = 0; k < dim; ++k) unit[k] /= norm;
  *inverse_norm = 1 / norm / largest;
}

template <class T>
void unit_rows(const Host& host, const UnitRows<T>& args) {
  parallel(host, ceil_div(args.count, kRowsPerTask), [&](int64_t task, int64_t) {
    for (int64_t i = task * kRowsPerTask; i < smaller(args.count, (task + 1) * kRowsPerTask); ++i) {
      unit_row(args.rows + i * args.dim, args.dim, args.unit + i * args.dim, args.inverse_norms + i);
    }
  }, grain_of(kRowsPerTask * args.dim));
}

template <class T>
void unit_rows_backward(const Host& host, const UnitRowsBackward<T>& args) {
  parallel(host, ceil_div(args.count, kRowsPerTask), [&](int64_t task, int64_t) {
    for (int64_t i = task * kRowsPerTask; i < smaller(args.count, (task + 1) * kRowsPerTask); ++i) {
      const T *g = args.upstream + i * args.dim, *e = args.unit + i * args.dim;
      const T along = dot(e, g, args.dim), inverse = args.inverse_norms[i];
      for (int64_t k = 0; k < args.dim; ++k) args.gradient[i * args.dim + k] = (g[k] - e[k] * along) * inverse;
    }
  }, grain_of(kRowsPerTask * args.dim));
}

}  // namespace gkd::GKD_ISA
