#include "host.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <memory>
#include <thread>

namespace gkd {
namespace {

void multiply(const Bfloat16Product& p) {
  auto cast = [](const Bfloat16* x) { return reinterpret_cast<const at::BFloat16*>(x); };
  at::native::cpublas::brgemm(p.rows, p.columns, p.depth, p.a_lead, p.b_lead, p.c_lead, p.accumulate, cast(p.a),
                              cast(p.b), p.c, /*is_vnni=*/true);
}

// Whether PyTorch multiplies bfloat16 here, seen by a product: it refuses on a processor that oneDNN was told to take for
// an older one.
bool multiplies_bfloat16() {
  const at::BFloat16 a[] = {1, 2, 3, 4}, b[] = {1, 10, 2, 20};  // [2, 2] and, in pairs, [2, 2]
  float c[4] = {};
  try {
    multiply({2, 2, 2, reinterpret_cast<const Bfloat16*>(a), 2, reinterpret_cast<const Bfloat16*>(b), 2, c, 2, false});
  } catch (const c10::Error&) {
    return false;
  }
  at::native::cpublas::brgemm_release();
  return c[0] == 21 && c[1] == 42 && c[2] == 43 && c[3] == 86;
}

struct Choice {
  std::string name;
  const InstructionSet* kernels;
  bool bfloat16;
};

// Best first.
const std::vector<Choice>& available() {
  static const std::vector<Choice> choices = [] {
    std::vector<Choice> found;
    auto add = [&](const InstructionSet& set) { found.push_back({set.name, &set, false}); };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16") && multiplies_bfloat16()) found.push_back({"avx512_bf16", &avx512, true});
      add(avx512);
    }
    if (has_avx2) add(avx2);
#endif
    add(baseline);
    return found;
  }();
  return choices;
}

std::atomic<const Choice*> chosen{nullptr};

const Choice& choice() {
  const Choice* choice = chosen.load();
  if (!choice) chosen.store(choice = &available().front());
  return *choice;
}

// A call leaves its memory to the next one, whose pages then need not be mapped anew, if it is no more than this. A
// sanitizer sees the bounds of allocations of their own alone.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kMostIdle = 0;
#else
constexpr int64_t kMostIdle = 8 << 20;
#endif
std::atomic<at::Tensor*> idle{nullptr};
std::atomic<int64_t> wanted{0};  // bytes that a call needed lately

std::atomic<int64_t> chosen_block{0};
std::atomic<bool> keeping{true};

}  // namespace

const InstructionSet& instruction_set() { return *choice().kernels; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : available()) names.push_back(choice.name);
  return names;
}

bool set_instruction_set(const std::string& name) {
  for (const Choice& choice : available()) {
    if (name == choice.name) {
      chosen.store(&choice);
      return true;
    }
  }
  return false;
}

void set_block(int64_t rows) { chosen_block.store(rows); }

void set_keeping(bool on) { keeping.store(on); }

int64_t kept_elements(at::ScalarType type, int64_t rows, int64_t graphs, int64_t width) {
  const int64_t size = at::elementSize(type), megabyte = 1 << 20;
  const int64_t elements = graphs * kernels<float>().upper_tiles_elements(Call().host(), rows);
  const int64_t most = std::clamp(5 * rows * width * size, 16 * megabyte, 128 * megabyte);
  return keeping.load() && elements * size <= most ? elements : 0;
}

at::Tensor affinities_of(at::TensorList rows) {
  int64_t width = 0;
  for (const at::Tensor& x : rows) width += x.size(1);
  return at::empty({kept_elements(rows[0].scalar_type(), rows[0].size(0), rows.size(), width)}, rows[0].options());
}

Product product_of(c10::string_view product_precision, at::ScalarType type) {
  if (product_precision == "bfloat16" && type == at::kFloat) {
    return choice().bfloat16 && at::globalContext().userEnabledMkldnn() ? Product::bfloat16 : Product::own;
  }
  for (const char* name : {"float32", "tf32", "bfloat16", "float16", "float64"}) {
    if (product_precision == name) return Product::own;
  }
  TORCH_CHECK(false, "unknown product precision ", product_precision);
}

at::Tensor as_multiplied(const at::Tensor& rows, Product product) {
  return product == Product::bfloat16 ? rows.to(at::kBFloat16).to(rows.scalar_type()) : rows;
}

Call::Call(Product product) : host_{} {
  host_.self = this;
  host_.workers = at::get_num_threads();
  host_.block = chosen_block.load();
  host_.run = [](void* self, int64_t count, int64_t grain, Host::Body body, void* context) {
    static_cast<Call*>(self)->run(count, grain, body, context);
  };
  if (product == Product::bfloat16) {
    host_.multiply = [](void* self, const Bfloat16Product& p) { static_cast<Call*>(self)->multiply(p); };
  }
  host_.yield = &std::this_thread::yield;
  host_.allocate = [](void* self, int64_t bytes) { return static_cast<Call*>(self)->allocate(bytes); };
}

Call::~Call() {
  if (memory_.size() == 1 && memory_[0].numel() <= kMostIdle) {
    delete idle.exchange(new at::Tensor(std::move(memory_[0])));
  } else if (total_ <= kMostIdle) {
    wanted.store(total_);
  }
}

void* Call::allocate(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (memory_.empty()) {
    if (const std::unique_ptr<at::Tensor> left{idle.exchange(nullptr)}) memory_.push_back(std::move(*left));
  }
  if (memory_.empty() || used_ + bytes > memory_.back().numel()) {
    if (used_ == 0) memory_.clear();  // too small a one
    memory_.push_back(at::detail::empty_cpu({std::max(bytes, memory_.empty() ? wanted.load() : 0)}, at::kByte));
    used_ = 0;
  }
  void* p = memory_.back().mutable_data_ptr<uint8_t>() + used_;
  used_ += bytes;
  total_ += bytes;
  return p;
}

void Call::multiply(const Bfloat16Product& product) noexcept {
  if (failed_.load(std::memory_order_relaxed)) return;
  try {
    gkd::multiply(product);
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

void Call::run(int64_t count, int64_t grain, Host::Body body, void* context) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    body(context, begin, end, at::get_thread_num());
    // Products leave their matrix unit configured.
    if (host_.multiply) at::native::cpublas::brgemm_release();
  });
  if (error_) std::rethrow_exception(error_);
}

at::ScalarType row_type(const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
              "unit rows must be float32 or float64, got ", x.scalar_type());
  return x.scalar_type();
}

at::Tensor matrix(const char* name, const at::Tensor& x, at::ScalarType type, int64_t rows, int64_t width) {
  TORCH_CHECK(x.dim() == 2, name, " must have 2 dimensions, got shape ", x.sizes());
  TORCH_CHECK(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
  TORCH_CHECK(rows < 0 || x.size(0) == rows, name, " must have ", rows, " rows, got ", x.size(0));
  TORCH_CHECK(width < 0 || x.size(1) == width, name, " must have width ", width, ", got ", x.size(1));
  return x.contiguous();
}

at::Tensor vector(const char* name, const at::Tensor& x, at::ScalarType type, std::vector<int64_t> shape) {
  TORCH_CHECK(x.sizes() == at::IntArrayRef(shape), name, " must have shape ", at::IntArrayRef(shape), ", got ",
              x.sizes());
  TORCH_CHECK(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
  return x.contiguous();
}

std::vector<at::Tensor> matrices(const char* name, at::TensorList list, at::ScalarType type, int64_t rows) {
  std::vector<at::Tensor> out;
  out.reserve(list.size());
  for (const at::Tensor& x : list) out.push_back(matrix(name, x, type, rows));
  return out;
}

}  // namespace gkd
