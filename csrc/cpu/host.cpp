#include "host.h"

#include <atomic>
#include <thread>

namespace gkd {
namespace {

std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&avx512);
  }
  if (has_avx2) sets.push_back(&avx2);
#endif
  sets.push_back(&baseline);
  return sets;
}

std::atomic<const InstructionSet*> chosen{nullptr};
std::atomic<int64_t> chosen_block{0};

void run(int64_t count, int64_t grain, Host::Body body, void* context) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end, at::get_thread_num()); });
}

}  // namespace

const InstructionSet& instruction_set() {
  const InstructionSet* set = chosen.load();
  if (!set) chosen.store(set = available().front());
  return *set;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : available()) names.emplace_back(set->name);
  return names;
}

bool set_instruction_set(const std::string& name) {
  for (const InstructionSet* set : available()) {
    if (name == set->name) {
      chosen.store(set);
      return true;
    }
  }
  return false;
}

void set_block(int64_t rows) { chosen_block.store(rows); }

Call::Call() {
  host_.self = this;
  host_.workers = at::get_num_threads();
  host_.block = chosen_block.load();
  host_.run = &run;
  host_.yield = &std::this_thread::yield;
  host_.allocate = [](void* self, int64_t bytes) { return static_cast<Call*>(self)->allocate(bytes); };
}

void* Call::allocate(int64_t bytes) {
  memory_.push_back(at::detail::empty_cpu({bytes}, at::kByte));
  return memory_.back().mutable_data_ptr();
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

void check_precision(c10::string_view product_precision) {
  for (const char* name : {"float32", "tf32", "bfloat16", "float16", "float64"}) {
    if (product_precision == name) return;
  }
  TORCH_CHECK(false, "unknown product precision ", product_precision);
}

}  // namespace gkd
