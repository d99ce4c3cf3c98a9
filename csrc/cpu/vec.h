// Vectors of the instruction set that the including source is compiled for, through the compilers' own vector types,
// so that one text serves every processor.
#pragma once
#include <cstdint>

#ifndef GKD_ISA
#error "include this from a source that defines GKD_ISA and GKD_VECTOR_BYTES"
#endif

#define GKD_INLINE inline __attribute__((always_inline))
#define GKD_LAMBDA __attribute__((always_inline))

namespace gkd::GKD_ISA {

template <int... K>
struct Sequence {};

template <int N, int... K>
struct CountTo : CountTo<N - 1, N - 1, K...> {};
template <int... K>
struct CountTo<0, K...> {
  using Type = Sequence<K...>;
};

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = float __attribute__((vector_size(GKD_VECTOR_BYTES)));
  using Unaligned = float __attribute__((vector_size(GKD_VECTOR_BYTES), aligned(4), may_alias));
  using ForDouble = float __attribute__((vector_size(GKD_VECTOR_BYTES / 2)));  // as many as a vector has doubles
  using Integer = int32_t;
  using Integers = Integer __attribute__((vector_size(GKD_VECTOR_BYTES)));
  static constexpr int count = GKD_VECTOR_BYTES / 4;
  using Indices = CountTo<count>::Type;
  static constexpr int mantissa = 23;
  static constexpr float lowest_exponent = -127.0f;
  static constexpr float round = 12582912.0f + 127.0f;  // 1.5·2^23 + exponent bias
};

template <>
struct Lanes<double> {
  using Vector = double __attribute__((vector_size(GKD_VECTOR_BYTES)));
  using Unaligned = double __attribute__((vector_size(GKD_VECTOR_BYTES), aligned(8), may_alias));
  using ForDouble = Vector;
  using Integer = int64_t;
  using Integers = Integer __attribute__((vector_size(GKD_VECTOR_BYTES)));
  static constexpr int count = GKD_VECTOR_BYTES / 8;
  using Indices = CountTo<count>::Type;
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

// Lane k of the result is lane k + W of v.
template <class T, int W, int... K>
GKD_INLINE Vec<T> rotate(Vec<T> v, Sequence<K...>) {
  return __builtin_shufflevector(v, v, ((K + W) % int(sizeof...(K)))...);
}

// Lanes of a and b in turn, from their first (Half = 0) or second halves.
template <class T, int Half, int... K>
GKD_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, Sequence<K...>) {
  constexpr int N = sizeof...(K);
  return __builtin_shufflevector(a, b, (K / 2 + Half * N / 2 + K % 2 * N)...);
}

// v[r][k] ↔ v[k][r]
template <class T, int N>
GKD_INLINE void transpose(Vec<T> (&v)[N]) {
  using Indices = typename Lanes<T>::Indices;
#pragma GCC unroll 8
  for (int size = 1; size < N; size *= 2) {
    Vec<T> next[N];
#pragma GCC unroll 16
    for (int r = 0; r < N / 2; ++r) {
      next[2 * r] = interleave<T, 0>(v[r], v[r + N / 2], Indices{});
      next[2 * r + 1] = interleave<T, 1>(v[r], v[r + N / 2], Indices{});
    }
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r) v[r] = next[r];
  }
}

// 0 for the lanes from `valid` on, which lie beyond the matrix.
template <class T>
GKD_INLINE Vec<T> keep(Vec<T> v, int64_t valid) {
  typename Lanes<T>::Integers lane{};
  for (int k = 0; k < Lanes<T>::count; ++k) lane[k] = k;
  return lane < typename Lanes<T>::Integer(valid) ? v : Vec<T>{};
}

// The lanes' sum, in halves.
template <class T, int W = Lanes<T>::count / 2>
GKD_INLINE T sum(Vec<T> v) {
  if constexpr (W == 0) {
    return v[0];
  } else {
    return sum<T, W / 2>(v + rotate<T, W>(v, typename Lanes<T>::Indices{}));
  }
}

// v, but not below `bound`; NaN stays NaN.
template <class T>
GKD_INLINE Vec<T> at_least(Vec<T> v, T bound) {
  const Vec<T> bounds = broadcast<T>(bound);
  return bounds > v ? bounds : v;
}

// v, but not above `bound`; NaN stays NaN.
template <class T>
GKD_INLINE Vec<T> at_most(Vec<T> v, T bound) {
  const Vec<T> bounds = broadcast<T>(bound);
  return bounds < v ? bounds : v;
}

// 2^f = 1 + f·(series) for f in [-1/2, 1/2], highest power first: relative error 5e-9 (Chebyshev) resp. 2e-16 (Taylor).
// Less than float32's own rounding, because 1/τ amplifies the relations' errors.
template <class T>
struct Exp2Series;

template <>
struct Exp2Series<float> {
  static constexpr float terms[] = {0.00015453162941980736f, 0.0013390863364174759f, 0.00961808255728395f,
                                    0.055503571142201544f,   0.24022650760568132f,   0.6931471880262287f,
                                    1.0f};
};

template <>
struct Exp2Series<double> {
  static constexpr double terms[] = {
      1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10,   7.054911620801121e-09,
      1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
      0.0013333558146428441,  0.009618129107628477,   0.055504108664821576,   0.2402265069591007,
      0.6931471805599453,     1.0};
};

// body(0), body(1), … : N of them known to the compiler and unrolled, or with N = 0 a loop to `count`.
template <int N, class F>
GKD_INLINE void repeat(int64_t count, const F& body) {
  if constexpr (N > 0) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < N; ++k) body(k);
  } else {
    for (int64_t k = 0; k < count; ++k) body(k);
  }
}

#define GKD_EACH _Pragma("GCC unroll 16") for (int k = 0; k < count; ++k)

// The whole number n nearest to v, and p·2^n for p near 1. NaN stays NaN.
#if GKD_VECTOR_BYTES == 64
template <class T>
struct Exponent {
  Vec<T> n;
  static constexpr bool flushes = true;  // p·2^n below the normal numbers is 0

  GKD_INLINE static Exponent nearest(Vec<T> v) {
    if constexpr (sizeof(T) == 4) return {(Vec<T>)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT)};
    else return {(Vec<T>)_mm512_roundscale_pd((__m512d)v, _MM_FROUND_TO_NEAREST_INT)};
  }

  GKD_INLINE Vec<T> value() const { return n; }

  GKD_INLINE Vec<T> scale(Vec<T> p) const {
    const Vec<T> least = broadcast<T>(Lanes<T>::lowest_exponent + 1);
    if constexpr (sizeof(T) == 4) {
      const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)n, (__m512)least, _CMP_NLT_UQ);
      return (Vec<T>)_mm512_maskz_scalef_ps(is_normal, (__m512)p, (__m512)n);
    } else {
      const __mmask8 is_normal = _mm512_cmp_pd_mask((__m512d)n, (__m512d)least, _CMP_NLT_UQ);
      return (Vec<T>)_mm512_maskz_scalef_pd(is_normal, (__m512d)p, (__m512d)n);
    }
  }
};
#else
template <class T>
struct Exponent {
  Vec<T> biased;  // n and the bias of exponents are its lowest bits
  static constexpr bool flushes = false;

  GKD_INLINE static Exponent nearest(Vec<T> v) { return {v + Lanes<T>::round}; }

  GKD_INLINE Vec<T> value() const { return biased - Lanes<T>::round; }

  // Multiplied, not added to the exponent's bits, which would make a number of NaN.
  GKD_INLINE Vec<T> scale(Vec<T> p) const {
    return p * (Vec<T>)((typename Lanes<T>::Integers)biased << Lanes<T>::mantissa);
  }
};
#endif

// v ← 2^v for v ≤ 0 whose 2^v is a normal number. Step by step for several vectors, because one alone waits for its own
// results most of the time.
template <class T, int count>
GKD_INLINE void exp2_normal(Vec<T> (&v)[count]) {
  constexpr auto& series = Exp2Series<T>::terms;
  constexpr int degree = sizeof(series) / sizeof(T) - 1;
  Exponent<T> n[count];
  Vec<T> p[count];
  GKD_EACH n[k] = Exponent<T>::nearest(v[k]);
  GKD_EACH v[k] -= n[k].value();
  GKD_EACH p[k] = v[k] * series[0] + series[1];
#pragma GCC unroll 16
  for (int term = 2; term <= degree; ++term) {
    GKD_EACH p[k] = p[k] * v[k] + series[term];
  }
  GKD_EACH v[k] = n[k].scale(p[k]);
}

// v ← 2^v for v ≤ 0, 0 below the normal numbers.
template <class T, int count>
GKD_INLINE void exp2_nonpositive(Vec<T> (&v)[count]) {
  if constexpr (!Exponent<T>::flushes) {
    GKD_EACH v[k] = at_least<T>(v[k], Lanes<T>::lowest_exponent);
  }
  exp2_normal<T>(v);
}

}  // namespace gkd::GKD_ISA
