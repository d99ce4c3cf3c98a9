#include <torch/library.h>

#include <cmath>

#include "host.h"

namespace gkd {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// Up to this 1/τ the sums of exp(L − 1/τ) cannot underflow in float32.
constexpr double kLargestSharedShift = 80;

struct Stages {
  std::vector<at::Tensor> rows, columns;
  int64_t students, teachers, row_count, column_count;
  bool symmetric;
  at::ScalarType type;
  int64_t count() const { return students + teachers; }
};

Stages stages_of(at::TensorList students, at::TensorList teachers, const std::optional<at::TensorList>& student_columns,
                 const std::optional<at::TensorList>& teacher_columns) {
  TORCH_CHECK(!students.empty() && !teachers.empty(), "relation_kl needs a student and a teacher");
  Stages stages;
  stages.students = students.size();
  stages.teachers = teachers.size();
  TORCH_CHECK(stages.count() <= kMaxStages, "relation_kl takes at most ", kMaxStages, " stages, got ", stages.count());
  stages.type = row_type(students[0]);
  stages.row_count = students[0].size(0);
  stages.rows = matrices("students", students, stages.type, stages.row_count);
  for (at::Tensor& x : matrices("teachers", teachers, stages.type, stages.row_count)) stages.rows.push_back(x);
  stages.symmetric = !student_columns.has_value();
  TORCH_CHECK(stages.symmetric == !teacher_columns.has_value(), "student_columns and teacher_columns go together");
  stages.column_count = stages.row_count;
  if (stages.symmetric) return stages;
  TORCH_CHECK(student_columns->size() == students.size() && teacher_columns->size() == teachers.size(),
              "the column set must have the stages of the row set");
  stages.column_count = (*student_columns)[0].size(0);
  stages.columns = matrices("student_columns", *student_columns, stages.type, stages.column_count);
  for (at::Tensor& x : matrices("teacher_columns", *teacher_columns, stages.type, stages.column_count)) {
    stages.columns.push_back(x);
  }
  for (int64_t q = 0; q < stages.count(); ++q) {
    TORCH_CHECK(stages.rows[q].size(1) == stages.columns[q].size(1), "rows and columns of a stage must share a width");
  }
  return stages;
}

template <class T>
RelationKl<T> arguments(const Stages& stages, double temperature, double bandwidth, int64_t offset) {
  RelationKl<T> args{};
  args.students = stages.students;
  args.teachers = stages.teachers;
  args.inner = T(kLog2E / (bandwidth * bandwidth));
  args.outer = T(kLog2E / temperature);
  args.inverse_temperature = T(1 / temperature);
  for (int64_t q = 0; q < stages.count(); ++q) {
    args.stages[q] = sides_of<T>(stages.rows[q], stages.symmetric ? nullptr : &stages.columns[q], offset);
  }
  return args;
}

bool shares_shift(double temperature) { return 1 / temperature <= kLargestSharedShift; }

// Each row's own shift: its largest logit, in base 2. The diagonal's logit is 0.
template <class T>
void set_own_shifts(Call& call, RelationKl<T>& args, int64_t rows) {
  T* maxima[kMaxStages];
  const int64_t stages = args.students + args.teachers;
  for (int64_t q = 0; q < stages; ++q) {
    maxima[q] = call.zeros<T>(rows);
    std::fill(maxima[q], maxima[q] + rows, T(-1e30));
  }
  kernels<T>().relation_kl_maxima(call.host(), args, maxima);
  for (int64_t q = 0; q < stages; ++q) {
    T* shift = maxima[q];
    for (int64_t i = 0; i < rows; ++i) shift[i] = std::exp2((maxima[q][i] - T(1)) * args.inner) * args.outer;
    args.shifts[q] = {shift, shift};
  }
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const Stages& stages, double temperature, double bandwidth,
                                                       int64_t offset) {
  Call call;
  RelationKl<T> args = arguments<T>(stages, temperature, bandwidth, offset);
  const int64_t rows = stages.row_count, S = stages.students, count = stages.count();
  if (!shares_shift(temperature)) set_own_shifts(call, args, rows);
  args.sums = call.zeros<double>(count * rows);
  args.pair_sums = call.zeros<double>(S * stages.teachers * rows);
  kernels<T>().relation_kl(call.host(), args);

  const auto options = stages.rows[0].options();
  at::Tensor losses = at::empty({rows, S, stages.teachers}, options), log_sums = at::empty({count, rows}, options);
  T* loss = losses.mutable_data_ptr<T>();
  T* log_sum = log_sums.mutable_data_ptr<T>();
  for (int64_t i = 0; i < rows; ++i) {
    double log_z[kMaxStages];
    for (int64_t q = 0; q < count; ++q) {
      const double shift = args.shifts[q].row ? args.shifts[q].row[i] : double(args.outer);
      log_z[q] = std::log(args.sums[q * rows + i]) + shift * kLn2;
      log_sum[q * rows + i] = T(log_z[q]);
    }
    // ℓ = Q/Z^t − log Z^t + log Z^s
    for (int64_t p = 0; p < S * stages.teachers; ++p) {
      const int64_t s = p / stages.teachers, q = S + p % stages.teachers;
      loss[i * S * stages.teachers + p] =
          T(args.pair_sums[p * rows + i] / (temperature * args.sums[q * rows + i]) - log_z[q] + log_z[s]);
    }
  }
  return {losses, log_sums.slice(0, 0, S).clone(), log_sums.slice(0, S, count).clone()};
}

// Upstream, losses and log-sums of one side.
template <class T>
struct Statistics {
  const T* upstream;  // [count, S, T], or null: zero
  const T* losses;    // [count, S, T], or null
  const T *student_log_sums, *teacher_log_sums;
  int64_t count;
};

// The factors of U on one side: α, β, η of relation_kl.h with 1/(σ²τ); with each row's own shift they hold no 1/Z.
template <class T>
struct Factors {
  T *alpha[kMaxStages], *eta[kMaxStages];
  std::vector<T*> beta;
  T* shifts[kMaxStages];

  Factors(Call& call, const RelationKl<T>& args, const Statistics<T>& side, double scale, bool shared) {
    const int64_t S = args.students, R = args.teachers, count = side.count;
    for (int64_t s = 0; s < S; ++s) alpha[s] = call.zeros<T>(count);
    for (int64_t t = 0; t < R; ++t) eta[t] = call.zeros<T>(count);
    for (int64_t p = 0; p < S * R; ++p) beta.push_back(call.zeros<T>(count));
    for (int64_t q = 0; q < S + R; ++q) {
      shifts[q] = shared ? nullptr : call.zeros<T>(count);
      // R/τ ≤ 1/τ: without an upstream any shift will do that keeps U finite.
      if (!shared) std::fill(shifts[q], shifts[q] + count, args.outer);
    }
    if (!side.upstream) return;
    for (int64_t i = 0; i < count; ++i) {
      double inverse[kMaxStages], log_z[kMaxStages];
      for (int64_t q = 0; q < S + R; ++q) {
        log_z[q] = q < S ? side.student_log_sums[q * count + i] : side.teacher_log_sums[(q - S) * count + i];
        inverse[q] = shared ? std::exp(double(args.outer) * kLn2 - log_z[q]) : 1;
        if (!shared) shifts[q][i] = T(log_z[q] * kLog2E);
      }
      for (int64_t p = 0; p < S * R; ++p) {
        const int64_t s = p / R, t = p % R;
        const double g = side.upstream[i * S * R + p] * scale, b = g * inverse[S + t];
        alpha[s][i] += T(g * inverse[s]);
        beta[p][i] = T(b);
        if (side.losses) eta[t][i] += T(b * (side.losses[i * S * R + p] + log_z[S + t] - log_z[s]));
      }
    }
  }
};

template <class T>
std::vector<at::Tensor> backward(const Stages& stages, double temperature, double bandwidth, int64_t offset,
                                 const Statistics<T>& row_side, const Statistics<T>& column_side,
                                 const c10::List<bool>& needs) {
  Call call;
  RelationKl<T> args = arguments<T>(stages, temperature, bandwidth, offset);
  const bool shared = shares_shift(temperature);
  const double scale = 1 / (bandwidth * bandwidth * temperature);
  const Factors<T> row(call, args, row_side, scale, shared);
  std::optional<Factors<T>> other;
  if (!stages.symmetric) other.emplace(call, args, column_side, scale, shared);
  const Factors<T>& column = stages.symmetric ? row : *other;
  std::vector<Terms<T>> beta;
  for (size_t p = 0; p < row.beta.size(); ++p) beta.push_back({row.beta[p], column.beta[p]});
  args.beta = beta.data();
  std::vector<at::Tensor> gradients;
  for (int64_t q = 0; q < stages.count(); ++q) {
    if (q < args.students) args.alpha[q] = {row.alpha[q], column.alpha[q]};
    else args.eta[q - args.students] = {row.eta[q - args.students], column.eta[q - args.students]};
    if (!shared) args.shifts[q] = {row.shifts[q], column.shifts[q]};
    if (!needs.get(q)) continue;
    gradients.push_back(at::zeros_like(stages.rows[q]));
    args.gradients[q] = gradients.back().template mutable_data_ptr<T>();
  }
  if (!gradients.empty()) kernels<T>().relation_kl_backward(call.host(), args);
  return gradients;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_kl(
    at::TensorList students, at::TensorList teachers, double temperature, double bandwidth,
    c10::string_view product_precision, std::optional<at::TensorList> student_columns,
    std::optional<at::TensorList> teacher_columns, int64_t offset) {
  check_precision(product_precision);
  const Stages stages = stages_of(students, teachers, student_columns, teacher_columns);
  return GKD_DISPATCH(stages.type, [&] { return forward<scalar_t>(stages, temperature, bandwidth, offset); });
}

std::vector<at::Tensor> relation_kl_backward(
    const at::Tensor& upstream, at::TensorList students, at::TensorList teachers, const at::Tensor& losses,
    const at::Tensor& student_log_sums, const at::Tensor& teacher_log_sums, double temperature, double bandwidth,
    c10::string_view product_precision, c10::List<bool> needs, std::optional<at::TensorList> student_columns,
    std::optional<at::TensorList> teacher_columns, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_losses, const std::optional<at::Tensor>& column_student_log_sums,
    const std::optional<at::Tensor>& column_teacher_log_sums) {
  check_precision(product_precision);
  const Stages stages = stages_of(students, teachers, student_columns, teacher_columns);
  const int64_t S = stages.students, R = stages.teachers, I = stages.row_count, J = stages.column_count;
  TORCH_CHECK(int64_t(needs.size()) == S + R, "needs must have ", S + R, " entries, got ", needs.size());
  bool needs_teacher = false;
  for (int64_t q = S; q < S + R; ++q) needs_teacher = needs_teacher || needs.get(q);
  const auto type = stages.type;
  const at::Tensor own[] = {vector("upstream", upstream, type, {I, S, R}), vector("losses", losses, type, {I, S, R}),
                            vector("student_log_sums", student_log_sums, type, {S, I}),
                            vector("teacher_log_sums", teacher_log_sums, type, {R, I})};
  at::Tensor other[4];
  if (!stages.symmetric && column_upstream) {
    TORCH_CHECK(column_student_log_sums && column_teacher_log_sums && (column_losses || !needs_teacher),
                "column_upstream needs the columns' log-sums, and their losses for a teacher's gradient");
    other[0] = vector("column_upstream", *column_upstream, type, {J, S, R});
    if (needs_teacher) other[1] = vector("column_losses", *column_losses, type, {J, S, R});
    other[2] = vector("column_student_log_sums", *column_student_log_sums, type, {S, J});
    other[3] = vector("column_teacher_log_sums", *column_teacher_log_sums, type, {R, J});
  }
  return GKD_DISPATCH(type, [&] {
    using T = scalar_t;
    auto statistics = [&](const at::Tensor* x, int64_t count) {
      auto data = [](const at::Tensor& a) { return a.defined() ? a.const_data_ptr<T>() : nullptr; };
      return Statistics<T>{data(x[0]), data(x[1]), data(x[2]), data(x[3]), count};
    };
    return backward<T>(stages, temperature, bandwidth, offset, statistics(own, I), statistics(other, J), needs);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("relation_kl", &relation_kl);
  library.impl("relation_kl_backward", &relation_kl_backward);
}

}  // namespace gkd
