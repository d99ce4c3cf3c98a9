// What the first and the second order of node_contrast share.
#pragma once
#include <cmath>

#include "host.h"

namespace gkd::contrast {

// Up to this 2/τ the sums of exp((c − 1)/τ) cannot underflow in float32.
constexpr double kLargestSharedShift = 80;

struct Pair {
  int64_t student, teacher, place;  // place among the wanted pairs
};

struct Stages {
  std::vector<at::Tensor> students, teachers;
  std::vector<Pair> pairs;
  int64_t rows, dim;
  at::ScalarType type;
  Product product;
};

inline Stages stages_of(at::TensorList students, at::TensorList teachers, const c10::List<bool>& wanted,
                        c10::string_view product_precision) {
  TORCH_CHECK(!students.empty() && !teachers.empty(), "node_contrast needs a student and a teacher");
  Stages stages;
  stages.type = row_type(students[0]);
  stages.product = product_of(product_precision, stages.type);
  stages.rows = students[0].size(0);
  stages.dim = students[0].size(-1);
  stages.students = matrices("students", students, stages.type, stages.rows);
  stages.teachers = matrices("teachers", teachers, stages.type, stages.rows);
  for (const auto* side : {&stages.students, &stages.teachers}) {
    for (const at::Tensor& x : *side) TORCH_CHECK(x.size(1) == stages.dim, "all stages must have width ", stages.dim);
  }
  const int64_t R = teachers.size();
  TORCH_CHECK(int64_t(wanted.size()) == int64_t(students.size()) * R, "wanted must have an entry per pair");
  for (int64_t p = 0; p < int64_t(wanted.size()); ++p) {
    if (wanted.get(p)) stages.pairs.push_back({p / R, p % R, int64_t(stages.pairs.size())});
  }
  return stages;
}

inline std::vector<at::Tensor> columns_of(const char* name, const std::optional<at::TensorList>& columns,
                                   const std::vector<at::Tensor>& rows, const Stages& stages) {
  if (!columns) return rows;
  TORCH_CHECK(columns->size() == rows.size(), name, " must have ", rows.size(), " stages, got ", columns->size());
  std::vector<at::Tensor> out = matrices(name, *columns, stages.type, (*columns)[0].size(0));
  for (const at::Tensor& x : out) TORCH_CHECK(x.size(1) == stages.dim, name, " must have width ", stages.dim);
  return out;
}

// Whether the rows' own columns i + offset are among the columns: all of them or none.
inline bool includes_own(const std::optional<at::TensorList>& columns, const Stages& stages, int64_t offset) {
  if (!columns) return true;
  const int64_t count = (*columns)[0].size(0);
  const bool all = offset >= 0 && offset + stages.rows <= count, none = offset + stages.rows <= 0 || offset >= count;
  TORCH_CHECK(all || none, "the rows' own columns i + offset must all be columns or none of them: ", stages.rows,
              " rows, ", count, " columns, offset ", offset);
  return all;
}

template <class T>
SoftmaxSums<T> arguments(const at::Tensor& rows, const at::Tensor& columns, double temperature) {
  SoftmaxSums<T> args{};
  args.sides = sides_of<T>(rows, &columns, 0);
  args.scale = T(kLog2E / temperature);
  return args;
}

// out_i += (g_i/τ)(mean_i − own_i); null: 0
template <class T>
void add_difference(T* out, const T* mean, const T* own, const T* upstream, int64_t stride, double temperature,
                    int64_t rows, int64_t dim) {
  at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T factor = T(upstream[i * stride] / temperature);
      for (int64_t k = i * dim; k < (i + 1) * dim; ++k) out[k] += factor * ((mean ? mean[k] : 0) - (own ? own[k] : 0));
    }
  });
}

// log2 Z as shifts of weights, and P over these weights: what the shifts were rounded by.
template <class T>
struct Shifts {
  T* shift;
  double* ratio;

  Shifts(Call& call, const at::Tensor& log_sums, int64_t place, int64_t count)
      : shift(call.zeros<T>(count)), ratio(call.zeros<double>(count)) {
    const double* log_z = log_sums.const_data_ptr<double>() + place * count;
    for (int64_t i = 0; i < count; ++i) {
      shift[i] = T(log_z[i] * kLog2E);
      ratio[i] = std::exp(shift[i] * kLn2 - log_z[i]);
    }
  }
};

struct Backward {
  const Stages& stages;
  const std::vector<at::Tensor>&student_columns, &teacher_columns;
  at::Tensor upstream, log_sums, weighted;
  at::Tensor column_upstream, column_log_sums;  // undefined: zero
  bool own_teacher, own_student;                // whether the rows' own columns are among these
  int64_t teacher_offset, student_offset;       // row i's own column is i + offset
  double temperature;

  template <class T>
  void student(const Pair& pair, const at::Tensor& gradient) const {
    const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
    Call call(stages.product);
    SoftmaxSums<T> args =
        arguments<T>(stages.students[pair.student], teacher_columns[pair.teacher], temperature);
    const T* mean = weighted.const_data_ptr<T>() + pair.place * rows * dim;
    if (weighted.numel() == 0) {
      const Shifts<T> shifts(call, log_sums, pair.place, rows);
      args.row_shift = shifts.shift;
      args.values = args.sides.columns;
      args.weighted = call.template zeros<T>(rows * dim);
      if (stages.product == Product::bfloat16) {
        args.sums = call.template zeros<double>(rows);
        args.weight_sums = call.template zeros<double>(rows);
        if (own_teacher) args.own_weights = call.template zeros<T>(2 * rows), args.sides.offset = teacher_offset;
      }
      kernels<T>().softmax_sums(call.host(), args);
      for (int64_t i = 0; args.weight_sums && i < rows; ++i) shifts.ratio[i] *= args.sums[i] / args.weight_sums[i];
      scale_rows(args.weighted, shifts.ratio, rows, dim, [](double ratio) { return ratio; });
      mean = args.weighted;
    }
    const T* own = own_teacher ? stages.teachers[pair.teacher].const_data_ptr<T>() : nullptr;
    add_difference(gradient.mutable_data_ptr<T>(), mean, own,
                   upstream.const_data_ptr<T>() + pair.student * R + pair.teacher, S * R, temperature, rows, dim);
  }

  // dT_j = (1/τ)(Σ_i g_i P_ij s_i − g_j s_j): the rows of this product are the teacher's, its columns all students.
  template <class T>
  void teacher(const Pair& pair, const at::Tensor& gradient) const {
    const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
    const at::Tensor& students = student_columns[pair.student];
    T* out = gradient.mutable_data_ptr<T>();
    Call call(stages.product);
    SoftmaxSums<T> args = arguments<T>(stages.teachers[pair.teacher], students, temperature);
    if (column_upstream.defined()) {
      weigh_columns(call, pair, args);
      // As the pass rounded that the log-sums are of, whose columns these were.
      args.centred_on = teacher_columns[pair.teacher].template const_data_ptr<T>();
      args.centred_on_count = teacher_columns[pair.teacher].size(0);
      args.weighted = out;
      kernels<T>().softmax_sums(call.host(), args);
      return;
    }
    if (!own_student) return;
    add_difference<T>(out, nullptr, stages.students[pair.student].const_data_ptr<T>(),
                      upstream.const_data_ptr<T>() + pair.student * R + pair.teacher, S * R, temperature, rows, dim);
  }

  // The weights g_j P_ji/τ of the students' columns j, the own one's less g_i/τ: the difference is what is rounded.
  template <class T>
  void weigh_columns(Call& call, const Pair& pair, SoftmaxSums<T>& args) const {
    const int64_t S = stages.students.size(), R = stages.teachers.size(), columns = args.sides.column_count;
    const T* g = column_upstream.const_data_ptr<T>() + pair.student * R + pair.teacher;
    const Shifts<T> shifts(call, column_log_sums, pair.place, columns);
    T* factor = call.template zeros<T>(columns);
    for (int64_t j = 0; j < columns; ++j) factor[j] = T(g[j * S * R] / temperature * shifts.ratio[j]);
    args.column_factor = factor;
    args.column_shift = shifts.shift;
    args.values = args.sides.columns;
    if (!own_student) return;
    T* own = call.template zeros<T>(stages.rows);
    const T* own_upstream = upstream.const_data_ptr<T>() + pair.student * R + pair.teacher;
    for (int64_t i = 0; i < stages.rows; ++i) own[i] = T(own_upstream[i * S * R] / temperature);
    args.own = own;
    args.sides.offset = student_offset;
  }
};

inline at::Tensor kept(const at::Tensor& weighted, const Stages& stages) {
  if (weighted.numel() == 0) return weighted;
  return vector("weighted", weighted, stages.type, {int64_t(stages.pairs.size()), stages.rows, stages.dim});
}

inline Backward backward_of(const Stages& stages, const at::Tensor& upstream, const at::Tensor& log_sums,
                     const at::Tensor& weighted, double temperature,
                     const std::vector<at::Tensor>& student_columns, const std::vector<at::Tensor>& teacher_columns,
                     bool symmetric, bool own_teacher, bool own_student,
                     int64_t teacher_offset, int64_t student_offset,
                     const std::optional<at::Tensor>& column_upstream,
                     const std::optional<at::Tensor>& column_log_sums) {
  const int64_t S = stages.students.size(), R = stages.teachers.size(), pairs = stages.pairs.size();
  const auto type = stages.type;
  Backward backward{stages, student_columns, teacher_columns,
                    vector("upstream", upstream, type, {stages.rows, S, R}),
                    vector("log_sums", log_sums, at::kDouble, {pairs, stages.rows}), kept(weighted, stages), {}, {}, own_teacher,
                    own_student, teacher_offset, student_offset, temperature};
  if (symmetric) {
    backward.column_upstream = backward.upstream;
    backward.column_log_sums = backward.log_sums;
  } else if (column_upstream) {
    TORCH_CHECK(column_log_sums, "column_upstream needs student_columns and column_log_sums");
    const int64_t columns = student_columns[0].size(0);
    backward.column_upstream = vector("column_upstream", *column_upstream, type, {columns, S, R});
    backward.column_log_sums = vector("column_log_sums", *column_log_sums, at::kDouble, {pairs, columns});
  }
  return backward;
}

// Runs student(pair, gradient) and teacher(pair, gradient) for the wanted gradients of the wanted pairs.
template <class Student, class Teacher>
std::vector<at::Tensor> collect(const Stages& stages, const c10::List<bool>& needs, const Student& student,
                                const Teacher& teacher) {
  const int64_t S = stages.students.size(), R = stages.teachers.size();
  TORCH_CHECK(int64_t(needs.size()) == S + R, "needs must have ", S + R, " entries, got ", needs.size());
  std::vector<at::Tensor> gradients, stage(S + R);
  for (int64_t q = 0; q < S + R; ++q) {
    if (needs.get(q)) gradients.push_back(stage[q] = at::zeros_like(q < S ? stages.students[q] : stages.teachers[q - S]));
  }
  for (const Pair& pair : stages.pairs) {
    if (stage[pair.student].defined()) student(pair, stage[pair.student]);
    if (stage[S + pair.teacher].defined()) teacher(pair, stage[S + pair.teacher]);
  }
  return gradients;
}

}  // namespace gkd::contrast
