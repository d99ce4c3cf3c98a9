#include <torch/library.h>

#include "node_contrast.h"

namespace gkd::contrast {
namespace {

// Each stage's direction, undefined where it stands still, of rows and columns; students first.
struct Directions {
  std::vector<at::Tensor> rows, columns;
  bool move(int64_t student, int64_t teacher) const { return rows[student].defined() || rows[teacher].defined(); }

  template <class T>
  static const T* data(const at::Tensor& x) {
    return x.defined() ? x.const_data_ptr<T>() : nullptr;
  }
};

// Of the stages from `first` to `last`.
std::vector<at::Tensor> spread(const char* name, at::TensorList tangents, const c10::List<bool>& moving, int64_t first,
                               int64_t last, const Stages& stages, int64_t rows) {
  std::vector<at::Tensor> out(last - first);
  size_t next = 0;
  for (int64_t q = first; q < last; ++q) {
    if (!moving.get(q)) continue;
    TORCH_CHECK(next < tangents.size(), name, " must have one for each moving stage, got ", tangents.size());
    out[q - first] = matrix(name, tangents[next++], stages.type, rows, stages.dim);
  }
  TORCH_CHECK(next == tangents.size(), name, " must have one for each moving stage, got ", tangents.size());
  return out;
}

Directions directions_of(const Stages& stages, at::TensorList tangents, const c10::List<bool>& moving,
                         const std::optional<at::TensorList>& student_columns,
                         const std::vector<at::Tensor>& all_students,
                         const std::optional<at::TensorList>& teacher_columns,
                         const std::vector<at::Tensor>& all_teachers) {
  const int64_t S = stages.students.size(), count = S + stages.teachers.size();
  TORCH_CHECK(int64_t(moving.size()) == count, "moving must have ", count, " entries, got ", moving.size());
  Directions directions;
  directions.rows = directions.columns = spread("tangents", tangents, moving, 0, count, stages, stages.rows);
  auto replace = [&](const char* name, at::TensorList given, int64_t first, int64_t last, int64_t rows) {
    const auto columns = spread(name, given, moving, first, last, stages, rows);
    std::copy(columns.begin(), columns.end(), directions.columns.begin() + first);
  };
  if (student_columns) replace("student_column_tangents", *student_columns, 0, S, all_students[0].size(0));
  if (teacher_columns) replace("teacher_column_tangents", *teacher_columns, S, count, all_teachers[0].size(0));
  return directions;
}

// ż_i = (1/τ) Σ_j P_ij ċ_ij and ℓ̇_i = ż_i − ċ_own/τ.
template <class T>
std::tuple<at::Tensor, at::Tensor> tangent(const Stages& stages, const std::vector<at::Tensor>& columns,
                                           const at::Tensor& log_sums, const at::Tensor& weighted,
                                           const Directions& directions, bool own_teacher, double temperature) {
  const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
  at::Tensor losses = at::zeros({rows, S, R}, stages.students[0].options());
  at::Tensor log_sum_tangents = at::zeros_like(log_sums);
  for (const Pair& pair : stages.pairs) {
    const int64_t teacher = S + pair.teacher;
    if (!directions.move(pair.student, teacher)) continue;
    Call call;
    SoftmaxTangent<T> args{};
    args.softmax = arguments<T>(stages.students[pair.student], columns[pair.teacher], temperature);
    args.tangents = {Directions::data<T>(directions.rows[pair.student]), Directions::data<T>(directions.columns[teacher])};
    args.inverse_temperature = T(1 / temperature);
    // Where only the student moves, Σ_j P_ij ċ_ij = ṡ_i·W_i.
    const bool known = weighted.numel() > 0 && !args.tangents.column;
    double* moved = call.template zeros<double>(rows);
    if (!known) {
      const Shifts<T> shifts(call, log_sums, pair.place, rows);
      args.softmax.row_shift = shifts.shift;
      args.softmax.sums = moved;
      kernels<T>().softmax_tangent(call.host(), args);
      for (int64_t i = 0; i < rows; ++i) moved[i] *= shifts.ratio[i];
    }
    const T* mean = known ? weighted.const_data_ptr<T>() + pair.place * rows * dim : nullptr;
    T* loss = losses.mutable_data_ptr<T>() + pair.student * R + pair.teacher;
    double* log_sum = log_sum_tangents.mutable_data_ptr<double>() + pair.place * rows;
    // The own column moves as the row of the teacher that it is.
    const T *student = args.softmax.sides.rows, *partner = stages.teachers[pair.teacher].const_data_ptr<T>();
    const T *row = args.tangents.row, *partner_moves = Directions::data<T>(directions.rows[teacher]);
    double* own_moved = call.template zeros<double>(rows);
    auto add_dots = [&](const T* a, const T* b, double* out) {
      if (a) kernels<T>().row_dots(call.host(), {a, b, rows, dim, out});
    };
    if (known) {
      add_dots(row, mean, moved);
      for (int64_t i = 0; i < rows; ++i) moved[i] /= temperature;
    }
    if (own_teacher) {
      add_dots(row, partner, own_moved);
      add_dots(partner_moves, student, own_moved);
    }
    for (int64_t i = 0; i < rows; ++i) {
      log_sum[i] = moved[i];
      loss[i * S * R] = T(moved[i] - own_moved[i] / temperature);
    }
  }
  return {losses, log_sum_tangents};
}

struct DoubleBackward {
  const Backward& first;
  const Directions& directions;
  at::Tensor log_sum_tangents, column_log_sum_tangents;

  // dṠ_i = (g_i/τ)(Σ_j (P˙_ij t_j + P_ij ṫ_j) − ṫ_own)
  template <class T>
  void student(const Pair& pair, const at::Tensor& gradient) const {
    const Stages& stages = first.stages;
    const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
    Call call;
    SoftmaxTangent<T> args{};
    args.softmax = arguments<T>(stages.students[pair.student], first.teacher_columns[pair.teacher], first.temperature);
    const Shifts<T> shifts(call, first.log_sums, pair.place, rows);
    args.softmax.row_shift = shifts.shift;
    args.softmax.values = args.softmax.sides.columns;
    args.softmax.weighted = call.template zeros<T>(rows * dim);
    args.tangents = {Directions::data<T>(directions.rows[pair.student]),
                     Directions::data<T>(directions.columns[S + pair.teacher])};
    args.inverse_temperature = T(1 / first.temperature);
    args.row_term = call.copy<T>(log_sum_tangents.const_data_ptr<double>() + pair.place * rows, rows);
    if (first.own_teacher) {
      T* own = call.template zeros<T>(rows);
      for (int64_t i = 0; i < rows; ++i) own[i] = T(1 / shifts.ratio[i]);
      args.softmax.own = own;
      args.softmax.sides.offset = first.teacher_offset;
    }
    kernels<T>().softmax_tangent(call.host(), args);
    scale_rows(args.softmax.weighted, shifts.ratio, rows, dim, [](double ratio) { return ratio; });
    add_difference<T>(gradient.mutable_data_ptr<T>(), args.softmax.weighted, nullptr,
                      first.upstream.const_data_ptr<T>() + pair.student * R + pair.teacher, S * R, first.temperature,
                      rows, dim);
  }

  // dṪ_i = (1/τ)(Σ_j g_j (P˙_ji s_j + P_ji ṡ_j) − g_own ṡ_own)
  template <class T>
  void teacher(const Pair& pair, const at::Tensor& gradient) const {
    const Stages& stages = first.stages;
    const int64_t S = stages.students.size(), R = stages.teachers.size();
    T* out = gradient.mutable_data_ptr<T>();
    if (first.column_upstream.defined()) {
      Call call;
      SoftmaxTangent<T> args{};
      args.softmax =
          arguments<T>(stages.teachers[pair.teacher], first.student_columns[pair.student], first.temperature);
      first.weigh_columns(call, pair, args.softmax);
      args.softmax.weighted = out;
      args.tangents = {Directions::data<T>(directions.rows[S + pair.teacher]),
                       Directions::data<T>(directions.columns[pair.student])};
      args.inverse_temperature = T(1 / first.temperature);
      const int64_t columns = args.softmax.sides.column_count;
      args.column_term = call.copy<T>(column_log_sum_tangents.const_data_ptr<double>() + pair.place * columns, columns);
      kernels<T>().softmax_tangent(call.host(), args);
      return;
    }
    if (!first.own_student || !directions.rows[pair.student].defined()) return;
    add_difference<T>(out, nullptr, directions.rows[pair.student].const_data_ptr<T>(),
                      first.upstream.const_data_ptr<T>() + pair.student * R + pair.teacher, S * R, first.temperature,
                      stages.rows, stages.dim);
  }
};

std::tuple<at::Tensor, at::Tensor> node_contrast_tangent(
    at::TensorList students, at::TensorList teachers, at::TensorList tangents, c10::List<bool> moving,
    const at::Tensor& log_sums, const at::Tensor& weighted, c10::List<bool> wanted, double temperature,
    c10::string_view product_precision, std::optional<at::TensorList> teacher_columns,
    std::optional<at::TensorList> teacher_column_tangents, int64_t offset) {
  const Stages stages = stages_of(students, teachers, wanted, product_precision);
  const auto columns = columns_of("teacher_columns", teacher_columns, stages.teachers, stages);
  TORCH_CHECK(teacher_columns.has_value() == teacher_column_tangents.has_value(),
              "teacher_columns and teacher_column_tangents go together");
  const Directions directions = directions_of(stages, tangents, moving, {}, {}, teacher_column_tangents, columns);
  const at::Tensor sums = vector("log_sums", log_sums, at::kDouble, {int64_t(stages.pairs.size()), stages.rows});
  return GKD_DISPATCH(stages.type, [&] {
    return tangent<scalar_t>(stages, columns, sums, kept(weighted, stages), directions,
                             includes_own(teacher_columns, stages, offset), temperature);
  });
}

std::vector<at::Tensor> node_contrast_double_backward(
    const at::Tensor& upstream, at::TensorList students, at::TensorList teachers, at::TensorList tangents,
    c10::List<bool> moving, const at::Tensor& log_sums, const at::Tensor& weighted, const at::Tensor& log_sum_tangents,
    c10::List<bool> wanted, double temperature, c10::string_view product_precision, c10::List<bool> needs,
    std::optional<at::TensorList> teacher_columns, std::optional<at::TensorList> student_columns,
    std::optional<at::TensorList> teacher_column_tangents, std::optional<at::TensorList> student_column_tangents,
    int64_t offset, const std::optional<at::Tensor>& column_upstream, const std::optional<at::Tensor>& column_log_sums,
    const std::optional<at::Tensor>& column_log_sum_tangents) {
  const Stages stages = stages_of(students, teachers, wanted, product_precision);
  const int64_t pairs = stages.pairs.size();
  const bool symmetric = !teacher_columns && !student_columns;
  TORCH_CHECK(teacher_columns.has_value() == teacher_column_tangents.has_value() &&
                  student_columns.has_value() == student_column_tangents.has_value(),
              "a column set and its tangents go together");
  const auto all_teachers = columns_of("teacher_columns", teacher_columns, stages.teachers, stages);
  const auto all_students = columns_of("student_columns", student_columns, stages.students, stages);
  TORCH_CHECK(!column_upstream || (student_columns && column_log_sum_tangents),
              "column_upstream needs student_columns, column_log_sums and column_log_sum_tangents");
  const Backward backward = backward_of(stages, upstream, log_sums, weighted, temperature, all_students, all_teachers,
                                        symmetric, includes_own(teacher_columns, stages, offset),
                                        includes_own(student_columns, stages, offset), teacher_columns ? offset : 0,
                                        student_columns ? offset : 0, column_upstream, column_log_sums);
  const Directions directions = directions_of(stages, tangents, moving, student_column_tangents, all_students,
                                              teacher_column_tangents, all_teachers);
  DoubleBackward second{backward, directions,
                        vector("log_sum_tangents", log_sum_tangents, at::kDouble, {pairs, stages.rows}), {}};
  if (symmetric) second.column_log_sum_tangents = second.log_sum_tangents;
  else if (column_upstream) {
    second.column_log_sum_tangents = vector("column_log_sum_tangents", *column_log_sum_tangents, at::kDouble,
                                            {pairs, all_students[0].size(0)});
  }
  auto moves = [&](const Pair& pair) { return directions.move(pair.student, stages.students.size() + pair.teacher); };
  return GKD_DISPATCH(stages.type, [&] {
    return collect(
        stages, needs,
        [&](const Pair& pair, const at::Tensor& x) { if (moves(pair)) second.student<scalar_t>(pair, x); },
        [&](const Pair& pair, const at::Tensor& x) { if (moves(pair)) second.teacher<scalar_t>(pair, x); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("node_contrast_tangent", &node_contrast_tangent);
  library.impl("node_contrast_double_backward", &node_contrast_double_backward);
}

}  // namespace gkd::contrast
