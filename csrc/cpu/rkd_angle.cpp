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

// One graph per sample: the first counts[g] rows of x[g].
at::Tensor of_graph(const at::Tensor& x, int64_t g, int64_t count) { return x.select(0, g).narrow(0, 0, count); }

void check_graphs(const at::Tensor& students, const at::Tensor& teachers, const at::Tensor& counts) {
  TORCH_CHECK(students.dim() == 3 && teachers.dim() == 3 && students.size(0) == teachers.size(0) &&
                  students.size(1) == teachers.size(1),
              "students and teachers must have shape [graphs, rows, width], got ", students.sizes(), " and ",
              teachers.sizes());
  TORCH_CHECK(counts.dim() == 1 && counts.size(0) == students.size(0), "counts must have shape [", students.size(0),
              "], got ", counts.sizes());
}

at::Tensor batched_rkd_angle(const at::Tensor& students, const at::Tensor& teachers, const at::Tensor& counts) {
  check_graphs(students, teachers, counts);
  at::Tensor sums = at::zeros({students.size(0), students.size(1)}, students.options().dtype(at::kDouble));
  for_graphs(counts, students.size(1), [&](int64_t g, int64_t count) {
    of_graph(sums, g, count).copy_(rkd_angle(of_graph(students, g, count), of_graph(teachers, g, count)));
  });
  return sums;
}

std::vector<at::Tensor> batched_rkd_angle_backward(const at::Tensor& upstream, const at::Tensor& students,
                                                   const at::Tensor& teachers, c10::List<bool> needs,
                                                   const at::Tensor& counts) {
  check_graphs(students, teachers, counts);
  TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, got ", needs.size());
  std::vector<at::Tensor> gradients;
  if (needs.get(0)) gradients.push_back(at::zeros_like(students));
  if (needs.get(1)) gradients.push_back(at::zeros_like(teachers));
  for_graphs(counts, students.size(1), [&](int64_t g, int64_t count) {
    const std::vector<at::Tensor> own = rkd_angle_backward(of_graph(upstream, g, count), of_graph(students, g, count),
                                                           of_graph(teachers, g, count), needs);
    for (size_t q = 0; q < own.size(); ++q) of_graph(gradients[q], g, count).copy_(own[q]);
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("rkd_angle", &rkd_angle);
  library.impl("rkd_angle_backward", &rkd_angle_backward);
  library.impl("batched_rkd_angle", &batched_rkd_angle);
  library.impl("batched_rkd_angle_backward", &batched_rkd_angle_backward);
}

}  // namespace gkd::angle
