// Vectors of the instruction set that the including source is compiled for, through the compilers' own vector types,
// so that one text serves every processor.
#pragma once
#include <cstdint>

#ifndef GKD_ISA
#error "include this from a source that defines GKD_ISA and GKD_VECTOR_BYTES"
#endif

#define GKD_INLINE inline __attribute__((always_inline))

namespace gkd::GKD_ISA {

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = float __attribute__((vector_size(GKD_VECTOR_BYTES)));
  using Unaligned = float __attribute__((vector_size(GKD_VECTOR_BYTES), aligned(4), may_alias));
  using Integers = int32_t __attribute__((vector_size(GKD_VECTOR_BYTES)));
  static constexpr int count = GKD_VECTOR_BYTES / 4;
  static constexpr int mantissa = 23;
  static constexpr float lowest_exponent = -127.0f;
  static constexpr float round = 12582912.0f + 127.0f;  // 1.5·2^23 + exponent bias
};

template <>
struct Lanes<double> {
  using Vector = double __attribute__((vector_size(GKD_VECTOR_BYTES)));
  using Unaligned = double __attribute__((vector_size(GKD_VECTOR_BYTES), aligned(8), may_alias));
  using Integers = int64_t __attribute__((vector_size(GKD_VECTOR_BYTES)));
  static constexpr int count = GKD_VECTOR_BYTES / 8;
  static constexpr int mantissa = 52;
  static constexpr double lowest_exponent = -1023.0;
  static constexpr double round = 6755399441055744.0 + 1023.0;  // 1.5·2^52 + exponent bias
};

template <class T>
using Vec = typename Lanes<T>::Vector;

template <class T>
GKD_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class T>
GKD_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}

template <class T>
GKD_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// 0 for the lanes from `valid` on, which lie beyond the matrix.
template <class T>
GKD_INLINE Vec<T> keep(Vec<T> v, int64_t valid) {
  Vec<T> kept = v;
  for (int k = 0; k < Lanes<T>::count; ++k) kept[k] = k < valid ? v[k] : T(0);
  return kept;
}

template <class T>
GKD_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int k = 0; k < Lanes<T>::count; ++k) total += v[k];
  return total;
}

// v, but not below `bound`; NaN stays NaN.
template <class T>
GKD_INLINE Vec<T> at_least(Vec<T> v, T bound) {
  const Vec<T> bounds = broadcast<T>(bound);
  return bounds > v ? bounds : v;
}

// 2^f for f in [-1/2, 1/2], 1 at 0: relative error 9e-8 (minimax) resp. 2e-16 (series).
GKD_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = broadcast(0.0013264727252429581f);
  p = p * f + 0.009671512785774137f;
  p = p * f + 0.05550733744471675f;
  p = p * f + 0.2402224208311185f;
  p = p * f + 0.693146977597677f;
  return p * f + 1.0f;
}

GKD_INLINE Vec<double> exp2_fraction(Vec<double> f) {
  // (ln 2)^k / k!
  constexpr double series[] = {
      0.6931471805599453,    0.2402265069591007,    0.055504108664821576,  0.009618129107628477,
      0.0013333558146428441, 0.00015403530393381606, 1.5252733804059838e-05, 1.3215486790144305e-06,
      1.0178086009239696e-07, 7.054911620801121e-09, 4.44553827187081e-10, 2.5678435993488196e-11,
      1.3691488853904124e-12};
  Vec<double> p = broadcast(series[12]);
#pragma GCC unroll 16
  for (int k = 11; k >= 0; --k) p = p * f + series[k];
  return p * f + 1.0;
}

// 2^v for v ≤ 0, 0 below the normal numbers; NaN stays NaN: the scale is multiplied, not added to the exponent's bits.
template <class T>
GKD_INLINE Vec<T> exp2_nonpositive(Vec<T> v) {
  using I = typename Lanes<T>::Integers;
  v = at_least<T>(v, Lanes<T>::lowest_exponent);
  const Vec<T> rounded = v + Lanes<T>::round;
  const Vec<T> fraction = v - (rounded - Lanes<T>::round);
  const Vec<T> scale = (Vec<T>)((I)rounded << Lanes<T>::mantissa);
  return exp2_fraction(fraction) * scale;
}

}  // namespace gkd::GKD_ISA
