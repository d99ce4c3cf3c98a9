// Operands of the host's bfloat16 products: rows, rounded when they are packed, and weights, rounded tile by tile.
// Depths are padded with zeros to whole steps of a matrix unit, so that few shapes of products occur.
#pragma once
#include "kernels.h"
#include "product.h"

namespace gkd::GKD_ISA {

constexpr int64_t kBfloat16Depth = 32;
constexpr int64_t kBfloat16Rows = 16;

GKD_INLINE int64_t even(int64_t count) { return round_up(count, 2); }

// What is taken from rows before they are rounded, x̂ = x − share·row, so that their roundings are those of differences:
// rows that are nearly alike have cosines near 1, of which (c − 1)/σ² would magnify any other rounding.
template <class T>
struct Centre {
  const T* row;     // [dim], or null: nothing is taken
  const T* shares;  // [count], or null: 1
  const T* halves;  // ‖x̂‖²/2 of the rounded rows, [count]: these become part of the products, see features; or null
};

constexpr int64_t kFeatures = 8;

// Numbers of a rounded row.
template <class T>
GKD_INLINE int64_t rounded_depth(int64_t dim, const Centre<T>& centre) {
  return even(dim) + (centre.halves ? kFeatures : 0);
}

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

// A row of a matrix as it is to be rounded: x·factor − share·centre.
struct Row {
  const float* x;
  float factor;
  const float* centre;
  float share;

  Row(const float* rows, const float* factors, const Centre<float>& centre, int64_t i, int64_t dim)
      : x(rows + i * dim),
        factor(factors ? factors[i] : 1),
        centre(centre.row),
        share(centre.shares ? centre.shares[i] : 1) {}

  // `valid` of the numbers from k on, at most 16, and zeros.
  GKD_INLINE Vec<float> load(int64_t k, int64_t valid) const {
    const Vec<float> v = load_some(x + k, valid) * factor;
    return centre ? v - load_some(centre + k, valid) * share : v;
  }

  GKD_ROUNDING GKD_INLINE Bits rounded(int64_t k, int64_t valid) const {
    return round_both(load(k, valid), load(k + 16, valid - 16));
  }
};

// ‖x̂‖² of the rounded row.
GKD_ROUNDING inline float rounded_square(const Row& row, int64_t dim) {
  Vec<float> total{};
  for (int64_t k = 0; k < dim; k += 32) {
    const Bits bits = row.rounded(k, smaller(32, dim - k));
    const Vec<float> low = (Vec<float>)(bits << 16), high = (Vec<float>)(bits & 0xffff0000);
    total += low * low + high * high;
  }
  return sum<float>(total);
}

GKD_INLINE Bfloat16 nearest(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return Bfloat16((x == x ? bits + (((bits >> 16) & 1) + 0x7fff) : bits) >> 16);
}

GKD_INLINE float value_of(Bfloat16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Numbers that follow those of a unit row, so that its product with a column is
//   c − 1 = x̂_i·x̂_j − ‖x̂_i‖²/2 − ‖x̂_j‖²/2:
// the halves in three numbers each, as precise as float32, beside ones of the other side. A zero row, of which no centre
// is taken, is orthogonal to all rows: −1 in place of the half, nothing for the other's, and −1 for two zero rows.
struct Features {
  Bfloat16 row[kFeatures], column[kFeatures];

  Features(float half, bool is_zero) : row{}, column{} {
    const Bfloat16 one = nearest(1), minus_one = nearest(-1);
    if (is_zero) {
      row[0] = column[3] = column[6] = minus_one;
      row[6] = one;
      return;
    }
    float rest = -half;
    for (int k = 0; k < 3; ++k) {
      row[k] = column[3 + k] = nearest(rest);
      row[3 + k] = column[k] = one;
      rest -= value_of(row[k]);
    }
  }
  static Features of(const Centre<float>& centre, int64_t i) { return {centre.halves[i], centre.shares[i] == 0}; }
};

// Rows [begin, end) as left operand: [row][rounded_depth], zeros beyond the end to whole kBfloat16Rows.
GKD_ROUNDING inline void round_rows(const float* rows, const float* factors, int64_t begin, int64_t end, int64_t dim,
                                    const Centre<float>& centre, Bfloat16* packed) {
  const int64_t depth = rounded_depth(dim, centre);
  for (int64_t i = begin; i < end; ++i) {
    Bfloat16* out = packed + (i - begin) * depth;
    const Row row(rows, factors, centre, i, dim);
    for (int64_t k = 0; k < dim; k += 32) {
      const int64_t valid = smaller(32, dim - k);
      const Bits bits = row.rounded(k, valid);
      __builtin_memcpy(out + k, &bits, even(valid) * sizeof(Bfloat16));
    }
    if (!centre.halves) continue;
    const Features features = Features::of(centre, i);
    __builtin_memcpy(out + even(dim), features.row, sizeof(features.row));
  }
  const int64_t count = end - begin;
  __builtin_memset(packed + count * depth, 0, (round_up(count, kBfloat16Rows) - count) * depth * sizeof(Bfloat16));
}

// Rows [begin, end) as columns of a product c = A·rowsᵀ: [rounded_depth/2][block][2], zeros beyond the end.
GKD_ROUNDING inline void round_columns(const float* rows, const float* factors, int64_t begin, int64_t end,
                                       int64_t dim, int64_t block, const Centre<float>& centre, Bfloat16* packed) {
  for (int64_t n = 0; n < block; n += 16) {
    for (int64_t k = 0; k < dim; k += 32) {
      Vec<float> pairs[16];
      const int64_t valid = smaller(32, dim - k);
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t j = begin + n + r;
        pairs[r] = Vec<float>{};
        if (j >= end) continue;
        pairs[r] = (Vec<float>)Row(rows, factors, centre, j, dim).rounded(k, valid);
      }
      transpose<float>(pairs);
      for (int64_t p = 0; 2 * p < valid; ++p) {
        __builtin_memcpy(packed + (k + 2 * p) * block + 2 * n, &pairs[p], sizeof(Bits));
      }
    }
  }
  if (!centre.halves) return;
  Bfloat16* features = packed + even(dim) * block;
  __builtin_memset(features, 0, kFeatures * block * sizeof(Bfloat16));
  for (int64_t j = begin; j < end; ++j) {
    const Features of_row = Features::of(centre, j);
    for (int64_t k = 0; k < kFeatures; ++k) features[(k / 2 * block + j - begin) * 2 + k % 2] = of_row.column[k];
  }
}

// Rows [begin, end) as right operand of weights·rows: [row/2][dim][2], zeros beyond the end to whole kBfloat16Depth.
GKD_ROUNDING inline void round_values(const float* rows, const float* factors, int64_t begin, int64_t end,
                                      int64_t dim, const Centre<float>& centre, Bfloat16* packed) {
  for (int64_t j = begin; j < begin + round_up(end - begin, kBfloat16Depth); j += 2) {
    Bfloat16* out = packed + (j - begin) * dim;
    for (int64_t n = 0; n < dim; n += 16) {
      const int64_t valid = smaller(16, dim - n);
      Vec<float> both[2];
      for (int64_t r = 0; r < 2; ++r) {
        both[r] = j + r < end ? Row(rows, factors, centre, j + r, dim).load(n, valid) : Vec<float>{};
      }
      const Bits pairs = round_pairs(both[0], both[1]);
      __builtin_memcpy(out + 2 * n, &pairs, valid * sizeof(uint32_t));
    }
  }
}

// Where the sums of a tile's weights go, each times the share of the centre that its value lacks.
struct WeightSums {
  double* out;          // or null: none
  const float* shares;  // of the values that the weights multiply, or null: 1
  double* rounded;      // of the weights as they are multiplied, or null

  GKD_INLINE Vec<float> of_columns(Vec<float> w, int64_t x) const { return shares ? w * load(shares + x) : w; }
  GKD_INLINE Vec<float> of_row(Vec<float> w, int64_t r) const { return shares ? w * shares[r] : w; }
};

// The sums of pairs of numbers.
GKD_INLINE Vec<float> sums_of(Bits pairs) { return (Vec<float>)(pairs << 16) + (Vec<float>)(pairs & 0xffff0000); }

// A tile's weights as left operand: [row][stride], zeros from `columns` on.
GKD_ROUNDING inline void round_weights(const float* w, int64_t stride, int64_t rows, int64_t columns,
                                       const WeightSums& sums, Bfloat16* out) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec<float> total{}, rounded{};
    for (int64_t x = 0; x < columns; x += 32) {
      Vec<float> first = load(w + r * stride + x), second = load(w + r * stride + x + 16);
      if (x + 32 > columns) {
        first = keep<float>(first, columns - x);
        second = keep<float>(second, columns - x - 16);
      }
      const Bits bits = round_both(first, second);
      __builtin_memcpy(out + r * stride + x, &bits, sizeof(Bits));
      if (sums.out) total += sums.of_columns(first, x) + sums.of_columns(second, x + 16);
      if (sums.rounded) rounded += sums_of(bits);
    }
    if (sums.out) sums.out[r] += sum<float>(total);
    if (sums.rounded) sums.rounded[r] += sum<float>(rounded);
  }
}

// A tile's weights mirrored, as left operand: [column][stride], zeros from `rows` on.
GKD_ROUNDING inline void round_mirrored(const float* w, int64_t stride, int64_t rows, int64_t columns,
                                        const WeightSums& sums, Bfloat16* out) {
  for (int64_t x = 0; x < columns; x += 16) {
    Vec<float> totals{}, rounded{};
    for (int64_t r = 0; r < rows; r += 32) {
      Vec<float> pairs[16];
      const float* row = w + r * stride + x;
#pragma GCC unroll 16
      for (int64_t k = 0; k < 16; ++k, row += 2 * stride) {
        const int64_t one = r + 2 * k;
        const Vec<float> first = one < rows ? load(row) : Vec<float>{};
        const Vec<float> second = one + 1 < rows ? load(row + stride) : Vec<float>{};
        pairs[k] = (Vec<float>)round_pairs(first, second);
        if (sums.rounded) rounded += sums_of((Bits)pairs[k]);
        if (!sums.out || one >= rows) continue;
        totals += sums.of_row(first, one);
        if (one + 1 < rows) totals += sums.of_row(second, one + 1);
      }
      transpose<float>(pairs);
#pragma GCC unroll 16
      for (int64_t k = 0; k < 16; ++k) __builtin_memcpy(out + (x + k) * stride + r, &pairs[k], sizeof(Bits));
    }
    for (int64_t k = 0; sums.out && k < smaller(16, columns - x); ++k) sums.out[x + k] += totals[k];
    for (int64_t k = 0; sums.rounded && k < smaller(16, columns - x); ++k) sums.rounded[x + k] += rounded[k];
  }
}

#else

template <class T>
constexpr bool kRounds = false;

#endif

}  // namespace gkd::GKD_ISA
