#include <torch/library.h>

#include <cmath>

#include "node_contrast.h"

namespace gkd::contrast {
namespace {

// Each row's shift in base 2: the bound 1/τ of all logits, or where the sum could underflow its own largest logit.
template <class T>
T* row_shifts(Call& call, SoftmaxSums<T> args, double temperature) {
  const int64_t rows = args.sides.row_count;
  T* shift = call.zeros<T>(rows);
  if (2 / temperature <= kLargestSharedShift) {
    std::fill(shift, shift + rows, args.scale);
    return shift;
  }
  args.maxima = shift;
  std::fill(shift, shift + rows, T(-1e30));
  kernels<T>().softmax_sums(call.host(), args);
  for (int64_t i = 0; i < rows; ++i) shift[i] *= args.scale;
  return shift;
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const Stages& stages, const std::vector<at::Tensor>& columns,
                                                       bool own_teacher, int64_t offset, double temperature,
                                                       bool keep_weighted) {
  const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
  const int64_t pairs = stages.pairs.size();
  const auto options = stages.students[0].options();
  at::Tensor losses = at::zeros({rows, S, R}, options);
  at::Tensor log_sums = at::empty({pairs, rows}, options.dtype(at::kDouble));
  at::Tensor weighted = keep_weighted ? at::zeros({pairs, rows, dim}, options) : at::empty({0}, options);
  for (const Pair& pair : stages.pairs) {
    Call call(stages.product);
    const at::Tensor &student = stages.students[pair.student], &teacher = columns[pair.teacher];
    SoftmaxSums<T> args = arguments<T>(student, teacher, temperature);
    args.row_shift = row_shifts(call, args, temperature);
    args.sums = call.template zeros<double>(rows);
    if (keep_weighted) {
      args.values = args.sides.columns;
      args.weighted = weighted.mutable_data_ptr<T>() + pair.place * rows * dim;
      if (stages.product == Product::bfloat16) args.weight_sums = call.template zeros<double>(rows);
    }
    // Rounded tiles' own cosines cancel with those that the sums are made of.
    if (own_teacher && stages.product == Product::bfloat16) {
      args.own_cosines = call.template zeros<T>(rows);
      args.sides.offset = offset;
      if (keep_weighted) args.own_weights = call.template zeros<T>(2 * rows);
    }
    kernels<T>().softmax_sums(call.host(), args);
    double* own = call.template zeros<double>(rows);
    if (args.own_cosines) {
      std::copy(args.own_cosines, args.own_cosines + rows, own);
    } else if (own_teacher) {
      const T* partners = stages.teachers[pair.teacher].const_data_ptr<T>();
      kernels<T>().row_dots(call.host(), {args.sides.rows, partners, rows, dim, own});
    }
    T* loss = losses.mutable_data_ptr<T>() + pair.student * R + pair.teacher;
    double* log_sum = log_sums.mutable_data_ptr<double>() + pair.place * rows;
    for (int64_t i = 0; i < rows; ++i) {
      const double log_z = std::log(args.sums[i]) + args.row_shift[i] * kLn2;
      log_sum[i] = log_z;
      // Without the own column this is the log-sum alone.
      const T ell = T(log_z - own[i] / temperature);
      loss[i * S * R] = own_teacher ? not_below_zero(ell) : ell;
    }
    // The mean under the weights as they were multiplied: their roundings cancel where columns are alike.
    const double* divisors = args.weight_sums ? args.weight_sums : args.sums;
    if (keep_weighted) scale_rows(args.weighted, divisors, rows, dim, [](double z) { return 1 / z; });
  }
  return {losses, log_sums, weighted};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> node_contrast(
    at::TensorList students, at::TensorList teachers, c10::List<bool> wanted, double temperature,
    c10::string_view product_precision, bool keep_weighted, std::optional<at::TensorList> teacher_columns,
    int64_t offset) {
  const Stages stages = stages_of(students, teachers, wanted, product_precision);
  const auto columns = columns_of("teacher_columns", teacher_columns, stages.teachers, stages);
  const bool own_teacher = includes_own(teacher_columns, stages, offset);
  return GKD_DISPATCH(stages.type,
                      [&] {
                        return forward<scalar_t>(stages, columns, own_teacher, teacher_columns ? offset : 0, temperature,
                                                 keep_weighted);
                      });
}

std::vector<at::Tensor> node_contrast_backward(
    const at::Tensor& upstream, at::TensorList students, at::TensorList teachers, const at::Tensor& log_sums,
    const at::Tensor& weighted, c10::List<bool> wanted, double temperature, c10::string_view product_precision,
    c10::List<bool> needs, std::optional<at::TensorList> teacher_columns,
    std::optional<at::TensorList> student_columns, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_log_sums) {
  const Stages stages = stages_of(students, teachers, wanted, product_precision);
  const auto all_teachers = columns_of("teacher_columns", teacher_columns, stages.teachers, stages);
  const auto all_students = columns_of("student_columns", student_columns, stages.students, stages);
  TORCH_CHECK(!column_upstream || student_columns, "column_upstream needs student_columns and column_log_sums");
  const Backward backward =
      backward_of(stages, upstream, log_sums, weighted, temperature, all_students, all_teachers,
                  !teacher_columns && !student_columns, includes_own(teacher_columns, stages, offset),
                  includes_own(student_columns, stages, offset), teacher_columns ? offset : 0,
                  student_columns ? offset : 0, column_upstream,
                  column_log_sums);
  return GKD_DISPATCH(stages.type, [&] {
    return collect(
        stages, needs, [&](const Pair& pair, const at::Tensor& x) { backward.student<scalar_t>(pair, x); },
        [&](const Pair& pair, const at::Tensor& x) { backward.teacher<scalar_t>(pair, x); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("node_contrast", &node_contrast);
  library.impl("node_contrast_backward", &node_contrast_backward);
}

}  // namespace gkd::contrast
