// The border between tensors and kernels: argument checks, threads, memory, and the choice of the instruction set.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace gkd {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Elements that vectors may read beyond the end of a per-row array.
constexpr int64_t kPadding = 16;

// The kernels that run in this process.
const InstructionSet& instruction_set();
// Names of the instruction sets that this processor has, best first. "avx512_bf16" is "avx512" with bfloat16 products, by
// matrix units (AMX) where there are some.
std::vector<std::string> instruction_sets();
// For tests: choose one of them by name; false if there is none of that name.
bool set_instruction_set(const std::string& name);
// For tests: rows per tile, a multiple of 32, shared by all threads; 0 lets the kernels choose both.
void set_block(int64_t rows);

// For tests: whether forward passes keep the affinities of small graphs.
void set_keeping(bool on);
// Elements of the affinities that a forward pass keeps of graphs with the same nodes, rows of `width` elements in all:
// those of the upper tiles, so that the backward pass need not multiply again, while they take no more memory than is
// proportional to the rows'; else 0, and they are recomputed.
int64_t kept_elements(at::ScalarType type, int64_t rows, int64_t graphs, int64_t width);

template <class T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return instruction_set().float64;
  } else {
    return instruction_set().float32;
  }
}

// Tiles of float32 rows are multiplied in their own type, or in bfloat16 where the processor gains by it.
enum class Product { own, bfloat16 };

// What product_precision means for rows of this type on this processor.
Product product_of(c10::string_view product_precision, at::ScalarType type);

// Rows as tiles multiply them where they have no centre.
at::Tensor as_multiplied(const at::Tensor& rows, Product product);

// Directions lose too much in bfloat16 where they are orthogonal to rows that are all alike.
constexpr Product second_order_product = Product::own;

// Threads and memory of one call; the memory lives as long as this object.
class Call {
 public:
  explicit Call(Product product = Product::own);
  ~Call();
  Call(const Call&) = delete;
  const Host& host() const { return host_; }

  // Cleared memory with room for vectors that read beyond the end.
  template <class T>
  T* zeros(int64_t count) {
    T* p = static_cast<T*>(allocate((count + kPadding) * int64_t(sizeof(T))));
    std::fill(p, p + count + kPadding, T(0));
    return p;
  }

  template <class T, class U>
  T* copy(const U* values, int64_t count) {
    T* p = zeros<T>(count);
    std::copy(values, values + count, p);
    return p;
  }

 private:
  void* allocate(int64_t bytes);
  void multiply(const Bfloat16Product& product) noexcept;
  void run(int64_t count, int64_t grain, Host::Body body, void* context);

  std::vector<at::Tensor> memory_;  // allocations are parts of the last one
  int64_t used_ = 0, total_ = 0;    // bytes of the last one, of all
  Host host_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // of the first product that failed
};

// A float64 number per row in two parts, those of WideTerms.
template <class T>
struct WideNumbers {
  T *high = nullptr, *low = nullptr;

  WideNumbers() = default;
  WideNumbers(Call& call, int64_t count) : high(call.zeros<T>(count)), low(call.zeros<T>(count)) {}
  void set(int64_t i, double x) {
    high[i] = T(x);
    low[i] = T(x - high[i]);
  }
};

template <class T>
WideTerms<T> wide_terms(const WideNumbers<T>& row, const WideNumbers<T>& column) {
  return {{row.high, column.high}, {row.low, column.low}};
}

// x_i ← f(scales_i) x_i for the rows of x [rows, width].
template <class T, class S, class F>
void scale_rows(T* x, const S* scales, int64_t rows, int64_t width, const F& f) {
  at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T factor = T(f(scales[i]));
      for (int64_t k = i * width; k < (i + 1) * width; ++k) x[k] *= factor;
    }
  });
}

// A loss that is ≥ 0 but for its roundings; NaN stays NaN.
template <class T>
T not_below_zero(T loss) {
  return loss < 0 ? T(0) : loss;
}

// Checks rank and type and makes contiguous; the tensor that the pointers point into.
at::Tensor matrix(const char* name, const at::Tensor& x, at::ScalarType type, int64_t rows = -1, int64_t width = -1);
at::Tensor vector(const char* name, const at::Tensor& x, at::ScalarType type, std::vector<int64_t> shape);
std::vector<at::Tensor> matrices(const char* name, at::TensorList list, at::ScalarType type, int64_t rows = -1);

at::ScalarType row_type(const at::Tensor& x);

// Memory for the affinities of the graphs whose nodes these are; [0] where they are not kept.
at::Tensor affinities_of(at::TensorList rows);
// Affinities that were kept, or null.
template <class T>
T* kept(const at::Tensor& affinities, int64_t rows, int64_t graphs) {
  if (!affinities.defined() || affinities.numel() == 0) return nullptr;
  const int64_t elements = graphs * kernels<T>().upper_tiles_elements(Call().host(), rows);
  return vector("affinities", affinities, c10::CppTypeToScalarType<T>::value, {elements}).template mutable_data_ptr<T>();
}

template <class T>
Sides<T> sides_of(const at::Tensor& rows, const at::Tensor* columns, int64_t offset) {
  const at::Tensor& other = columns ? *columns : rows;
  return {rows.const_data_ptr<T>(), other.const_data_ptr<T>(), rows.size(0), other.size(0), rows.size(1),
          columns ? offset : 0,     columns == nullptr};
}

// body(g, counts[g]) for every graph that has rows, of at most `rows`: graph by graph on threads of their own, or one after
// the other with all threads where there are fewer graphs than threads.
template <class F>
void for_graphs(const at::Tensor& counts, int64_t rows, const F& body) {
  const int64_t graphs = counts.numel();
  const at::Tensor held = vector("counts", counts, at::kLong, {graphs});
  const int64_t* count = held.const_data_ptr<int64_t>();
  for (int64_t g = 0; g < graphs; ++g) {
    TORCH_CHECK(count[g] >= 0 && count[g] <= rows, "counts must be from 0 to ", rows, ", got ", count[g]);
  }
  auto run = [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowAutograd guard;
    for (int64_t g = begin; g < end; ++g) {
      if (count[g] > 0) body(g, count[g]);
    }
  };
  if (graphs < at::get_num_threads()) run(0, graphs);
  else at::parallel_for(0, graphs, 1, run);
}

}  // namespace gkd

#define GKD_DISPATCH(TYPE, ...)            \
  [&] {                                    \
    if ((TYPE) == at::kDouble) {           \
      using scalar_t = double;             \
      return __VA_ARGS__();                \
    }                                      \
    using scalar_t = float;                \
    return __VA_ARGS__();                  \
  }()
