#include <torch/library.h>

#include <cmath>

#include "host.h"

namespace gkd::info {
namespace {

// Up to this 2/τ the sums of exp((c − 1)/τ) cannot underflow in float32.
constexpr double kLargestSharedShift = 80;

struct Problem {
  at::Tensor students, teachers;
  at::ScalarType type;
  Product product;
  double temperature;

  int64_t count() const { return students.size(0); }
  bool shares_shift() const { return 2 / temperature <= kLargestSharedShift; }

  template <class T>
  InfoNce<T> arguments() const {
    InfoNce<T> args{};
    args.sides = sides_of<T>(students, &teachers, 0);
    args.sides.symmetric = true;
    args.scale = T(kLog2E / temperature);
    return args;
  }
};

Problem problem_of(const at::Tensor& students, const at::Tensor& teachers, double temperature,
                   c10::string_view product_precision) {
  const at::ScalarType type = row_type(students);
  const Product product = product_of(product_precision, type);
  return {as_multiplied(matrix("students", students, type), product),
          as_multiplied(matrix("teachers", teachers, type, students.size(0), students.size(1)), product), type, product,
          temperature};
}

// Each row's and column's largest logit, in base 2.
template <class T>
void set_own_shifts(Call& call, InfoNce<T>& args) {
  const int64_t count = args.sides.row_count;
  T* shifts[] = {call.zeros<T>(count), call.zeros<T>(count)};
  for (T* shift : shifts) std::fill(shift, shift + count, T(-1e30));
  args.row_maxima = shifts[0];
  args.column_maxima = shifts[1];
  kernels<T>().info_nce(call.host(), args);
  args.row_maxima = args.column_maxima = nullptr;
  for (T* shift : shifts) {
    for (int64_t i = 0; i < count; ++i) shift[i] *= args.scale;
  }
  args.row_shift = shifts[0];
  args.column_shift = shifts[1];
}

template <class T>
std::tuple<at::Tensor, at::Tensor> forward(const Problem& p) {
  const int64_t count = p.count();
  const auto options = p.students.options();
  at::Tensor losses = at::empty({count}, options), log_sums = at::empty({2, count}, options.dtype(at::kDouble));
  Call call(p.product);
  InfoNce<T> args = p.arguments<T>();
  if (!p.shares_shift()) set_own_shifts(call, args);
  args.row_sums = call.zeros<double>(count);
  args.column_sums = call.zeros<double>(count);
  args.own_products = call.zeros<T>(count);
  kernels<T>().info_nce(call.host(), args);
  T* loss = losses.mutable_data_ptr<T>();
  double *row = log_sums.mutable_data_ptr<double>(), *column = row + count;
  for (int64_t i = 0; i < count; ++i) {
    row[i] = std::log(args.row_sums[i]) + (args.row_shift ? args.row_shift[i] : args.scale) * kLn2;
    column[i] = std::log(args.column_sums[i]) + (args.column_shift ? args.column_shift[i] : args.scale) * kLn2;
    loss[i] = T((row[i] + column[i]) / 2 - args.own_products[i] / p.temperature);
  }
  return {losses, log_sums};
}

// w_ij = (g_i P_ij + g_j P'_ij)/2τ, P and P' the softmaxes by row and by column, less g_i/τ where i = j.
template <class T>
std::vector<at::Tensor> backward(const Problem& p, const at::Tensor& upstream, const at::Tensor& log_sums,
                                 const c10::List<bool>& needs) {
  const int64_t count = p.count();
  Call call(p.product);
  InfoNce<T> args = p.arguments<T>();
  const T* g = upstream.const_data_ptr<T>();
  const double* log_z = log_sums.const_data_ptr<double>();
  T *factors[] = {call.zeros<T>(count), call.zeros<T>(count)}, *own = call.zeros<T>(count);
  T* shifts[] = {nullptr, nullptr};
  for (int64_t q = 0; q < 2; ++q) {
    if (!p.shares_shift()) shifts[q] = call.zeros<T>(count);
    for (int64_t i = 0; i < count; ++i) {
      if (shifts[q]) shifts[q][i] = T(log_z[q * count + i] * kLog2E);
      const double shift = shifts[q] ? shifts[q][i] : args.scale;
      factors[q][i] = T(g[i] / (2 * p.temperature) * std::exp(shift * kLn2 - log_z[q * count + i]));
    }
  }
  for (int64_t i = 0; i < count; ++i) own[i] = T(g[i] / p.temperature);
  args.row_factor = factors[0], args.column_factor = factors[1];
  args.row_shift = shifts[0], args.column_shift = shifts[1];
  args.own = own;
  std::vector<at::Tensor> gradients;
  for (int64_t q = 0; q < 2; ++q) {
    if (!needs.get(q)) continue;
    gradients.push_back(at::zeros_like(p.students));
    args.gradients[q] = gradients.back().template mutable_data_ptr<T>();
  }
  if (!gradients.empty()) kernels<T>().info_nce(call.host(), args);
  return gradients;
}

std::tuple<at::Tensor, at::Tensor> info_nce(const at::Tensor& students, const at::Tensor& teachers, double temperature,
                                            c10::string_view product_precision) {
  const Problem p = problem_of(students, teachers, temperature, product_precision);
  return GKD_DISPATCH(p.type, [&] { return forward<scalar_t>(p); });
}

std::vector<at::Tensor> info_nce_backward(const at::Tensor& upstream, const at::Tensor& students,
                                          const at::Tensor& teachers, const at::Tensor& log_sums, double temperature,
                                          c10::string_view product_precision, c10::List<bool> needs) {
  const Problem p = problem_of(students, teachers, temperature, product_precision);
  TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, got ", needs.size());
  const at::Tensor g = vector("upstream", upstream, p.type, {p.count()});
  const at::Tensor sums = vector("log_sums", log_sums, at::kDouble, {2, p.count()});
  return GKD_DISPATCH(p.type, [&] { return backward<scalar_t>(p, g, sums, needs); });
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("info_nce", &info_nce);
  library.impl("info_nce_backward", &info_nce_backward);
}

}  // namespace gkd::info
