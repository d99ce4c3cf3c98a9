#include <torch/library.h>

#include "relation_kl_ops.h"

namespace gkd::relation {
namespace {

Stages second_order(Stages stages) {
  stages.product = second_order_product;
  return stages;
}

Directions directions_of(const Stages& stages, at::TensorList tangents, const c10::List<bool>& moving,
                         const std::optional<at::TensorList>& column_tangents) {
  TORCH_CHECK(int64_t(moving.size()) == stages.count(), "moving must have ", stages.count(), " entries, got ",
              moving.size());
  TORCH_CHECK(stages.symmetric == !column_tangents.has_value(), "column_tangents and the column set go together");
  auto spread = [&](const char* name, at::TensorList given, int64_t rows) {
    std::vector<at::Tensor> out(stages.count());
    size_t next = 0;
    for (int64_t q = 0; q < stages.count(); ++q) {
      if (!moving.get(q)) continue;
      TORCH_CHECK(next < given.size(), name, " must have one for each moving stage, got ", given.size());
      out[q] = matrix(name, given[next++], stages.type, rows, stages.rows[q].size(1));
    }
    TORCH_CHECK(next == given.size(), name, " must have one for each moving stage, got ", given.size());
    return out;
  };
  Directions directions;
  directions.rows = spread("tangents", tangents, stages.row_count);
  directions.columns =
      stages.symmetric ? directions.rows : spread("column_tangents", *column_tangents, stages.column_count);
  return directions;
}

// The tangents of losses and log-sums.
template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> tangent(const Stages& stages, double temperature, double bandwidth,
                                                       int64_t offset, const Statistics<T>& side,
                                                       const Directions& directions) {
  Call call(stages.product);
  RelationKlTangent<T> second{};
  RelationKl<T>& args = second.relations = arguments<T>(stages, temperature, bandwidth, offset);
  const int64_t rows = stages.row_count, S = stages.students, R = stages.teachers, count = stages.count();
  const bool shared = shares_shift(temperature);
  set_directions(second, directions, bandwidth);
  auto log_sum = [&](int64_t q) {
    return (q < S ? side.student_log_sums + q * rows : side.teacher_log_sums + (q - S) * rows);
  };
  for (int64_t q = 0; !shared && q < count; ++q) {
    T* shifts = call.zeros<T>(rows);
    for (int64_t i = 0; i < rows; ++i) shifts[i] = T(log_sum(q)[i] * kLog2E);
    args.shifts[q] = {shifts, stages.symmetric ? shifts : call.zeros<T>(stages.column_count)};
  }
  args.sums = call.zeros<double>(2 * count * rows);
  args.pair_sums = call.zeros<double>(S * R * rows);
  kernels<T>().relation_kl_tangent(call.host(), second);

  const auto options = stages.rows[0].options();
  at::Tensor losses = at::empty({rows, S, R}, options);
  const auto wide = options.dtype(at::kDouble);
  at::Tensor log_sums[] = {at::empty({S, rows}, wide), at::empty({R, rows}, wide)};
  T* loss = losses.mutable_data_ptr<T>();
  double* out[] = {log_sums[0].mutable_data_ptr<double>(), log_sums[1].mutable_data_ptr<double>()};
  for (int64_t i = 0; i < rows; ++i) {
    double inverse[kMaxStages], moved[kMaxStages], log_z[kMaxStages];  // of U's
    for (int64_t q = 0; q < count; ++q) {
      // Z of the same roundings as its tangent where the columns are all; else of the log-sums, so that tangents add up.
      const double shift = shared ? args.outer : args.shifts[q].row[i];
      const double z = stages.symmetric ? args.sums[(count + q) * rows + i] : std::exp(log_sum(q)[i] - shift * kLn2);
      log_z[q] = std::log(z);
      inverse[q] = 1 / (temperature * z);
      moved[q] = args.sums[q * rows + i] * inverse[q];
      (q < S ? out[0][q * rows + i] : out[1][(q - S) * rows + i]) = moved[q];
    }
    // ℓ̇ = Σ_j P^t [Δ L̇^t − L̇^s] − h (log Z^t)˙ + (log Z^s)˙, h = ℓ + log Z^t/Z^s
    for (int64_t p = 0; p < S * R; ++p) {
      const int64_t s = p / R, q = S + p % R;
      const double h = side.losses[i * S * R + p] + log_z[q] - log_z[s];
      loss[i * S * R + p] = T(args.pair_sums[p * rows + i] * inverse[q] - h * moved[q] + moved[s]);
    }
  }
  return {losses, log_sums[0], log_sums[1]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_kl_tangent(
    at::TensorList students, at::TensorList teachers, at::TensorList tangents, c10::List<bool> moving,
    const at::Tensor& losses, const at::Tensor& student_log_sums, const at::Tensor& teacher_log_sums,
    double temperature, double bandwidth, c10::string_view product_precision,
    std::optional<at::TensorList> student_columns, std::optional<at::TensorList> teacher_columns,
    std::optional<at::TensorList> column_tangents, int64_t offset) {
  const Stages stages =
      second_order(stages_of(students, teachers, student_columns, teacher_columns, product_precision));
  const Directions directions = directions_of(stages, tangents, moving, column_tangents);
  Side own{{}, losses, student_log_sums, teacher_log_sums};
  own.check("", stages, stages.row_count);
  return GKD_DISPATCH(stages.type, [&] {
    return tangent<scalar_t>(stages, temperature, bandwidth, offset, own.statistics<scalar_t>(stages.row_count),
                             directions);
  });
}

std::vector<at::Tensor> relation_kl_double_backward(
    const at::Tensor& upstream, at::TensorList students, at::TensorList teachers, at::TensorList tangents,
    c10::List<bool> moving, const at::Tensor& losses, const at::Tensor& student_log_sums,
    const at::Tensor& teacher_log_sums, const at::Tensor& loss_tangents, const at::Tensor& student_log_sum_tangents,
    const at::Tensor& teacher_log_sum_tangents, double temperature, double bandwidth,
    c10::string_view product_precision, c10::List<bool> needs, std::optional<at::TensorList> student_columns,
    std::optional<at::TensorList> teacher_columns, std::optional<at::TensorList> column_tangents, int64_t offset,
    const std::optional<at::Tensor>& column_upstream, const std::optional<at::Tensor>& column_losses,
    const std::optional<at::Tensor>& column_student_log_sums, const std::optional<at::Tensor>& column_teacher_log_sums,
    const std::optional<at::Tensor>& column_loss_tangents,
    const std::optional<at::Tensor>& column_student_log_sum_tangents,
    const std::optional<at::Tensor>& column_teacher_log_sum_tangents) {
  const Stages stages =
      second_order(stages_of(students, teachers, student_columns, teacher_columns, product_precision));
  const Directions directions = directions_of(stages, tangents, moving, column_tangents);
  return gradients_of(stages,
                      {upstream, losses, student_log_sums, teacher_log_sums, loss_tangents, student_log_sum_tangents,
                       teacher_log_sum_tangents},
                      {given(column_upstream), given(column_losses), given(column_student_log_sums),
                       given(column_teacher_log_sums), given(column_loss_tangents),
                       given(column_student_log_sum_tangents), given(column_teacher_log_sum_tangents)},
                      temperature, bandwidth, needs, offset, &directions);
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("relation_kl_tangent", &relation_kl_tangent);
  library.impl("relation_kl_double_backward", &relation_kl_double_backward);
}

}  // namespace gkd::relation
