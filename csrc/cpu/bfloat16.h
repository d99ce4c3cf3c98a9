// Operands of the host's bfloat16 products: rows, rounded when they are packed, and weights, rounded tile by tile.
// Depths are padded with zeros to whole steps of a matrix unit, so that few shapes of products occur.
#pragma once
#include "kernels.h"
#include "product.h"

namespace gkd::GKD_ISA {

constexpr int64_t kBfloat16Depth = 32;
constexpr int64_t kBfloat16Rows = 16;

GKD_INLINE int64_t even(int64_t count) { return round_up(count, 2); }

#ifdef GKD_BFLOAT16

// Whether tiles of T can be multiplied in bfloat16.
template <class T>
constexpr bool kRounds = sizeof(T) == sizeof(float);

// For functions that only a processor with these instructions comes to.
#define GKD_ROUNDING __attribute__((target("avx512bf16")))

using Bits = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(64)));

// w as it is multiplied: the nearest bfloat16, ties to even; NaN stays NaN.
GKD_INLINE Vec<float> rounded(Vec<float> w) {
  const Bits bits = (Bits)w, nearest = bits + (((bits >> 16) & 1) + 0x7fff);
  return (Vec<float>)((w == w ? nearest : bits) & 0xffff0000);
}

// The numbers of `first`, then those of `second`.
GKD_ROUNDING GKD_INLINE Bits round_both(Vec<float> first, Vec<float> second) {
  return (Bits)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// Lane k holds the pair of first[k] and second[k].
GKD_ROUNDING GKD_INLINE Bits round_pairs(Vec<float> first, Vec<float> second) {
  const Halves both = (Halves)round_both(first, second);
  return (Bits)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                       25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// `valid` numbers, at most 16, and zeros.
GKD_INLINE Vec<float> load_some(const float* x, int64_t valid) {
  if (valid >= 16) return load(x);
  Vec<float> v{};
  if (valid > 0) __builtin_memcpy(&v, x, valid * sizeof(float));
  return v;
}

// x·factor, with a zero at the end of an odd count.
GKD_ROUNDING inline void round_row(const float* x, float factor, int64_t count, Bfloat16* out) {
  for (int64_t k = 0; k < count; k += 32) {
    const int64_t valid = smaller(32, count - k);
    const Bits bits = round_both(load_some(x + k, valid) * factor, load_some(x + k + 16, valid - 16) * factor);
    __builtin_memcpy(out + k, &bits, even(valid) * sizeof(Bfloat16));
  }
}

// Rows [begin, end) as left operand: [row][even(dim)], zeros beyond the end to whole kBfloat16Rows.
GKD_ROUNDING inline void round_rows(const float* rows, const float* factors, int64_t begin, int64_t end, int64_t dim,
                                    Bfloat16* packed) {
  const int64_t depth = even(dim);
  for (int64_t i = begin; i < end; ++i) {
    round_row(rows + i * dim, factors ? factors[i] : 1, dim, packed + (i - begin) * depth);
  }
  const int64_t count = end - begin;
  __builtin_memset(packed + count * depth, 0, (round_up(count, kBfloat16Rows) - count) * depth * sizeof(Bfloat16));
}

// Rows [begin, end) as columns of a product c = A·rowsᵀ: [dim/2][block][2], zeros beyond the end.
GKD_ROUNDING inline void round_columns(const float* rows, const float* factors, int64_t begin, int64_t end,
                                       int64_t dim, int64_t block, Bfloat16* packed) {
  for (int64_t n = 0; n < block; n += 16) {
    for (int64_t k = 0; k < dim; k += 32) {
      Vec<float> pairs[16];
      const int64_t valid = smaller(32, dim - k);
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t j = begin + n + r;
        pairs[r] = Vec<float>{};
        if (j >= end) continue;
        const float *x = rows + j * dim + k, factor = factors ? factors[j] : 1;
        pairs[r] = (Vec<float>)round_both(load_some(x, valid) * factor, load_some(x + 16, valid - 16) * factor);
      }
      transpose<float>(pairs);
      for (int64_t p = 0; 2 * p < valid; ++p) {
        __builtin_memcpy(packed + (k + 2 * p) * block + 2 * n, &pairs[p], sizeof(Bits));
      }
    }
  }
}

// Rows [begin, end) as right operand of weights·rows: [row/2][dim][2], zeros beyond the end to whole kBfloat16Depth.
GKD_ROUNDING inline void round_values(const float* rows, const float* factors, int64_t begin, int64_t end,
                                      int64_t dim, Bfloat16* packed) {
  for (int64_t j = begin; j < begin + round_up(end - begin, kBfloat16Depth); j += 2) {
    Bfloat16* out = packed + (j - begin) * dim;
    for (int64_t n = 0; n < dim; n += 16) {
      const int64_t valid = smaller(16, dim - n);
      Vec<float> both[2];
      for (int64_t r = 0; r < 2; ++r) {
        const float factor = factors && j + r < end ? factors[j + r] : 1;
        both[r] = load_some(rows + (j + r) * dim + n, j + r < end ? valid : 0) * factor;
      }
      const Bits pairs = round_pairs(both[0], both[1]);
      __builtin_memcpy(out + 2 * n, &pairs, valid * sizeof(uint32_t));
    }
  }
}

// A tile's weights as left operand: [row][stride], zeros from `columns` on.
GKD_ROUNDING inline void round_weights(const float* w, int64_t stride, int64_t rows, int64_t columns, Bfloat16* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t x = 0; x < columns; x += 32) {
      Vec<float> first = load(w + r * stride + x), second = load(w + r * stride + x + 16);
      if (x + 32 > columns) {
        first = keep<float>(first, columns - x);
        second = keep<float>(second, columns - x - 16);
      }
      const Bits bits = round_both(first, second);
      __builtin_memcpy(out + r * stride + x, &bits, sizeof(Bits));
    }
  }
}

// A tile's weights mirrored, as left operand: [column][stride], zeros from `rows` on.
GKD_ROUNDING inline void round_mirrored(const float* w, int64_t stride, int64_t rows, int64_t columns, Bfloat16* out) {
  for (int64_t r = 0; r < rows; r += 32) {
    for (int64_t x = 0; x < columns; x += 16) {
      Vec<float> pairs[16];
      const float* row = w + r * stride + x;
#pragma GCC unroll 16
      for (int64_t k = 0; k < 16; ++k, row += 2 * stride) {
        const bool first = r + 2 * k < rows, second = r + 2 * k + 1 < rows;
        pairs[k] = (Vec<float>)round_pairs(first ? load(row) : Vec<float>{}, second ? load(row + stride) : Vec<float>{});
      }
      transpose<float>(pairs);
#pragma GCC unroll 16
      for (int64_t k = 0; k < 16; ++k) __builtin_memcpy(out + (x + k) * stride + r, &pairs[k], sizeof(Bits));
    }
  }
}

#else

template <class T>
constexpr bool kRounds = false;

#endif

}  // namespace gkd::GKD_ISA
