// Numbers of which a formula is written once and computed in two ways: as vectors, or as duals, vectors with a tangent.
#pragma once
#include "vec.h"

namespace gkd::GKD_ISA {

// v + ε d, ε² = 0
template <class T>
struct Dual {
  Vec<T> v, d;
};

template <class T, bool Moving>
struct NumberOf {
  using Type = Vec<T>;
};
template <class T>
struct NumberOf<T, true> {
  using Type = Dual<T>;
};
template <class T, bool Moving>
using Number = typename NumberOf<T, Moving>::Type;

template <class T>
GKD_INLINE Dual<T> operator+(Dual<T> a, Dual<T> b) { return {a.v + b.v, a.d + b.d}; }
template <class T>
GKD_INLINE Dual<T> operator-(Dual<T> a, Dual<T> b) { return {a.v - b.v, a.d - b.d}; }
template <class T>
GKD_INLINE Dual<T> operator-(Dual<T> a) { return {-a.v, -a.d}; }
template <class T>
GKD_INLINE Dual<T> operator*(Dual<T> a, Dual<T> b) { return {a.v * b.v, a.v * b.d + a.d * b.v}; }
template <class T>
GKD_INLINE Dual<T> operator/(Dual<T> a, Dual<T> b) {
  const Vec<T> ratio = a.v / b.v;
  return {ratio, (a.d - ratio * b.d) / b.v};
}

template <class T>
GKD_INLINE Vec<T> value(Vec<T> a) { return a; }
template <class T>
GKD_INLINE Vec<T> value(Dual<T> a) { return a.v; }

// A number that stands still.
template <class T, bool Moving>
GKD_INLINE Number<T, Moving> still(T x) {
  if constexpr (Moving) return {broadcast<T>(x), Vec<T>{}};
  else return broadcast<T>(x);
}

// `a` where `condition`, a vector comparison, holds, else b.
template <class T, class Condition>
GKD_INLINE Vec<T> select(Condition condition, Vec<T> a, Vec<T> b) { return condition ? a : b; }
template <class T, class Condition>
GKD_INLINE Dual<T> select(Condition condition, Dual<T> a, Dual<T> b) {
  return {condition ? a.v : b.v, condition ? a.d : b.d};
}

template <class T>
GKD_INLINE Vec<T> root(Vec<T> x) {
#if GKD_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  else return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#elif GKD_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int k = 0; k < Lanes<T>::count; ++k) {
    if constexpr (sizeof(T) == 4) x[k] = __builtin_sqrtf(x[k]);
    else x[k] = __builtin_sqrt(x[k]);
  }
  return x;
#endif
}

// Of x > 0.
template <class T>
GKD_INLINE Dual<T> root(Dual<T> x) {
  const Vec<T> v = root<T>(x.v);
  return {v, x.d / (v + v)};
}

template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  static constexpr int32_t root_half = 0x3f3504f3, mantissa = 0x007fffff;  // √½'s bits
};
template <>
struct FloatBits<double> {
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd, mantissa = 0x000fffffffffffff;
};

// log x for normal x > 0. With x = 2^n m, m in [√½, √2), and s = (m − 1)/(m + 1): n log 2 + 2(s + s³/3 + s⁵/5 + …).
template <class T>
GKD_INLINE Vec<T> logarithm(Vec<T> x) {
  using Integers = typename Lanes<T>::Integers;
  constexpr int terms = sizeof(T) == 4 ? 4 : 10;
  const Integers bits = (Integers)x - FloatBits<T>::root_half;
  const Vec<T> n = __builtin_convertvector(bits >> Lanes<T>::mantissa, Vec<T>);
  const Vec<T> m = (Vec<T>)((bits & FloatBits<T>::mantissa) + FloatBits<T>::root_half);
  const Vec<T> s = (m - 1) / (m + 1), square = s * s;
  Vec<T> series = broadcast<T>(T(1) / (2 * terms + 1));
#pragma GCC unroll 16
  for (int k = terms - 1; k >= 1; --k) series = series * square + T(1) / (2 * k + 1);
  return n * T(0.693147180559945309) + (s + s) * (series * square + 1);
}
template <class T>
GKD_INLINE Dual<T> logarithm(Dual<T> x) { return {logarithm<T>(x.v), x.d / x.v}; }

}  // namespace gkd::GKD_ISA
