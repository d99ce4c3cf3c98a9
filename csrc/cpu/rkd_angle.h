// rkd_angle: the cosine of the angle at i between j and k is
//     cos_ijk = (G_jk − G_ij − G_ik + G_ii) r_ij r_ik,   G = rows·rowsᵀ,   r_ij = 1/‖x_i − x_j‖, 0 where x_i and x_j are alike.
// Blocks of nodes i go by one after the other; each has a panel of G_ij − G_ii/2 and of r_ij for all j, and meets all
// tiles (j, k) of G, which are made anew for it. Forward, with z = cos^s − cos^t: Σ_jk ρ(z), of which k ≥ j is half.
// Backward, with E = g_i ρ'(z) (for the teachers −E), F = E r_ij r_ik:
//     H_jk = Σ_i F_ijk,   N_ij = r_ij² Σ_k E_ijk cos_ijk − Σ_k F_ijk,   W = N + Nᵀ + H,   dX_a = 2 Σ_b W_ab (x_b − x_a).
#pragma once
#include "numbers.h"
#include "tile.h"

namespace gkd::GKD_ISA {

template <class T>
struct AngleTiles {
  static constexpr int N = Lanes<T>::count;
  static constexpr int kGroup = GKD_VECTOR_BYTES == 64 ? 4 : 2;  // rows at a time
  static constexpr T kRounding = sizeof(T) == 4 ? T(2e-6) : T(4e-15);  // of a difference relative to its terms

  const RkdAngle<T>& args;
  const Host& host;
  int64_t count, stride, blocks, step;  // step: elements of a tile
  Operand<T> rows[2], columns[2];
  Values<T> values[2];
  T *offsets[2], *inverses[2], *weights[2];  // panels of the block at hand, a tile per block of columns: N is in weights
  T* tiles;                                  // per worker and side: G, H, Σ_k E r_ik, Σ_k E cos
  double* partial;                           // forward: [block of j][i]

  static constexpr int kTiles = 4;
  GKD_INLINE T* tile_of(int64_t worker, int side, int place) const {
    return tiles + ((worker * 2 + side) * kTiles + place) * step;
  }

  Tile tile_at(int64_t a, int64_t b) const {
    const int64_t i = a * stride, j = b * stride;
    return {i, smaller(stride, count - i), j, smaller(stride, count - j), i - j, false, 0, host, nullptr};
  }

  void make_panel(int64_t a, int64_t b) const {
    const Tile t = tile_at(a, b);
    for (int q = 0; q < 2; ++q) {
      T *offset = offsets[q] + b * step, *inverse = inverses[q] + b * step;
      similarities(t, rows[q], columns[q], offset, stride);
      for (int64_t r = 0; r < t.rows; ++r) {
        const T own = args.norms[q][t.i + r];
        for (int64_t x = 0; x < t.columns; x += N) {
          const Vec<T> product = load(offset + r * stride + x), norms = load(args.norms[q] + t.j + x) + own;
          const Vec<T> square = norms - (product + product);
          const auto apart = square > at_least<T>(norms * kRounding, T(1e-24));
          const Vec<T> safe = apart ? square : broadcast<T>(1);
          const Vec<T> r_ij = apart ? 1 / root<T>(safe) : Vec<T>{};
          store(offset + r * stride + x, product - own / 2);
          store(inverse + r * stride + x, x + N <= t.columns ? r_ij : keep<T>(r_ij, t.columns - x));
        }
        if (const int64_t x = own_column(t, r); x >= 0) inverse[r * stride + x] = 0;
      }
    }
  }

  // Both networks' cosines of row r + g of the tile at column x, for node i of the block.
  struct Row {
    T offset[2], inverse[2];  // at j
  };
  struct Column {
    Vec<T> offset[2], inverse[2];  // at k
  };
  GKD_INLINE Row row(int64_t i, int64_t b, int64_t r) const {
    Row out;
    for (int q = 0; q < 2; ++q) {
      out.offset[q] = offsets[q][b * step + i * stride + r], out.inverse[q] = inverses[q][b * step + i * stride + r];
    }
    return out;
  }
  GKD_INLINE Column column(int64_t i, int64_t c, int64_t x) const {
    Column out;
    for (int q = 0; q < 2; ++q) {
      out.offset[q] = load(offsets[q] + c * step + i * stride + x);
      out.inverse[q] = load(inverses[q] + c * step + i * stride + x);
    }
    return out;
  }

  // ρ' of Huber's function ρ(z) = ρ'(z − ρ'/2)
  GKD_INLINE static Vec<T> slope(Vec<T> z) { return at_most<T>(at_least<T>(z, T(-1)), T(1)); }

  void multiply_both(const Tile& t, int64_t worker) const {
    for (int q = 0; q < 2; ++q) {
      similarities(t, rows[q], columns[q], tile_of(worker, q, 0), stride);
    }
  }

  // Σ_jk ρ(z) of node i over rows r + g of a tile.
  template <int G>
  GKD_INLINE Vec<T> add_rows(const Tile& t, int64_t worker, int64_t b, int64_t c, int64_t i, int64_t r) const {
    Row at[G];
    for (int g = 0; g < G; ++g) at[g] = row(i, b, r + g);
    Vec<T> total{};
    for (int64_t x = 0; x < t.columns; x += N) {
      const Column k = column(i, c, x);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        Vec<T> cosine[2];
        for (int q = 0; q < 2; ++q) {
          cosine[q] = (load(tile_of(worker, q, 0) + (r + g) * stride + x) - (k.offset[q] + at[g].offset[q])) *
                      (k.inverse[q] * at[g].inverse[q]);
        }
        const Vec<T> z = cosine[0] - cosine[1], rho = slope(z);
        total += rho * (z - rho * T(0.5));
      }
    }
    return total;
  }

  void add_block(int64_t a, int64_t b, int64_t worker) const {
    const int64_t nodes = smaller(stride, count - a * stride);
    for (int64_t i = 0; i < nodes; ++i) partial[b * stride + i] = 0;
    for (int64_t c = b; c < blocks; ++c) {
      const Tile t = tile_at(b, c);
      multiply_both(t, worker);
      for (int64_t i = 0; i < nodes; ++i) {
        Vec<T> total{};
        for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { total += add_rows<G>(t, worker, b, c, i, r); });
        partial[b * stride + i] += (c > b ? 2 : 1) * double(sum<T>(total));
      }
    }
  }

  // Adds F to H, and Σ_k E r_ik and Σ_k E cos of node i, over rows r + g of a tile.
  template <int G, bool Teacher>
  GKD_INLINE void weigh_rows(const Tile& t, int64_t worker, int64_t b, int64_t c, int64_t i, int64_t r, T g_i) const {
    constexpr int first = Teacher ? 1 : 0;
    Row at[G];
    Vec<T> by_r[G], by_cosine[G];
    for (int g = 0; g < G; ++g) at[g] = row(i, b, r + g), by_r[g] = by_cosine[g] = Vec<T>{};
    for (int64_t x = 0; x < t.columns; x += N) {
      const Column k = column(i, c, x);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        Vec<T> cosine[2], both[2];
        for (int q = 0; q < 2; ++q) {
          both[q] = k.inverse[q] * at[g].inverse[q];
          cosine[q] = (load(tile_of(worker, q, 0) + (r + g) * stride + x) - (k.offset[q] + at[g].offset[q])) * both[q];
        }
        const Vec<T> e = slope(cosine[0] - cosine[1]) * g_i;
        T* h = tile_of(worker, first, 1) + (r + g) * stride + x;
        store(h, load(h) + e * both[first]);
        by_r[g] += e * k.inverse[first];
        by_cosine[g] += e * cosine[first];
      }
    }
    for (int g = 0; g < G; ++g) {
      tile_of(worker, first, 2)[i * stride + r + g] += sum<T>(by_r[g]);
      tile_of(worker, first, 3)[i * stride + r + g] += sum<T>(by_cosine[g]);
    }
  }

  // What the nodes of block a give to the rows of block b: H, Nᵀ; and N, for the rows of block a, in the panel.
  template <bool Teacher>
  void weigh_block(int64_t a, int64_t b, int64_t worker) const {
    constexpr int q = Teacher ? 1 : 0;
    const int64_t nodes = smaller(stride, count - a * stride), dim = args.sides[q].dim;
    const T sign = Teacher ? T(-1) : T(1);
    T *h = tile_of(worker, q, 1), *by_r = tile_of(worker, q, 2), *by_cosine = tile_of(worker, q, 3);
    for (int64_t k = 0; k < step; ++k) by_r[k] = by_cosine[k] = 0;
    for (int64_t c = 0; c < blocks; ++c) {
      const Tile t = tile_at(b, c);
      multiply_both(t, worker);
      for (int64_t k = 0; k < step; ++k) h[k] = 0;
      for (int64_t i = 0; i < nodes; ++i) {
        const T g_i = sign * args.upstream[a * stride + i];
        for_row_groups<kGroup>(t.rows, [&]<int G>(int64_t r) { weigh_rows<G, Teacher>(t, worker, b, c, i, r, g_i); });
      }
      for (int64_t r = 0; r < t.rows; ++r) {
        Vec<T> total{};
        for (int64_t x = 0; x < t.columns; x += N) total += load(h + r * stride + x);
        args.weight_sums[q][t.i + r] += sum<T>(total);
      }
      add_to_rows(t, h, stride, values[q], count, dim, args.gradients[q]);
    }
    const Tile t = tile_at(a, b);
    T* n = weights[q] + b * step;
    for (int64_t i = 0; i < t.rows; ++i) {
      for (int64_t x = 0; x < t.columns; ++x) {
        const int64_t k = i * stride + x;
        const T r = inverses[q][b * step + k];
        n[k] = r * (r * by_cosine[k] - by_r[k]);
        args.weight_sums[q][t.j + x] += n[k];
      }
    }
    add_to_columns(t, n, stride, values[q], count, dim, args.gradients[q]);
  }

  // What the nodes of block a get of N themselves: rows [begin, end) of the block.
  void add_own(int64_t a, int q, int64_t begin, int64_t end) const {
    for (int64_t b = 0; b < blocks; ++b) {
      Tile t = tile_at(a, b);
      t.i += begin;
      t.rows = smaller(end, t.rows) - begin;
      if (t.rows <= 0) return;
      const T* n = weights[q] + b * step + begin * stride;
      add_to_rows(t, n, stride, values[q], count, args.sides[q].dim, args.gradients[q]);
      for (int64_t r = 0; r < t.rows; ++r) {
        double total = 0;
        for (int64_t x = 0; x < t.columns; ++x) total += n[r * stride + x];
        args.weight_sums[q][t.i + r] += total;
      }
    }
  }

  void forward() const {
    for (int64_t a = 0; a < blocks; ++a) {
      take_turns(host, host.workers, blocks, [&](int64_t b, int64_t) { make_panel(a, b); });
      take_turns(host, host.workers, blocks, [&](int64_t b, int64_t worker) { add_block(a, b, worker); });
      for (int64_t i = a * stride; i < smaller(count, (a + 1) * stride); ++i) {
        for (int64_t b = 0; b < blocks; ++b) args.sums[i] += partial[b * stride + i - a * stride];
      }
    }
  }

  void backward() const {
    constexpr int64_t piece = 24;  // whole micro-kernels
    for (int64_t a = 0; a < blocks; ++a) {
      take_turns(host, host.workers, blocks, [&](int64_t b, int64_t) { make_panel(a, b); });
      take_turns(host, host.workers, blocks, [&](int64_t b, int64_t worker) {
        if (args.gradients[0]) weigh_block<false>(a, b, worker);
        if (args.gradients[1]) weigh_block<true>(a, b, worker);
      });
      take_turns(host, host.workers, ceil_div(stride, piece), [&](int64_t p, int64_t) {
        for (int q = 0; q < 2; ++q) {
          if (args.gradients[q]) add_own(a, q, p * piece, (p + 1) * piece);
        }
      });
    }
    for (int q = 0; q < 2; ++q) {
      if (!args.gradients[q]) continue;
      const Sides<T>& sides = args.sides[q];
      parallel(host, count, [&](int64_t i, int64_t) {
        const T total = T(args.weight_sums[q][i]);
        T* out = args.gradients[q] + i * sides.dim;
        for (int64_t k = 0; k < sides.dim; ++k) out[k] = 2 * (out[k] - total * sides.rows[i * sides.dim + k]);
      }, grain_of(sides.dim));
    }
  }
};

template <class T>
void rkd_angle(const Host& host, const RkdAngle<T>& args) {
  const int64_t count = args.sides[0].row_count, stride = block_rows(host, count), blocks = ceil_div(count, stride);
  const int64_t step = tile_elements(stride);
  AngleTiles<T> op{args, host, count, stride, blocks, step, {}, {}, {}, {}, {}, {}, nullptr, nullptr};
  for (int q = 0; q < 2; ++q) {
    const Sides<T>& sides = args.sides[q];
    op.rows[q] = rows_of(host, sides.rows, count, sides.dim, stride);
    op.columns[q] = columns_of(host, sides.rows, count, sides.dim, stride);
    if (args.gradients[q]) op.values[q] = values_of(host, sides.rows, count, sides.dim, count);
    op.offsets[q] = allocate<T>(host, blocks * step);
    op.inverses[q] = allocate<T>(host, blocks * step);
    if (args.gradients[q]) op.weights[q] = allocate<T>(host, blocks * step);
  }
  op.tiles = allocate<T>(host, host.workers * 2 * AngleTiles<T>::kTiles * step);
  op.partial = allocate<double>(host, blocks * stride);
  if (args.sums) op.forward();
  else op.backward();
}

}  // namespace gkd::GKD_ISA
