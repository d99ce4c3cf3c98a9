#include <torch/library.h>

#include "relation_kl_ops.h"

namespace gkd::relation {
namespace {

// Each row's own shift: its largest logit, in base 2, of its largest inner exponent. The diagonal's logit is 0.
template <class T>
void set_own_shifts(Call& call, RelationKl<T>& args, const Stages& sizes) {
  const int64_t rows = sizes.row_count;
  T* maxima[kMaxStages];
  const int64_t stages = args.students + args.teachers;
  for (int64_t q = 0; q < stages; ++q) {
    maxima[q] = call.zeros<T>(rows);
    std::fill(maxima[q], maxima[q] + rows, T(-1e30));
  }
  kernels<T>().relation_kl_maxima(call.host(), args, maxima);
  for (int64_t q = 0; q < stages; ++q) {
    T* shift = maxima[q];
    for (int64_t i = 0; i < rows; ++i) shift[i] = std::exp2(std::min(maxima[q][i], T(0))) * args.outer;
    args.shifts[q] = {shift, shift};
    if (sizes.symmetric) continue;
    // Nothing of the columns' own is summed: any shift will do that keeps V finite.
    T* column_shift = call.zeros<T>(sizes.column_count);
    std::fill(column_shift, column_shift + sizes.column_count, args.outer);
    args.shifts[q].column = column_shift;
  }
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const Stages& stages, double temperature, double bandwidth,
                                                       int64_t offset, const at::Tensor& affinities = {}) {
  Call call(stages.product);
  RelationKl<T> args = arguments<T>(stages, temperature, bandwidth, offset);
  const int64_t rows = stages.row_count, S = stages.students, count = stages.count();
  if (!shares_shift(temperature)) set_own_shifts(call, args, stages);
  args.affinities = kept<T>(affinities, rows, count);
  args.sums = call.zeros<double>(count * rows);
  args.divergences = stages.product == Product::bfloat16;
  args.pair_sums = call.zeros<double>((args.divergences ? 2 : 1) * S * stages.teachers * rows);
  kernels<T>().relation_kl(call.host(), args);

  const auto options = stages.rows[0].options();
  at::Tensor losses = at::empty({rows, S, stages.teachers}, options);
  const auto wide = options.dtype(at::kDouble);
  at::Tensor log_sums[] = {at::empty({S, rows}, wide), at::empty({stages.teachers, rows}, wide)};
  T* loss = losses.mutable_data_ptr<T>();
  double* log_sum[] = {log_sums[0].mutable_data_ptr<double>(), log_sums[1].mutable_data_ptr<double>()};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t q = 0; q < count; ++q) {
      const double shift = args.shifts[q].row ? args.shifts[q].row[i] : double(args.outer);
      (q < S ? log_sum[0][q * rows + i] : log_sum[1][(q - S) * rows + i]) = std::log(args.sums[q * rows + i]) + shift * kLn2;
    }
    // ℓ = ln2·Q/Z^t + log Z^s/Z^t: the shifts cancel. With the divergences' sum and y = Z^s/Z^t − 1 it is that sum over
    // Z^t less y − log(1 + y), of which small y leave little.
    for (int64_t p = 0; p < S * stages.teachers; ++p) {
      const int64_t s = p / stages.teachers, q = S + p % stages.teachers;
      const double z = args.sums[q * rows + i], student_z = args.sums[s * rows + i], y = (student_z - z) / z;
      const double* sums = args.pair_sums + (args.divergences ? 2 : 1) * p * rows + i;
      const double ell = args.divergences && std::abs(y) < 0.5 ? sums[rows] / z - (y - std::log1p(y))
                                                               : kLn2 * sums[0] / z - std::log(z) + std::log(student_z);
      loss[i * S * stages.teachers + p] = not_below_zero(T(ell));
    }
  }
  return {losses, log_sums[0], log_sums[1]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_kl(
    at::TensorList students, at::TensorList teachers, double temperature, double bandwidth,
    c10::string_view product_precision, std::optional<at::TensorList> student_columns,
    std::optional<at::TensorList> teacher_columns, int64_t offset) {
  const Stages stages = stages_of(students, teachers, student_columns, teacher_columns, product_precision);
  return GKD_DISPATCH(stages.type, [&] { return forward<scalar_t>(stages, temperature, bandwidth, offset); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relation_kl_keep(
    at::TensorList students, at::TensorList teachers, double temperature, double bandwidth,
    c10::string_view product_precision) {
  const Stages stages = stages_of(students, teachers, {}, {}, product_precision);
  const at::Tensor affinities = affinities_of(stages.rows);
  return std::tuple_cat(
      GKD_DISPATCH(stages.type, [&] { return forward<scalar_t>(stages, temperature, bandwidth, 0, affinities); }),
      std::make_tuple(affinities));
}

std::vector<at::Tensor> relation_kl_backward(
    const at::Tensor& upstream, at::TensorList students, at::TensorList teachers, const at::Tensor& losses,
    const at::Tensor& student_log_sums, const at::Tensor& teacher_log_sums, double temperature, double bandwidth,
    c10::string_view product_precision, c10::List<bool> needs, std::optional<at::TensorList> student_columns,
    std::optional<at::TensorList> teacher_columns, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_losses, const std::optional<at::Tensor>& column_student_log_sums,
    const std::optional<at::Tensor>& column_teacher_log_sums, const std::optional<at::Tensor>& affinities) {
  const Stages stages = stages_of(students, teachers, student_columns, teacher_columns, product_precision);
  TORCH_CHECK(stages.symmetric || !affinities, "affinities are kept where the columns are the rows");
  return gradients_of(stages, {upstream, losses, student_log_sums, teacher_log_sums},
                      {given(column_upstream), given(column_losses), given(column_student_log_sums),
                       given(column_teacher_log_sums)},
                      temperature, bandwidth, needs, offset, nullptr, given(affinities));
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("relation_kl", &relation_kl);
  library.impl("relation_kl_keep", &relation_kl_keep);
  library.impl("relation_kl_backward", &relation_kl_backward);
}

}  // namespace gkd::relation
