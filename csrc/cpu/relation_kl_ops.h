// What the ops of relation_kl's first and second order share: stages, their statistics, and the gradients of both.
#pragma once
#include <cmath>

#include "host.h"

namespace gkd::relation {

// Up to this 1/τ the sums of exp(L − 1/τ) cannot underflow in float32.
constexpr double kLargestSharedShift = 80;

struct Stages {
  std::vector<at::Tensor> rows, columns;
  int64_t students, teachers, row_count, column_count;
  bool symmetric;
  at::ScalarType type;
  Product product;
  int64_t count() const { return students + teachers; }
};

inline Stages stages_of(at::TensorList students, at::TensorList teachers, const std::optional<at::TensorList>& student_columns,
                 const std::optional<at::TensorList>& teacher_columns, c10::string_view product_precision) {
  TORCH_CHECK(!students.empty() && !teachers.empty(), "relation_kl needs a student and a teacher");
  Stages stages;
  stages.students = students.size();
  stages.teachers = teachers.size();
  TORCH_CHECK(stages.count() <= kMaxStages, "relation_kl takes at most ", kMaxStages, " stages, got ", stages.count());
  stages.type = row_type(students[0]);
  stages.product = product_of(product_precision, stages.type);
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

inline bool shares_shift(double temperature) { return 1 / temperature <= kLargestSharedShift; }

// Upstream, losses and log-sums of one side, and for the second order the tangents of losses and log-sums.
template <class T>
struct Statistics {
  const T* upstream;  // [count, S, T], or null: zero
  const T* losses;    // [count, S, T], or null
  const double *student_log_sums, *teacher_log_sums;
  int64_t count;
  const T* loss_tangents;
  const double *student_log_sum_tangents, *teacher_log_sum_tangents;
};

// Each stage's direction, undefined where it stands still, of rows and columns.
struct Directions {
  std::vector<at::Tensor> rows, columns;
};

template <class T>
void set_directions(RelationKlTangent<T>& second, const Directions& directions, double bandwidth) {
  second.inverse_variance = T(1 / (bandwidth * bandwidth));
  for (size_t q = 0; q < directions.rows.size(); ++q) {
    if (!directions.rows[q].defined()) continue;
    second.tangents[q] = {directions.rows[q].template const_data_ptr<T>(),
                          directions.columns[q].template const_data_ptr<T>()};
  }
}

// The factors on one side: α, β with 1/(σ²τ), and h of relation_kl.h. With each row's own shift U is nearly P already.
// Their tangents, for the second order:  α̇ = −α (log Z^s)˙,  β̇ = −β (log Z^t)˙,  ḣ = ℓ˙ + (log Z^t)˙ − (log Z^s)˙.
template <class T>
struct Factors {
  T *alpha[kMaxStages], *alpha_tangents[kMaxStages];
  std::vector<T*> beta, beta_tangents;
  std::vector<WideNumbers<T>> levels, level_tangents;
  T* shifts[kMaxStages];

  Factors(Call& call, const RelationKl<T>& args, const Statistics<T>& side, double scale, bool shared) {
    const int64_t S = args.students, R = args.teachers, count = side.count;
    for (int64_t s = 0; s < S; ++s) alpha[s] = call.zeros<T>(count), alpha_tangents[s] = call.zeros<T>(count);
    for (int64_t p = 0; p < S * R; ++p) {
      beta.push_back(call.zeros<T>(count));
      beta_tangents.push_back(call.zeros<T>(count));
      levels.emplace_back(call, count);
      level_tangents.emplace_back(call, count);
    }
    for (int64_t q = 0; q < S + R; ++q) {
      shifts[q] = shared ? nullptr : call.zeros<T>(count);
      // R/τ ≤ 1/τ: without an upstream any shift will do that keeps U finite.
      if (!shared) std::fill(shifts[q], shifts[q] + count, args.outer);
    }
    if (!side.upstream) return;
    for (int64_t i = 0; i < count; ++i) {
      double inverse[kMaxStages], log_z[kMaxStages], alphas[kMaxStages] = {}, moved_alphas[kMaxStages] = {};
      for (int64_t q = 0; q < S + R; ++q) {
        log_z[q] = q < S ? side.student_log_sums[q * count + i] : side.teacher_log_sums[(q - S) * count + i];
        if (!shared) shifts[q][i] = T(log_z[q] * kLog2E);
        // log Z of U's: less a shared shift, or what the own one was rounded by.
        log_z[q] -= (shared ? args.outer : shifts[q][i]) * kLn2;
        inverse[q] = std::exp(-log_z[q]);
      }
      for (int64_t p = 0; p < S * R; ++p) {
        const int64_t s = p / R, t = p % R;
        const double g = side.upstream[i * S * R + p] * scale, b = g * inverse[S + t];
        alphas[s] += g * inverse[s];
        beta[p][i] = T(b);
        if (side.losses) levels[p].set(i, (side.losses[i * S * R + p] + log_z[S + t] - log_z[s]) * kLog2E);
        if (!side.loss_tangents) continue;
        const double moved_s = side.student_log_sum_tangents[s * count + i];
        const double moved_t = side.teacher_log_sum_tangents[t * count + i];
        moved_alphas[s] -= g * inverse[s] * moved_s;
        beta_tangents[p][i] = T(-b * moved_t);
        level_tangents[p].set(i, side.loss_tangents[i * S * R + p] + moved_t - moved_s);
      }
      for (int64_t s = 0; s < S; ++s) alpha[s][i] = T(alphas[s]), alpha_tangents[s][i] = T(moved_alphas[s]);
    }
  }
};

// The gradients, or along directions their tangents.
template <class T>
std::vector<at::Tensor> backward(const Stages& stages, double temperature, double bandwidth, int64_t offset,
                                 const Statistics<T>& row_side, const Statistics<T>& column_side,
                                 const c10::List<bool>& needs, const Directions* directions,
                                 const at::Tensor& affinities) {
  Call call(stages.product);
  RelationKlTangent<T> second{};
  RelationKl<T>& args = second.relations = arguments<T>(stages, temperature, bandwidth, offset);
  const bool shared = shares_shift(temperature);
  const double scale = 1 / (bandwidth * bandwidth * temperature);
  const Factors<T> row(call, args, row_side, scale, shared);
  std::optional<Factors<T>> other;
  if (!stages.symmetric) other.emplace(call, args, column_side, scale, shared);
  const Factors<T>& column = stages.symmetric ? row : *other;
  std::vector<Terms<T>> beta, beta_tangents;
  std::vector<WideTerms<T>> levels, level_tangents;
  for (size_t p = 0; p < row.beta.size(); ++p) {
    beta.push_back({row.beta[p], column.beta[p]});
    beta_tangents.push_back({row.beta_tangents[p], column.beta_tangents[p]});
    levels.push_back(wide_terms(row.levels[p], column.levels[p]));
    level_tangents.push_back(wide_terms(row.level_tangents[p], column.level_tangents[p]));
  }
  args.beta = beta.data();
  args.levels = levels.data();
  second.beta = beta_tangents.data();
  second.levels = level_tangents.data();
  std::vector<at::Tensor> gradients;
  for (int64_t q = 0; q < stages.count(); ++q) {
    if (q < args.students) {
      args.alpha[q] = {row.alpha[q], column.alpha[q]};
      second.alpha[q] = {row.alpha_tangents[q], column.alpha_tangents[q]};
    }
    if (!shared) args.shifts[q] = {row.shifts[q], column.shifts[q]};
    if (!needs.get(q)) continue;
    gradients.push_back(at::zeros_like(stages.rows[q]));
    args.gradients[q] = gradients.back().template mutable_data_ptr<T>();
  }
  if (gradients.empty()) return gradients;
  if (!directions) {
    args.affinities = kept<T>(affinities, stages.row_count, stages.count());
    kernels<T>().relation_kl_backward(call.host(), args);
  } else {
    set_directions(second, *directions, bandwidth);
    kernels<T>().relation_kl_double_backward(call.host(), second);
  }
  return gradients;
}

// The tensors of one side: upstream, losses, log-sums, and for the second order the tangents of the last three.
struct Side {
  at::Tensor upstream, losses, student_log_sums, teacher_log_sums;
  at::Tensor loss_tangents, student_log_sum_tangents, teacher_log_sum_tangents;

  // Checks those that are there.
  void check(const char* side, const Stages& stages, int64_t count) {
    const int64_t S = stages.students, R = stages.teachers;
    const std::string prefix = side;
    auto take = [&](const char* name, at::Tensor& x, at::ScalarType type, std::vector<int64_t> shape) {
      if (x.defined()) x = vector((prefix + name).c_str(), x, type, std::move(shape));
    };
    take("upstream", upstream, stages.type, {count, S, R});
    take("losses", losses, stages.type, {count, S, R});
    take("student_log_sums", student_log_sums, at::kDouble, {S, count});
    take("teacher_log_sums", teacher_log_sums, at::kDouble, {R, count});
    take("loss_tangents", loss_tangents, stages.type, {count, S, R});
    take("student_log_sum_tangents", student_log_sum_tangents, at::kDouble, {S, count});
    take("teacher_log_sum_tangents", teacher_log_sum_tangents, at::kDouble, {R, count});
  }

  template <class T>
  Statistics<T> statistics(int64_t count) const {
    auto data = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; };
    auto wide = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<double>() : nullptr; };
    return {data(upstream), data(losses), wide(student_log_sums), wide(teacher_log_sums), count,
            data(loss_tangents), wide(student_log_sum_tangents), wide(teacher_log_sum_tangents)};
  }
};

inline at::Tensor given(const std::optional<at::Tensor>& x) { return x ? *x : at::Tensor(); }

inline std::vector<at::Tensor> gradients_of(const Stages& stages, Side own, Side columns, double temperature,
                                     double bandwidth, const c10::List<bool>& needs, int64_t offset,
                                     const Directions* directions, const at::Tensor& affinities = {}) {
  TORCH_CHECK(int64_t(needs.size()) == stages.count(), "needs must have ", stages.count(), " entries, got ",
              needs.size());
  bool needs_teacher = false;
  for (int64_t q = stages.students; q < stages.count(); ++q) needs_teacher = needs_teacher || needs.get(q);
  own.check("", stages, stages.row_count);
  if (stages.symmetric || !columns.upstream.defined()) columns = {};
  columns.check("column_", stages, stages.column_count);
  if (columns.upstream.defined()) {
    TORCH_CHECK(columns.student_log_sums.defined() && columns.teacher_log_sums.defined() &&
                    (columns.losses.defined() || !needs_teacher),
                "column_upstream needs the columns' log-sums, and their losses for a teacher's gradient");
    TORCH_CHECK(!directions || (columns.losses.defined() && columns.loss_tangents.defined() &&
                                columns.student_log_sum_tangents.defined() &&
                                columns.teacher_log_sum_tangents.defined()),
                "column_upstream needs the columns' losses and the tangents of losses and log-sums");
  }
  return GKD_DISPATCH(stages.type, [&] {
    return backward<scalar_t>(stages, temperature, bandwidth, offset, own.statistics<scalar_t>(stages.row_count),
                              columns.statistics<scalar_t>(stages.column_count), needs, directions, affinities);
  });
}

}  // namespace gkd::relation
