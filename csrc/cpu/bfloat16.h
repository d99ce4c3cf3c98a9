// Operands of the host's bfloat16 products: rows, rounded when they are packed, and weights, rounded tile by tile.
#pragma once
#include "kernels.h"
#include "product.h"

namespace gkd::GKD_ISA {

// Depths are padded with zeros to whole steps of a matrix unit, so that few shapes of products occur.
constexpr int64_t kBfloat16Depth = 32;
constexpr int64_t kBfloat16Rows = 16;

GKD_INLINE int64_t even(int64_t count) { return round_up(count, 2); }

using Bits = uint32_t __attribute__((vector_size(GKD_VECTOR_BYTES)));

// The nearest bfloat16 in the upper half, ties to even; NaN stays NaN.
GKD_INLINE Bits round_bits(Vec<float> v) {
  const Bits bits = (Bits)v;
  return v == v ? bits + (((bits >> 16) & 1) + 0x7fff) : bits | 0x400000;
}

GKD_INLINE uint32_t round_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return x == x ? bits + (((bits >> 16) & 1) + 0x7fff) : bits | 0x400000;
}

GKD_INLINE Vec<float> rounded(Vec<float> v) { return (Vec<float>)(round_bits(v) & 0xffff0000); }

// Two numbers as a pair, the first one in the lower half.
template <class U>
GKD_INLINE U pair_of(U first, U second) {
  return (first >> 16) | (second & 0xffff0000);
}

GKD_INLINE void store_pair(Bfloat16* p, uint32_t pair) { __builtin_memcpy(p, &pair, sizeof(pair)); }

// x[k]·factor and x[k + 1]·factor, 0 from k = dim on.
GKD_INLINE uint32_t rounded_pair(const float* x, float factor, int64_t k, int64_t dim) {
  return pair_of(round_bits(factor * x[k]), k + 1 < dim ? round_bits(factor * x[k + 1]) : 0);
}

// Rows [begin, end) as left operand: [row][even(dim)], zeros beyond the end to whole kBfloat16Rows.
inline void round_rows(const float* rows, const float* factors, int64_t begin, int64_t end, int64_t dim,
                       Bfloat16* packed) {
  const int64_t depth = even(dim);
  for (int64_t i = begin; i < begin + round_up(end - begin, kBfloat16Rows); ++i) {
    const float factor = factors && i < end ? factors[i] : 1;
    for (int64_t k = 0; k < dim; k += 2) {
      store_pair(packed + (i - begin) * depth + k, i < end ? rounded_pair(rows + i * dim, factor, k, dim) : 0);
    }
  }
}

// Rows [begin, end) as columns of a product c = A·rowsᵀ: [dim/2][block][2], zeros beyond the end.
inline void round_columns(const float* rows, const float* factors, int64_t begin, int64_t end, int64_t dim,
                          int64_t block, Bfloat16* packed) {
  for (int64_t n = 0; n < block; ++n) {
    const bool valid = begin + n < end;
    const float factor = factors && valid ? factors[begin + n] : 1;
    for (int64_t k = 0; k < dim; k += 2) {
      store_pair(packed + k * block + n * 2, valid ? rounded_pair(rows + (begin + n) * dim, factor, k, dim) : 0);
    }
  }
}

// Rows [begin, end) as right operand of weights·rows: [row/2][dim][2], zeros beyond the end to whole kBfloat16Depth.
inline void round_values(const float* rows, const float* factors, int64_t begin, int64_t end, int64_t dim,
                         Bfloat16* packed) {
  auto at = [&](int64_t j, int64_t n) -> uint32_t {
    return j < end ? round_bits((factors ? factors[j] : 1) * rows[j * dim + n]) : 0;
  };
  for (int64_t j = begin; j < begin + round_up(end - begin, kBfloat16Depth); j += 2) {
    Bfloat16* out = packed + (j - begin) * dim;
    for (int64_t n = 0; n < dim; ++n) store_pair(out + 2 * n, pair_of(at(j, n), at(j + 1, n)));
  }
}

// A tile's weights as left operand: [row][stride], zeros from `columns` on.
inline void round_weights(const float* w, int64_t stride, int64_t rows, int64_t columns, Bfloat16* out) {
  constexpr int N = Lanes<float>::count;
  using Half = Bfloat16 __attribute__((vector_size(2 * N), aligned(2), may_alias));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t x = 0; x < round_up(columns, kBfloat16Depth); x += N) {
      const Bits bits = round_bits(keep<float>(load(w + r * stride + x), columns - x)) >> 16;
      *reinterpret_cast<Half*>(out + r * stride + x) = __builtin_convertvector(bits, Half);
    }
  }
}

// a[i] lane k ↔ a[k] lane i, in halves: blocks of W lanes change places.
template <int W, int... K>
GKD_INLINE void transpose(Bits (&a)[sizeof...(K)], Sequence<K...> lanes) {
  constexpr int N = sizeof...(K);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    if (i & W) continue;
    const Bits upper = a[i], lower = a[i + W];
    a[i] = __builtin_shufflevector(upper, lower, (K & W ? N + K - W : K)...);
    a[i + W] = __builtin_shufflevector(upper, lower, (K & W ? N + K : K + W)...);
  }
  if constexpr (W > 1) transpose<W / 2>(a, lanes);
}

// A tile's weights mirrored, as left operand: [column][stride], zeros from `rows` on.
inline void round_mirrored(const float* w, int64_t stride, int64_t rows, int64_t columns, Bfloat16* out) {
  constexpr int N = Lanes<float>::count;
  auto row = [&](int64_t r, int64_t x) { return r < rows ? round_bits(load(w + r * stride + x)) : Bits{}; };
  for (int64_t r = 0; r < round_up(rows, kBfloat16Depth); r += 2 * N) {
    for (int64_t x = 0; x < columns; x += N) {
      Bits pairs[N];
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k) pairs[k] = pair_of(row(r + 2 * k, x), row(r + 2 * k + 1, x));
      transpose<N / 2>(pairs, Lanes<float>::Indices{});
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k) __builtin_memcpy(out + (x + k) * stride + r, &pairs[k], sizeof(Bits));
    }
  }
}

}  // namespace gkd::GKD_ISA
