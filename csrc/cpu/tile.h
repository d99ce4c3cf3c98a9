// The tile engine: the one loop over tiles. An op brings its epilogue, `tile(Tile, worker)`, which multiplies the
// tile's similarities, turns them into weights and adds what they give to its rows (and, mirrored, to its columns).
#pragma once
#include "bfloat16.h"
#include "kernels.h"
#include "product.h"

namespace gkd::GKD_ISA {

constexpr int64_t kBlock = 96;       // rows and columns of a tile: its similarities and panels fit a core's own cache
constexpr int64_t kSmallBlock = 32;  // for batches of a few blocks, so that all threads have work
constexpr int64_t kGroupBytes = 400 << 10;  // of the rows and results that meet a tile's columns one after the other

struct Tile {
  int64_t i, rows;     // first row, number of rows
  int64_t j, columns;  // first column, number of columns
  int64_t diagonal;    // row i + r has its own column at j + r + diagonal
  bool mirror;         // also serves its columns: the tile below the diagonal is not visited
  int64_t place;       // among the upper tiles, in the symmetric case
  const Host& host;
  Bfloat16* rounded;   // the worker's memory for the tile's weights
};

// body(task, worker) for every task below count, in equal shares; `grain`: tasks that a thread is worth starting for.
template <class F>
void parallel(const Host& host, int64_t count, const F& body, int64_t grain = 1) {
  host.run(
      host.self, count, grain,
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

// Zeros, also where vectors read beyond the end.
template <class T>
T* cleared(const Host& host, int64_t count) {
  const int64_t all = round_up(count, 32);
  T* p = allocate<T>(host, all);
  for (int64_t k = 0; k < all; ++k) p[k] = 0;
  return p;
}

// Whether tiles of T are multiplied in bfloat16.
template <class T>
GKD_INLINE bool rounds(const Host& host) {
  return kRounds<T> && host.multiply;
}

GKD_INLINE int64_t block_rows(const Host& host, int64_t count) {
  if (host.block > 0) return host.block;
  return count < 8 * kSmallBlock ? kSmallBlock : count < 8 * kBlock ? 2 * kSmallBlock : kBlock;
}

// Of a tile in memory: a block wide, in whole panels, and in whole micro-kernels high.
GKD_INLINE int64_t tile_elements(int64_t block) { return round_up(block, kMicroRows) * block; }

// Of all upper tiles of a matrix, as they are kept.
inline int64_t upper_tiles_elements(const Host& host, int64_t rows) {
  const int64_t block = block_rows(host, rows), blocks = ceil_div(rows, block);
  return blocks * (blocks + 1) / 2 * block * block;
}

// So many multiplications of one product are worth a thread.
constexpr int64_t kProductsPerThread = 1 << 20;

template <class T>
int64_t workers_for(const Host& host, const Sides<T>& sides) {
  if (host.block > 0) return host.workers;
  const int64_t products = sides.row_count * sides.column_count / (sides.symmetric ? 2 : 1) * sides.dim;
  return smaller(host.workers, larger(1, products / kProductsPerThread));
}

// The order in which upper tiles are made, which the number of blocks alone decides. Blocks stand in groups. In round r
// the groups with A + B ≡ r (mod groups) meet, every group once, and there every block of A meets every block of B: so
// a block's tiles have the places group·round + k, k being its partner's number in the partner's group.
struct Meetings {
  int64_t blocks, group, groups;

  explicit Meetings(int64_t blocks)
      : blocks(blocks), group(smaller(8, larger(1, blocks / 8))), groups(ceil_div(blocks, group)) {}

  // One block of A, which stays in the core's cache, with all of B (in a group's meeting with itself: from itself on).
  struct Row {
    int64_t place;       // group·round
    int64_t a, k, rows;  // the block, its number in A, and blocks in A
    int64_t b, columns;  // the first block of B, and blocks in B
  };

  int64_t rows() const { return groups * (groups + 1) / 2 * group; }

  // First rows of all meetings of a round, then their second rows: neighbours in this order do not wait for each other.
  Row row(int64_t task) const {
    const int64_t even_meetings = groups / 2 + 1;  // an even round and the odd one after it have groups + 1 together
    const int64_t half = task / ((groups + 1) * group), rest = task % ((groups + 1) * group);
    const bool odd = rest >= even_meetings * group;
    const int64_t meetings = odd ? groups + 1 - even_meetings : even_meetings;
    const int64_t in_round = odd ? rest - even_meetings * group : rest;
    const int64_t k = in_round / meetings, p = in_round % meetings;
    const int64_t one = (half - p + groups) % groups, other = (half + p + odd) % groups;
    const int64_t a = smaller(one, other) * group, b = larger(one, other) * group;
    return {(2 * half + odd) * group, a + k, k, smaller(group, blocks - a), b, smaller(group, blocks - b)};
  }
};

// How many places of each block's are done.
struct Progress {
  const Host& host;
  int64_t* done;

  GKD_INLINE void wait(int64_t block, int64_t place) const {
    for (int64_t looks = 0; __atomic_load_n(done + block, __ATOMIC_ACQUIRE) < place; ++looks) {
      if (looks >= 1000) host.yield();
    }
  }

  GKD_INLINE void set(int64_t block, int64_t places) const {
    __atomic_store_n(done + block, places, __ATOMIC_RELEASE);
  }
};

// Symmetric: upper tiles only. A tile waits until its two blocks have been through the places before it. So workers never
// write the same rows at once, and every block is served in the same order, whoever serves it.
// Otherwise: a worker owns a few blocks of rows, which stay in the core's cache with their results, and walks the columns.
template <class T, class Op>
void walk(const Host& host, const Sides<T>& sides, Op& op) {
  const int64_t block = block_rows(host, sides.row_count);
  const int64_t blocks = ceil_div(sides.row_count, block), workers = workers_for(host, sides);
  const int64_t weights = rounds<T>(host) ? block * block : 0;
  Bfloat16* rounded = allocate<Bfloat16>(host, host.workers * weights);
  if (!sides.symmetric) {
    // At first many blocks of rows a task, in the end one, so that all workers end together.
    const int64_t most = larger(1, kGroupBytes / (2 * block * sides.dim * int64_t(sizeof(T))));
    int64_t *first = allocate<int64_t>(host, blocks + 1), tasks = 0;
    for (int64_t p = 0; p < blocks; ++tasks) {
      first[tasks] = p;
      p += smaller(most, larger(1, (blocks - p) / (2 * workers)));
    }
    first[tasks] = blocks;
    take_turns(host, workers, tasks, [&](int64_t task, int64_t worker) {
      for (int64_t j = 0; j < sides.column_count; j += block) {
        for (int64_t i = first[task] * block; i < smaller(first[task + 1] * block, sides.row_count); i += block) {
          op.tile(Tile{i, smaller(block, sides.row_count - i), j, smaller(block, sides.column_count - j),
                       i + sides.offset - j, false, 0, host, rounded + worker * weights},
                  worker);
        }
      }
    });
    return;
  }
  const Meetings meetings(blocks);
  const Progress progress{host, cleared<int64_t>(host, blocks)};
  take_turns(host, workers, meetings.rows(), [&](int64_t task, int64_t worker) {
    const auto [place, a, k, rows, first, columns] = meetings.row(task);
    if (k >= rows) return;
    // After the last partner of a group all the places of the round are done, also those that a smaller group lacks.
    auto after = [&](int64_t partner, int64_t partners) {
      return place + (partner + 1 < partners ? partner + 1 : meetings.group);
    };
    for (int64_t b = larger(a, first); b < first + columns; ++b) {
      const int64_t i = a * block, j = b * block, m = b - first;
      progress.wait(a, place + m);
      progress.wait(b, place + k);
      op.tile(Tile{i, smaller(block, sides.row_count - i), j, smaller(block, sides.row_count - j), i - j, a != b,
                   b * (b + 1) / 2 + a, host, rounded + worker * weights},
              worker);
      progress.set(a, after(m, columns));
      progress.set(b, after(k, rows));
    }
  });
}

// A weight as it is multiplied with values.
template <class T>
GKD_INLINE Vec<T> as_multiplied(const Host& host, Vec<T> w) {
  if constexpr (kRounds<T>) {
    if (host.multiply) return rounded(w);
  }
  return w;
}

// A matrix packed as an operand of products, in its own type or in bfloat16.
template <class T>
struct Operand {
  T* own;
  Bfloat16* rounded;
  int64_t depth;  // numbers of a row or column of similarities
  explicit operator bool() const { return own || rounded; }
};

template <class T>
Operand<T> operand(const Host& host, int64_t own_elements, int64_t rounded_elements, int64_t depth = 0) {
  if (rounds<T>(host)) return {nullptr, allocate<Bfloat16>(host, rounded_elements), depth};
  return {allocate<T>(host, own_elements), nullptr, depth};
}

// Memory for `blocks` blocks of rows as left operand of similarities.
template <class T>
Operand<T> row_blocks(const Host& host, int64_t blocks, int64_t dim, int64_t block, const Centre<T>& centre) {
  const int64_t depth = rounds<T>(host) ? rounded_depth(dim, centre) : dim;
  return operand<T>(host, blocks * round_up(block, kMicroRows) * dim, blocks * block * depth, depth);
}

// Rows [begin, end) as the block `place` of such memory. Here and below a centre is taken from rounded rows alone.
template <class T>
void pack_block(const Operand<T>& packed, int64_t place, const T* rows, const T* factors, int64_t begin, int64_t end,
                int64_t dim, int64_t block, const Centre<T>& centre) {
  if constexpr (kRounds<T>) {
    if (packed.rounded) {
      return round_rows(rows, factors, begin, end, dim, centre, packed.rounded + place * block * packed.depth);
    }
  }
  pack_rows(rows, factors, begin, end, dim, packed.own + place * round_up(block, kMicroRows) * dim);
}

// A matrix packed once per call as left operand of similarities, a block after the other; of no matrix, none.
template <class T>
Operand<T> rows_of(const Host& host, const T* rows, int64_t count, int64_t dim, int64_t block,
                   const Centre<T>& centre = {}, const T* factors = nullptr) {
  if (!rows) return {};
  const int64_t blocks = ceil_div(count, block);
  const Operand<T> packed = row_blocks<T>(host, blocks, dim, block, centre);
  parallel(host, blocks, [&](int64_t p, int64_t) {
    pack_block(packed, p, rows, factors, p * block, smaller(count, (p + 1) * block), dim, block, centre);
  }, grain_of(block * dim));
  return packed;
}

// A matrix packed once per call as columns of products.
template <class T>
Operand<T> columns_of(const Host& host, const T* rows, int64_t count, int64_t dim, int64_t block,
                      const Centre<T>& centre = {}, const T* factors = nullptr) {
  if (!rows) return {};
  const int64_t blocks = ceil_div(count, block), depth = rounds<T>(host) ? rounded_depth(dim, centre) : dim;
  const Operand<T> packed = operand<T>(host, packed_columns<T>(count, dim), blocks * block * depth, depth);
  parallel(host, blocks, [&](int64_t p, int64_t) {
    const int64_t begin = p * block, end = smaller(count, begin + block);
    if constexpr (kRounds<T>) {
      Bfloat16* rounded = packed.rounded;
      if (rounded) return round_columns(rows, factors, begin, end, dim, block, centre, rounded + begin * depth);
    }
    pack_columns(rows, factors, begin, end, dim, packed.own);
  }, grain_of(block * dim));
  return packed;
}

// A matrix packed once per call as the right operand of weights·rows, and the sums of the weights of every row of the
// results, times which its centre belongs to them.
template <class T>
struct Values : Operand<T> {
  Centre<T> centre;
  double* sums;  // [results], or null without a centre
  double* rounded_sums;  // likewise of the weights as they are multiplied, or null: not wanted
};

template <class T>
Values<T> values_of(const Host& host, const T* rows, int64_t count, int64_t dim, int64_t results,
                    const Centre<T>& centre = {}, const T* factors = nullptr) {
  if (!rows) return {};
  const Operand<T> packed =
      operand<T>(host, packed_values<T>(count, dim), round_up(count, kBfloat16Depth) * dim);
  parallel(host, ceil_div(count, kBlock), [&](int64_t p, int64_t) {
    const int64_t begin = p * kBlock, end = smaller(count, begin + kBlock);
    if constexpr (kRounds<T>) {
      if (packed.rounded) return round_values(rows, factors, begin, end, dim, centre, packed.rounded + begin * dim);
    }
    pack_values(rows, factors, count, dim, begin, end, packed.own);
  }, grain_of(kBlock * dim));
  if (!centre.row) return {packed, {}, nullptr, nullptr};
  return {packed, centre, cleared<double>(host, results), nullptr};
}

GKD_INLINE void multiply(const Host& host, const Bfloat16Product& product) { host.multiply(host.self, product); }

#ifdef GKD_BFLOAT16
// Of the results from `result` on, with the values from `value` on.
GKD_INLINE WeightSums weight_sums(const Values<float>& values, int64_t result, int64_t value) {
  if (!values.sums) return {};
  return {values.sums + result, values.centre.shares ? values.centre.shares + value : nullptr,
          values.rounded_sums ? values.rounded_sums + result : nullptr};
}
#endif

// c[r][x] (+)= rows[i + r] · columns[j + x] for the whole tile, padded to whole panels; `block`: of the packed operands.
template <class T>
GKD_INLINE void similarities(const Tile& tile, const Operand<T>& rows, const Operand<T>& columns, T* c, int64_t block,
                             bool accumulate = false) {
  const int64_t width = round_up(tile.columns, kPanel<T>), depth = rows.depth;
  if constexpr (kRounds<T>) {
    if (rows.rounded) {
      return multiply(tile.host, {round_up(tile.rows, kBfloat16Rows), width, depth, rows.rounded + tile.i * depth,
                                  depth, columns.rounded + tile.j * depth, block, c, block, accumulate});
    }
  }
  const T* left = rows.own + (tile.i / block) * round_up(block, kMicroRows) * depth;
  multiply<Layout::Across, T>(tile.rows, width, depth, {left, kMicroRows, depth}, columns.own + tile.j * depth,
                              kPanel<T> * depth, c, block, accumulate);
}

// c[r][x] = row_tangents[i + r] · columns[j + x] + rows[i + r] · column_tangents[j + x]; what stands still is none.
template <class T>
GKD_INLINE void moving_similarities(const Tile& t, const Operand<T>& rows, const Operand<T>& columns,
                                    const Operand<T>& row_tangents, const Operand<T>& column_tangents, T* c,
                                    int64_t block) {
  if (row_tangents) similarities(t, row_tangents, columns, c, block);
  if (column_tangents) similarities(t, rows, column_tangents, c, block, bool(row_tangents));
}

// out[i + r] += Σ_x w[r][x] values[j + x], but for the centre's part, see add_centre; `count`: rows of the matrix that was
// packed as values.
template <class T>
GKD_INLINE void add_to_rows(const Tile& tile, const T* w, int64_t block, const Values<T>& values, int64_t count,
                            int64_t dim, T* out) {
  if constexpr (kRounds<T>) {
    if (values.rounded) {
      round_weights(w, block, tile.rows, tile.columns, weight_sums(values, tile.i, tile.j), tile.rounded);
      return multiply(tile.host, {tile.rows, dim, round_up(tile.columns, kBfloat16Depth), tile.rounded, block,
                                  values.rounded + tile.j * dim, dim, out + tile.i * dim, dim, true});
    }
  }
  multiply<Layout::Along, T>(tile.rows, dim, tile.columns, {w, block, block}, values.own + tile.j * kPanel<T>,
                             count * kPanel<T>, out + tile.i * dim, dim, true);
}

// out[j + x] += Σ_r w[r][x] values[i + r], likewise.
template <class T>
GKD_INLINE void add_to_columns(const Tile& tile, const T* w, int64_t block, const Values<T>& values, int64_t count,
                               int64_t dim, T* out) {
  if constexpr (kRounds<T>) {
    if (values.rounded) {
      round_mirrored(w, block, tile.rows, tile.columns, weight_sums(values, tile.j, tile.i), tile.rounded);
      return multiply(tile.host, {tile.columns, dim, round_up(tile.rows, kBfloat16Depth), tile.rounded, block,
                                  values.rounded + tile.i * dim, dim, out + tile.j * dim, dim, true});
    }
  }
  multiply<Layout::Across, T>(tile.columns, dim, tile.rows, {w, block, 1}, values.own + tile.i * kPanel<T>,
                              count * kPanel<T>, out + tile.j * dim, dim, true);
}

// What lies beyond the matrix in a kept tile, so that all that is kept has a value.
template <class T>
void clear_beyond(const Tile& tile, T* c, int64_t block) {
  const int64_t width = round_up(tile.columns, kPanel<T>);
  for (int64_t r = 0; r < block; ++r) {
    for (int64_t x = r < tile.rows ? width : 0; x < block; ++x) c[r * block + x] = 0;
  }
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

// A similarity whose kernel is 0.
template <class T>
constexpr T kFar = T(-1e30);

// Own columns out of reach.
template <class T>
GKD_INLINE void put_own_columns_far(const Tile& tile, T* c, int64_t block) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    if (const int64_t own = own_column(tile, r); own >= 0) c[r * block + own] = kFar<T>;
  }
}

}  // namespace gkd::GKD_ISA
