// Matrix products of a tile: packing, the register-blocked micro-kernel, and the product that the ops are made of.
#pragma once
#include "vec.h"

namespace gkd::GKD_ISA {

#if GKD_VECTOR_BYTES == 64
constexpr int kMicroRows = 12;
#else
constexpr int kMicroRows = 6;
#endif

// Columns per panel: two vectors.
template <class T>
constexpr int kPanel = 2 * Lanes<T>::count;

constexpr int64_t kDepth = 256;  // of one micro-kernel call: its panel of 16 floats a row then stays in a small cache

GKD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GKD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
GKD_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GKD_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How element (r, k) of a left operand is found: at [r·lead + k], or (Across) at [k·lead + r].
enum class Layout { Along, Across };

// c[r][n] (+)= Σ_k a(r, k) · b[k][n] for R × kPanel.
template <Layout layout, int R, class T>
GKD_INLINE void micro_kernel(const T* a, int64_t lead, const T* b, int64_t depth, T* c, int64_t stride,
                             bool accumulate) {
  constexpr int N = Lanes<T>::count;
  Vec<T> sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = load(b + k * 2 * N), b1 = load(b + k * 2 * N + N);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast(layout == Layout::Along ? a[r * lead + k] : a[k * lead + r]);
      sums[r][0] += x * b0;
      sums[r][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    T* out = c + r * stride;
    if (accumulate) {
      sums[r][0] += load(out);
      sums[r][1] += load(out + N);
    }
    store(out, sums[r][0]);
    store(out + N, sums[r][1]);
  }
}

// The same for `rows` ≤ R and `columns` of a row of c that are to be written.
template <Layout layout, int R, class T>
GKD_INLINE void micro_rows(const T* a, int64_t lead, const T* b, int64_t depth, T* c, int64_t stride, bool accumulate,
                           int64_t rows, int64_t columns) {
  constexpr int P = kPanel<T>;
  if (rows == R && columns >= P) return micro_kernel<layout, R>(a, lead, b, depth, c, stride, accumulate);
  alignas(64) T edge[R * P];
  micro_kernel<layout, R>(a, lead, b, depth, edge, int64_t(P), false);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t x = 0; x < smaller(P, columns); ++x) {
      c[r * stride + x] = accumulate ? c[r * stride + x] + edge[r * P + x] : edge[r * P + x];
    }
  }
}

// A left operand of a product: kMicroRows rows from row m on begin at data + m·step. It is read to the end of the last
// kMicroRows rows.
template <class T>
struct Left {
  const T* data;
  int64_t lead, step;
};

// c[m][n] (+)= Σ_k left(m, k) · panel(n)[k], n running through panels `panel_stride` apart. Writes m < count, n < width;
// a c whose rows are padded to whole panels may be given with its padded width.
template <Layout layout, class T>
void multiply(int64_t count, int64_t width, int64_t depth, Left<T> left, const T* panels, int64_t panel_stride, T* c,
              int64_t stride, bool accumulate) {
  constexpr int P = kPanel<T>, third = kMicroRows / 3;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int64_t part = smaller(kDepth, depth - k0);
    const bool add = accumulate || k0 > 0;
    for (int64_t n = 0; n < width; n += P) {
      const T* b = panels + (n / P) * panel_stride + k0 * P;
      for (int64_t m = 0; m < count; m += kMicroRows) {
        const T* a = left.data + m * left.step + k0 * (layout == Layout::Along ? 1 : left.lead);
        T* out = c + m * stride + n;
        const int64_t rows = smaller(kMicroRows, count - m), columns = width - n;
        if (rows > 2 * third) {
          micro_rows<layout, kMicroRows>(a, left.lead, b, part, out, stride, add, rows, columns);
        } else if (rows > third) {
          micro_rows<layout, 2 * third>(a, left.lead, b, part, out, stride, add, rows, columns);
        } else {
          micro_rows<layout, third>(a, left.lead, b, part, out, stride, add, rows, columns);
        }
      }
    }
  }
}

// `count` rows of `dim`, `valid` of them given, as [dim][count]: zeros beyond. Here and below a row is multiplied by
// its factor, 1 where `factors` is null.
template <int count, class T>
GKD_INLINE void transpose_rows(const T* rows, const T* factors, int64_t valid, int64_t dim, T* out) {
  constexpr int N = Lanes<T>::count;
#pragma GCC unroll 2
  for (int r0 = 0; r0 < count; r0 += N) {
    const int width = count - r0 < N ? count - r0 : N;
    for (int64_t k0 = 0; k0 < dim; k0 += N) {
      const int64_t depth = smaller(N, dim - k0);
      Vec<T> v[N];
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) {
        v[r] = Vec<T>{};
        if (r >= width || r0 + r >= valid) continue;
        const T* x = rows + (r0 + r) * dim + k0;
        if (depth == N) {
          v[r] = load(x);
        } else {
          for (int64_t k = 0; k < depth; ++k) v[r][k] = x[k];
        }
        if (factors) v[r] *= factors[r0 + r];
      }
      transpose<T>(v);
      for (int64_t k = 0; k < depth; ++k) {
        T* line = out + (k0 + k) * count + r0;
        if (width == N) {
          store(line, v[k]);
        } else {
          __builtin_memcpy(line, &v[k], width * sizeof(T));
        }
      }
    }
  }
}

// Rows [begin, end) as the left operand of similarities: [kMicroRows rows][dim][kMicroRows], zeros beyond the end.
template <class T>
void pack_rows(const T* rows, const T* factors, int64_t begin, int64_t end, int64_t dim, T* packed) {
  for (int64_t i = begin; i < end; i += kMicroRows, packed += kMicroRows * dim) {
    transpose_rows<kMicroRows>(rows + i * dim, factors ? factors + i : nullptr, smaller(kMicroRows, end - i), dim,
                               packed);
  }
}

template <class T>
int64_t packed_columns(int64_t count, int64_t dim) {
  return round_up(count, kPanel<T>) * dim;
}

template <class T>
int64_t packed_values(int64_t count, int64_t dim) {
  return round_up(dim, kPanel<T>) * count;
}

// Rows [begin, end), whole panels but for the matrix's last, as columns of a product c = A·rowsᵀ: [panel of
// rows][dim][kPanel], zeros beyond the end.
template <class T>
void pack_columns(const T* rows, const T* factors, int64_t begin, int64_t end, int64_t dim, T* packed) {
  constexpr int P = kPanel<T>;
  for (int64_t first = begin; first < end; first += P) {
    transpose_rows<P>(rows + first * dim, factors ? factors + first : nullptr, smaller(P, end - first), dim,
                      packed + first * dim);
  }
}

// Rows as the right operand of weights·rows: [panel of dimensions][row][kPanel], zeros beyond the last dimension.
template <class T>
void pack_values(const T* rows, const T* factors, int64_t count, int64_t dim, int64_t begin, int64_t end, T* packed) {
  constexpr int P = kPanel<T>;
  for (int64_t panel = 0; panel * P < dim; ++panel) {
    const int64_t valid = smaller(P, dim - panel * P);
    for (int64_t j = begin; j < end; ++j) {
      T* out = packed + (panel * count + j) * P;
      const T* in = rows + j * dim + panel * P;
      const T factor = factors ? factors[j] : T(1);
      for (int64_t n = 0; n < P; ++n) out[n] = n < valid ? factor * in[n] : T(0);
    }
  }
}

}  // namespace gkd::GKD_ISA
