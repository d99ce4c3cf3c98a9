// row_dots: out_i += a_i·b_i, in double precision, rows in parallel.
#pragma once
#include "tile.h"

namespace gkd::GKD_ISA {

template <class T>
GKD_INLINE double wide_dot(const T* a, const T* b, int64_t count) {
  constexpr int N = Lanes<double>::count;
  using Values = typename Lanes<T>::ForDouble;
  Vec<double> total{};
  int64_t k = 0;
  for (; k + N <= count; k += N) {
    Values x, y;
    __builtin_memcpy(&x, a + k, sizeof(x));
    __builtin_memcpy(&y, b + k, sizeof(y));
    total += __builtin_convertvector(x, Vec<double>) * __builtin_convertvector(y, Vec<double>);
  }
  double rest = sum<double>(total);
  for (; k < count; ++k) rest += double(a[k]) * double(b[k]);
  return rest;
}

template <class T>
void row_dots(const Host& host, const RowDots<T>& args) {
  parallel(host, args.count, [&](int64_t i, int64_t) {
    args.out[i] += wide_dot(args.a + i * args.width, args.b + i * args.width, args.width);
  }, grain_of(args.width));
}

}  // namespace gkd::GKD_ISA
