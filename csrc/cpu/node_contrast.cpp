#include <torch/library.h>

#include <cmath>

#include "host.h"

namespace gkd {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
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
};

Stages stages_of(at::TensorList students, at::TensorList teachers, const c10::List<bool>& wanted) {
  TORCH_CHECK(!students.empty() && !teachers.empty(), "node_contrast needs a student and a teacher");
  Stages stages;
  stages.type = row_type(students[0]);
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

std::vector<at::Tensor> columns_of(const char* name, const std::optional<at::TensorList>& columns,
                                   const std::vector<at::Tensor>& rows, const Stages& stages, int64_t offset) {
  if (!columns) {
    TORCH_CHECK(offset == 0, "offset needs a column set");
    return rows;
  }
  TORCH_CHECK(columns->size() == rows.size(), name, " must have ", rows.size(), " stages, got ", columns->size());
  std::vector<at::Tensor> out = matrices(name, *columns, stages.type, (*columns)[0].size(0));
  for (const at::Tensor& x : out) TORCH_CHECK(x.size(1) == stages.dim, name, " must have width ", stages.dim);
  TORCH_CHECK(offset >= 0 && offset + stages.rows <= out[0].size(0), "every row's own column i + offset must be one of ",
              out[0].size(0), " columns, got offset ", offset);
  return out;
}

template <class T>
SoftmaxSums<T> arguments(const at::Tensor& rows, const at::Tensor& columns, double temperature) {
  SoftmaxSums<T> args{};
  args.sides = sides_of<T>(rows, &columns, 0);
  args.scale = T(kLog2E / temperature);
  return args;
}

template <class T>
double own_similarity(const T* a, const T* b, int64_t dim) {
  double c = 0;
  for (int64_t k = 0; k < dim; ++k) c += double(a[k]) * double(b[k]);
  return c;
}

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
                                                       int64_t offset, double temperature, bool keep_weighted) {
  const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
  const int64_t pairs = stages.pairs.size();
  const auto options = stages.students[0].options();
  at::Tensor losses = at::zeros({rows, S, R}, options), log_sums = at::empty({pairs, rows}, options);
  at::Tensor weighted = keep_weighted ? at::zeros({pairs, rows, dim}, options) : at::empty({0}, options);
  for (const Pair& pair : stages.pairs) {
    Call call;
    const at::Tensor &student = stages.students[pair.student], &teacher = columns[pair.teacher];
    SoftmaxSums<T> args = arguments<T>(student, teacher, temperature);
    args.row_shift = row_shifts(call, args, temperature);
    args.sums = call.template zeros<double>(rows);
    if (keep_weighted) {
      args.values = args.sides.columns;
      args.weighted = weighted.mutable_data_ptr<T>() + pair.place * rows * dim;
    }
    kernels<T>().softmax_sums(call.host(), args);
    T* loss = losses.mutable_data_ptr<T>() + pair.student * R + pair.teacher;
    T* log_sum = log_sums.mutable_data_ptr<T>() + pair.place * rows;
    at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double log_z = std::log(args.sums[i]) + args.row_shift[i] * kLn2;
        const double own = own_similarity(args.sides.rows + i * dim, args.sides.columns + (i + offset) * dim, dim);
        log_sum[i] = T(log_z);
        loss[i * S * R] = T(log_z - own / temperature);
        const T inverse = T(1 / args.sums[i]);
        for (int64_t k = 0; keep_weighted && k < dim; ++k) args.weighted[i * dim + k] *= inverse;
      }
    });
  }
  return {losses, log_sums, weighted};
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

template <class T>
T* base2(Call& call, const T* log_sums, int64_t count) {
  T* shifts = call.zeros<T>(count);
  for (int64_t i = 0; i < count; ++i) shifts[i] = T(log_sums[i] * kLog2E);
  return shifts;
}

struct Backward {
  const Stages& stages;
  const std::vector<at::Tensor>&student_columns, &teacher_columns;
  at::Tensor upstream, log_sums, weighted;
  at::Tensor column_upstream, column_log_sums;  // undefined: zero
  int64_t offset;
  double temperature;

  template <class T>
  void student(const Pair& pair, const at::Tensor& gradient) const {
    const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
    Call call;
    SoftmaxSums<T> args =
        arguments<T>(stages.students[pair.student], teacher_columns[pair.teacher], temperature);
    const T* mean = weighted.const_data_ptr<T>() + pair.place * rows * dim;
    if (weighted.numel() == 0) {
      args.row_shift = base2(call, log_sums.const_data_ptr<T>() + pair.place * rows, rows);
      args.values = args.sides.columns;
      args.weighted = call.template zeros<T>(rows * dim);
      kernels<T>().softmax_sums(call.host(), args);
      mean = args.weighted;
    }
    add_difference(gradient.mutable_data_ptr<T>(), mean, args.sides.columns + offset * dim,
                   upstream.const_data_ptr<T>() + pair.student * R + pair.teacher, S * R, temperature, rows, dim);
  }

  // dT_j = (1/τ)(Σ_i g_i P_ij s_i − g_j s_j): the rows of this product are the teacher's, its columns all students.
  template <class T>
  void teacher(const Pair& pair, const at::Tensor& gradient) const {
    const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
    const at::Tensor& students = student_columns[pair.student];
    T* out = gradient.mutable_data_ptr<T>();
    Call call;
    SoftmaxSums<T> args = arguments<T>(stages.teachers[pair.teacher], students, temperature);
    if (column_upstream.defined()) {
      weigh_columns(call, pair, args);
      args.weighted = out;
      kernels<T>().softmax_sums(call.host(), args);
    }
    add_difference<T>(out, nullptr, stages.students[pair.student].const_data_ptr<T>(),
                      upstream.const_data_ptr<T>() + pair.student * R + pair.teacher, S * R, temperature, rows, dim);
  }

  // The weights g_j P_ji/τ of the students' columns j.
  template <class T>
  void weigh_columns(Call& call, const Pair& pair, SoftmaxSums<T>& args) const {
    const int64_t S = stages.students.size(), R = stages.teachers.size(), columns = args.sides.column_count;
    const T* g = column_upstream.const_data_ptr<T>() + pair.student * R + pair.teacher;
    T* factor = call.template zeros<T>(columns);
    for (int64_t j = 0; j < columns; ++j) factor[j] = T(g[j * S * R] / temperature);
    args.column_factor = factor;
    args.column_shift = base2(call, column_log_sums.const_data_ptr<T>() + pair.place * columns, columns);
    args.values = args.sides.columns;
  }
};

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
                                           const Directions& directions, int64_t offset, double temperature) {
  const int64_t rows = stages.rows, dim = stages.dim, S = stages.students.size(), R = stages.teachers.size();
  at::Tensor losses = at::zeros({rows, S, R}, log_sums.options()), log_sum_tangents = at::zeros_like(log_sums);
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
    if (!known) {
      args.softmax.row_shift = base2(call, log_sums.const_data_ptr<T>() + pair.place * rows, rows);
      args.softmax.sums = call.template zeros<double>(rows);
      kernels<T>().softmax_tangent(call.host(), args);
    }
    const T* mean = known ? weighted.const_data_ptr<T>() + pair.place * rows * dim : nullptr;
    T* loss = losses.mutable_data_ptr<T>() + pair.student * R + pair.teacher;
    T* log_sum = log_sum_tangents.mutable_data_ptr<T>() + pair.place * rows;
    const Sides<T>& sides = args.softmax.sides;
    at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t own = (i + offset) * dim;
        const T *row = args.tangents.row, *column = args.tangents.column;
        const double moved =
            known ? own_similarity(row + i * dim, mean + i * dim, dim) / temperature : args.softmax.sums[i];
        const double own_moved = (row ? own_similarity(row + i * dim, sides.columns + own, dim) : 0) +
                                 (column ? own_similarity(sides.rows + i * dim, column + own, dim) : 0);
        log_sum[i] = T(moved);
        loss[i * S * R] = T(moved - own_moved / temperature);
      }
    });
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
    const T* teacher = Directions::data<T>(directions.columns[S + pair.teacher]);
    Call call;
    SoftmaxTangent<T> args{};
    args.softmax = arguments<T>(stages.students[pair.student], first.teacher_columns[pair.teacher], first.temperature);
    args.softmax.row_shift = base2(call, first.log_sums.const_data_ptr<T>() + pair.place * rows, rows);
    args.softmax.values = args.softmax.sides.columns;
    args.softmax.weighted = call.template zeros<T>(rows * dim);
    args.tangents = {Directions::data<T>(directions.rows[pair.student]), teacher};
    args.inverse_temperature = T(1 / first.temperature);
    args.row_term = log_sum_tangents.const_data_ptr<T>() + pair.place * rows;
    kernels<T>().softmax_tangent(call.host(), args);
    add_difference<T>(gradient.mutable_data_ptr<T>(), args.softmax.weighted,
                      teacher ? teacher + first.offset * dim : nullptr,
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
      args.column_term = call.copy<T>(column_log_sum_tangents.const_data_ptr<T>() + pair.place * columns, columns);
      kernels<T>().softmax_tangent(call.host(), args);
    }
    if (!directions.rows[pair.student].defined()) return;
    add_difference<T>(out, nullptr, directions.rows[pair.student].const_data_ptr<T>(),
                      first.upstream.const_data_ptr<T>() + pair.student * R + pair.teacher, S * R, first.temperature,
                      stages.rows, stages.dim);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> node_contrast(
    at::TensorList students, at::TensorList teachers, c10::List<bool> wanted, double temperature,
    c10::string_view product_precision, bool keep_weighted, std::optional<at::TensorList> teacher_columns,
    int64_t offset) {
  check_precision(product_precision);
  const Stages stages = stages_of(students, teachers, wanted);
  const auto columns = columns_of("teacher_columns", teacher_columns, stages.teachers, stages, offset);
  return GKD_DISPATCH(stages.type,
                      [&] { return forward<scalar_t>(stages, columns, offset, temperature, keep_weighted); });
}

at::Tensor kept(const at::Tensor& weighted, const Stages& stages) {
  if (weighted.numel() == 0) return weighted;
  return vector("weighted", weighted, stages.type, {int64_t(stages.pairs.size()), stages.rows, stages.dim});
}

Backward backward_of(const Stages& stages, const at::Tensor& upstream, const at::Tensor& log_sums,
                     const at::Tensor& weighted, double temperature,
                     const std::vector<at::Tensor>& student_columns, const std::vector<at::Tensor>& teacher_columns,
                     bool symmetric, int64_t offset, const std::optional<at::Tensor>& column_upstream,
                     const std::optional<at::Tensor>& column_log_sums) {
  const int64_t S = stages.students.size(), R = stages.teachers.size(), pairs = stages.pairs.size();
  const auto type = stages.type;
  Backward backward{stages, student_columns, teacher_columns,
                    vector("upstream", upstream, type, {stages.rows, S, R}),
                    vector("log_sums", log_sums, type, {pairs, stages.rows}), kept(weighted, stages), {}, {}, offset,
                    temperature};
  if (symmetric) {
    backward.column_upstream = backward.upstream;
    backward.column_log_sums = backward.log_sums;
  } else if (column_upstream) {
    TORCH_CHECK(column_log_sums, "column_upstream needs student_columns and column_log_sums");
    const int64_t columns = student_columns[0].size(0);
    backward.column_upstream = vector("column_upstream", *column_upstream, type, {columns, S, R});
    backward.column_log_sums = vector("column_log_sums", *column_log_sums, type, {pairs, columns});
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

std::vector<at::Tensor> node_contrast_backward(
    const at::Tensor& upstream, at::TensorList students, at::TensorList teachers, const at::Tensor& log_sums,
    const at::Tensor& weighted, c10::List<bool> wanted, double temperature, c10::string_view product_precision,
    c10::List<bool> needs, std::optional<at::TensorList> teacher_columns,
    std::optional<at::TensorList> student_columns, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_log_sums) {
  check_precision(product_precision);
  const Stages stages = stages_of(students, teachers, wanted);
  const auto all_teachers = columns_of("teacher_columns", teacher_columns, stages.teachers, stages,
                                       teacher_columns ? offset : 0);
  const auto all_students = columns_of("student_columns", student_columns, stages.students, stages,
                                       student_columns ? offset : 0);
  TORCH_CHECK(!column_upstream || student_columns, "column_upstream needs student_columns and column_log_sums");
  const Backward backward =
      backward_of(stages, upstream, log_sums, weighted, temperature, all_students, all_teachers,
                  !teacher_columns && !student_columns, offset, column_upstream, column_log_sums);
  return GKD_DISPATCH(stages.type, [&] {
    return collect(
        stages, needs, [&](const Pair& pair, const at::Tensor& x) { backward.student<scalar_t>(pair, x); },
        [&](const Pair& pair, const at::Tensor& x) { backward.teacher<scalar_t>(pair, x); });
  });
}

std::tuple<at::Tensor, at::Tensor> node_contrast_tangent(
    at::TensorList students, at::TensorList teachers, at::TensorList tangents, c10::List<bool> moving,
    const at::Tensor& log_sums, const at::Tensor& weighted, c10::List<bool> wanted, double temperature,
    c10::string_view product_precision, std::optional<at::TensorList> teacher_columns,
    std::optional<at::TensorList> teacher_column_tangents, int64_t offset) {
  check_precision(product_precision);
  const Stages stages = stages_of(students, teachers, wanted);
  const auto columns = columns_of("teacher_columns", teacher_columns, stages.teachers, stages, offset);
  TORCH_CHECK(teacher_columns.has_value() == teacher_column_tangents.has_value(),
              "teacher_columns and teacher_column_tangents go together");
  const Directions directions = directions_of(stages, tangents, moving, {}, {}, teacher_column_tangents, columns);
  const at::Tensor sums = vector("log_sums", log_sums, stages.type, {int64_t(stages.pairs.size()), stages.rows});
  return GKD_DISPATCH(stages.type, [&] {
    return tangent<scalar_t>(stages, columns, sums, kept(weighted, stages), directions, offset, temperature);
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
  check_precision(product_precision);
  const Stages stages = stages_of(students, teachers, wanted);
  const int64_t pairs = stages.pairs.size();
  const bool symmetric = !teacher_columns && !student_columns;
  TORCH_CHECK(teacher_columns.has_value() == teacher_column_tangents.has_value() &&
                  student_columns.has_value() == student_column_tangents.has_value(),
              "a column set and its tangents go together");
  const auto all_teachers = columns_of("teacher_columns", teacher_columns, stages.teachers, stages,
                                       teacher_columns ? offset : 0);
  const auto all_students = columns_of("student_columns", student_columns, stages.students, stages,
                                       student_columns ? offset : 0);
  TORCH_CHECK(!column_upstream || (student_columns && column_log_sum_tangents),
              "column_upstream needs student_columns, column_log_sums and column_log_sum_tangents");
  const Backward backward = backward_of(stages, upstream, log_sums, weighted, temperature, all_students, all_teachers,
                                        symmetric, offset, column_upstream, column_log_sums);
  const Directions directions = directions_of(stages, tangents, moving, student_column_tangents, all_students,
                                              teacher_column_tangents, all_teachers);
  DoubleBackward second{backward, directions,
                        vector("log_sum_tangents", log_sum_tangents, stages.type, {pairs, stages.rows}), {}};
  if (symmetric) second.column_log_sum_tangents = second.log_sum_tangents;
  else if (column_upstream) {
    second.column_log_sum_tangents = vector("column_log_sum_tangents", *column_log_sum_tangents, stages.type,
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
  library.impl("node_contrast", &node_contrast);
  library.impl("node_contrast_backward", &node_contrast_backward);
  library.impl("node_contrast_tangent", &node_contrast_tangent);
  library.impl("node_contrast_double_backward", &node_contrast_double_backward);
}

}  // namespace gkd
