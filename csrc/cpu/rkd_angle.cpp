#include <torch/library.h>

#include "host.h"

namespace gkd::angle {
namespace {

struct Problem {
  at::Tensor sides[2];
  at::ScalarType type;

  int64_t count() const { return sides[0].size(0); }
};

Problem problem_of(const at::Tensor& students, const at::Tensor& teachers) {
  const at::ScalarType type = row_type(students);
  return {{matrix("students", students, type), matrix("teachers", teachers, type, students.size(0))}, type};
}

template <class T>
RkdAngle<T> arguments(Call& call, const Problem& p) {
  RkdAngle<T> args{};
  for (int q = 0; q < 2; ++q) {
    args.sides[q] = sides_of<T>(p.sides[q], nullptr, 0);
    double* wide = call.zeros<double>(p.count());
    kernels<T>().row_dots(call.host(), {args.sides[q].rows, args.sides[q].rows, p.count(), args.sides[q].dim, wide});
    args.norms[q] = call.copy<T>(wide, p.count());
  }
  return args;
}

at::Tensor rkd_angle(const at::Tensor& students, const at::Tensor& teachers) {
  const Problem p = problem_of(students, teachers);
  at::Tensor sums = at::zeros({p.count()}, students.options().dtype(at::kDouble));
  GKD_DISPATCH(p.type, [&] {
    Call call;
    RkdAngle<scalar_t> args = arguments<scalar_t>(call, p);
    args.sums = sums.mutable_data_ptr<double>();
    kernels<scalar_t>().rkd_angle(call.host(), args);
  });
  return sums;
}

std::vector<at::Tensor> rkd_angle_backward(const at::Tensor& upstream, const at::Tensor& students,
                                           const at::Tensor& teachers, c10::List<bool> needs) {
  const Problem p = problem_of(students, teachers);
  TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, got ", needs.size());
  const at::Tensor g = vector("upstream", upstream, p.type, {p.count()});
  std::vector<at::Tensor> gradients;
  GKD_DISPATCH(p.type, [&] {
    Call call;
    RkdAngle<scalar_t> args = arguments<scalar_t>(call, p);
    args.upstream = g.const_data_ptr<scalar_t>();
    for (int q = 0; q < 2; ++q) {
      if (!needs.get(q)) continue;
      gradients.push_back(at::zeros_like(p.sides[q]));
      args.gradients[q] = gradients.back().template mutable_data_ptr<scalar_t>();
      args.weight_sums[q] = call.template zeros<double>(p.count());
    }
    if (!gradients.empty()) kernels<scalar_t>().rkd_angle(call.host(), args);
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("rkd_angle", &rkd_angle);
  library.impl("rkd_angle_backward", &rkd_angle_backward);
}

}  // namespace gkd::angle
