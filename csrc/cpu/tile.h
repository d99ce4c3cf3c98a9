// The tile engine: the one loop over tiles. An op brings its epilogue, `tile(Tile, worker)`, which multiplies the
// tile's similarities, turns them into weights and adds what they give to its rows (and, mirrored, to its columns).
#pragma once
#include "kernels.h"
#include "product.h"

namespace gkd::GKD_ISA {

constexpr int64_t kBlock = 96;       // rows and columns of a tile: its similarities and panels fit a core's own cache
constexpr int64_t kSmallBlock = 32;  // for batches of a few blocks, so that all threads have work

struct Tile {
  int64_t i, rows;     // first row, number of rows
  int64_t j, columns;  // first column, number of columns
  int64_t diagonal;    // row i + r has its own column at j + r + diagonal
  bool mirror;         // also serves its columns: the tile below the diagonal is not visited
};

// body(task, worker) for every task below count, in equal shares; `grain`: tasks that a thread is worth starting for.
template <class F>
void parallel(const Host& host, int64_t count, const F& body, int64_t grain = 1) {
  host.run(
      count, grain,
      [](void* context, int64_t begin, int64_t end, int64_t worker) {
        const F& f = *static_cast<const F*>(context);
        for (int64_t k = begin; k < end; ++k) f(k, worker);
      },
      const_cast<F*>(&body));
}

// The same for tasks of unequal length: in their order, each by the one of `workers` that is free next.
template <class F>
void take_turns(const Host& host, int64_t workers, int64_t count, const F& body) {
  int64_t next = 0;
  parallel(host, smaller(count, workers), [&](int64_t, int64_t worker) {
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) body(task, worker);
  });
}

// Passes over this many elements are not worth a second thread.
constexpr int64_t kElementsPerThread = 1 << 14;

GKD_INLINE int64_t grain_of(int64_t elements_per_task) {
  return larger(1, kElementsPerThread / larger(1, elements_per_task));
}

template <class T>
T* allocate(const Host& host, int64_t count) {
  return static_cast<T*>(host.allocate(host.self, (count + 16) * int64_t(sizeof(T))));
}

GKD_INLINE int64_t block_rows(const Host& host, int64_t count) {
  if (host.block > 0) return host.block;
  return count < 8 * kBlock ? kSmallBlock : kBlock;
}

// Of a tile in memory: a block wide, in whole panels, and in whole micro-kernels high.
GKD_INLINE int64_t tile_elements(int64_t block) { return round_up(block, kMicroRows) * block; }

// So many multiplications of one product are worth a thread.
constexpr int64_t kProductsPerThread = 1 << 20;

template <class T>
int64_t workers_for(const Host& host, const Sides<T>& sides) {
  if (host.block > 0) return host.workers;
  const int64_t products = sides.row_count * sides.column_count / (sides.symmetric ? 2 : 1) * sides.dim;
  return smaller(host.workers, larger(1, products / kProductsPerThread));
}

GKD_INLINE void wait_until(const Host& host, const int64_t* rounds, int64_t round) {
  for (int64_t looks = 0; __atomic_load_n(rounds, __ATOMIC_ACQUIRE) < round; ++looks) {
    if (looks >= 1000) host.yield();
  }
}

// Symmetric: upper tiles only. In round r the blocks with i + j ≡ r (mod blocks) meet, every block once: a tile waits
// until both its blocks have been through all rounds before. So workers never write the same rows at once, and every
// block is served in the order of the rounds, whoever serves it.
// Otherwise: a worker owns a block of rows and walks the columns.
template <class T, class Op>
void walk(const Host& host, const Sides<T>& sides, Op& op) {
  const int64_t block = block_rows(host, sides.row_count);
  const int64_t blocks = ceil_div(sides.row_count, block), workers = workers_for(host, sides);
  if (!sides.symmetric) {
    take_turns(host, workers, blocks, [&](int64_t p, int64_t worker) {
      const int64_t i = p * block, rows = smaller(block, sides.row_count - i);
      for (int64_t j = 0; j < sides.column_count; j += block) {
        op.tile(Tile{i, rows, j, smaller(block, sides.column_count - j), i + sides.offset - j, false}, worker);
      }
    });
    return;
  }
  int64_t* rounds = allocate<int64_t>(host, blocks);  // that a block has been through
  for (int64_t a = 0; a < blocks; ++a) rounds[a] = 0;
  const int64_t even_meetings = blocks / 2 + 1;  // an even round and the odd one after it have blocks + 1 together
  take_turns(host, workers, blocks * (blocks + 1) / 2, [&](int64_t task, int64_t worker) {
    const int64_t half = task / (blocks + 1), rest = task % (blocks + 1);
    const bool odd = rest >= even_meetings;
    const int64_t round = 2 * half + odd, p = odd ? rest - even_meetings : rest;
    const int64_t one = (half - p + blocks) % blocks, other = (half + p + odd) % blocks;
    const int64_t a = smaller(one, other), b = larger(one, other), i = a * block, j = b * block;
    wait_until(host, rounds + a, round);
    wait_until(host, rounds + b, round);
    op.tile(Tile{i, smaller(block, sides.row_count - i), j, smaller(block, sides.row_count - j), i - j, a != b},
            worker);
    __atomic_store_n(rounds + a, round + 1, __ATOMIC_RELEASE);
    __atomic_store_n(rounds + b, round + 1, __ATOMIC_RELEASE);
  });
}

// A matrix packed once per call as left operand of similarities, a block after the other.
template <class T>
const T* rows_of(const Host& host, const T* rows, int64_t count, int64_t dim, int64_t block,
                 const T* factors = nullptr) {
  const int64_t blocks = ceil_div(count, block), elements = round_up(block, kMicroRows) * dim;
  T* packed = allocate<T>(host, blocks * elements);
  parallel(host, blocks, [&](int64_t p, int64_t) {
    pack_rows(rows, factors, p * block, smaller(count, (p + 1) * block), dim, packed + p * elements);
  }, grain_of(elements));
  return packed;
}

// A matrix packed once per call as columns of products.
template <class T>
const T* columns_of(const Host& host, const T* rows, int64_t count, int64_t dim, const T* factors = nullptr) {
  T* packed = allocate<T>(host, packed_columns<T>(count, dim));
  parallel(host, ceil_div(count, kPanel<T>),
           [&](int64_t p, int64_t) { pack_columns(rows, factors, count, dim, p, packed); },
           grain_of(kPanel<T> * dim));
  return packed;
}

// A matrix packed once per call as the right operand of weights·rows.
template <class T>
const T* values_of(const Host& host, const T* rows, int64_t count, int64_t dim, const T* factors = nullptr) {
  T* packed = allocate<T>(host, packed_values<T>(count, dim));
  parallel(host, ceil_div(count, kBlock), [&](int64_t p, int64_t) {
    pack_values(rows, factors, count, dim, p * kBlock, smaller(count, (p + 1) * kBlock), packed);
  }, grain_of(kBlock * dim));
  return packed;
}

// c[r][x] = rows[i + r] · columns[j + x] for the whole tile, padded to whole panels; `block`: of the packed rows.
template <class T>
GKD_INLINE void similarities(const Tile& tile, const T* rows, const T* columns, int64_t dim, T* c, int64_t block,
                             bool accumulate = false) {
  const T* left = rows + (tile.i / block) * round_up(block, kMicroRows) * dim;
  multiply<Layout::Across, T>(tile.rows, round_up(tile.columns, kPanel<T>), dim, {left, kMicroRows, dim},
                              columns + tile.j * dim, kPanel<T> * dim, c, block, accumulate);
}

// c[r][x] = row_tangents[i + r] · columns[j + x] + rows[i + r] · column_tangents[j + x]; what stands still is null.
template <class T>
GKD_INLINE void moving_similarities(const Tile& t, const T* rows, const T* columns, const T* row_tangents,
                                    const T* column_tangents, int64_t dim, T* c, int64_t block) {
  if (row_tangents) similarities(t, row_tangents, columns, dim, c, block);
  if (column_tangents) similarities(t, rows, column_tangents, dim, c, block, row_tangents != nullptr);
}

// out[i + r] += Σ_x w[r][x] values[j + x]; `count`: rows of the matrix that was packed as values.
template <class T>
GKD_INLINE void add_to_rows(const Tile& tile, const T* w, int64_t block, const T* values, int64_t count, int64_t dim,
                            T* out) {
  multiply<Layout::Along, T>(tile.rows, dim, tile.columns, {w, block, block}, values + tile.j * kPanel<T>,
                             count * kPanel<T>, out + tile.i * dim, dim, true);
}

// out[j + x] += Σ_r w[r][x] values[i + r].
template <class T>
GKD_INLINE void add_to_columns(const Tile& tile, const T* w, int64_t block, const T* values, int64_t count,
                               int64_t dim, T* out) {
  multiply<Layout::Across, T>(tile.columns, dim, tile.rows, {w, block, 1}, values + tile.i * kPanel<T>,
                              count * kPanel<T>, out + tile.j * dim, dim, true);
}

// Calls body.operator()<G>(r) for groups of G rows and <1> for those left over.
template <int G, class F>
GKD_INLINE void for_row_groups(int64_t rows, const F& body) {
  int64_t r = 0;
  for (; r + G <= rows; r += G) body.template operator()<G>(r);
  for (; r < rows; ++r) body.template operator()<1>(r);
}

// The tile's element on the diagonal in row r, or -1.
GKD_INLINE int64_t own_column(const Tile& tile, int64_t r) {
  const int64_t x = r + tile.diagonal;
  return x >= 0 && x < tile.columns ? x : -1;
}

}  // namespace gkd::GKD_ISA
