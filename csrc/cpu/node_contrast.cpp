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

// out_i += (g_i/τ)(mean_i − own_i)
template <class T>
void add_difference(T* out, const T* mean, const T* own, const T* upstream, int64_t stride, double temperature,
                    int64_t rows, int64_t dim) {
  at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T factor = T(upstream[i * stride] / temperature);
      for (int64_t k = 0; k < dim; ++k) out[i * dim + k] += factor * (mean[i * dim + k] - own[i * dim + k]);
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
    const int64_t columns = students.size(0);
    T* out = gradient.mutable_data_ptr<T>();
    Call call;
    SoftmaxSums<T> args = arguments<T>(stages.teachers[pair.teacher], students, temperature);
    if (column_upstream.defined()) {
      const T* g = column_upstream.const_data_ptr<T>() + pair.student * R + pair.teacher;
      T* factor = call.template zeros<T>(columns);
      for (int64_t j = 0; j < columns; ++j) factor[j] = T(g[j * S * R] / temperature);
      args.column_factor = factor;
      args.column_shift = base2(call, column_log_sums.const_data_ptr<T>() + pair.place * columns, columns);
      args.values = args.sides.columns;
      args.weighted = out;
      kernels<T>().softmax_sums(call.host(), args);
    }
    const T* g = upstream.const_data_ptr<T>() + pair.student * R + pair.teacher;
    const T* own = stages.students[pair.student].const_data_ptr<T>();
    for (int64_t i = 0; i < rows; ++i) {
      const T factor = T(g[i * S * R] / temperature);
      for (int64_t k = 0; k < dim; ++k) out[i * dim + k] -= factor * own[i * dim + k];
    }
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

std::vector<at::Tensor> node_contrast_backward(
    const at::Tensor& upstream, at::TensorList students, at::TensorList teachers, const at::Tensor& log_sums,
    const at::Tensor& weighted, c10::List<bool> wanted, double temperature, c10::string_view product_precision,
    c10::List<bool> needs, std::optional<at::TensorList> teacher_columns,
    std::optional<at::TensorList> student_columns, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_log_sums) {
  check_precision(product_precision);
  const Stages stages = stages_of(students, teachers, wanted);
  const int64_t S = students.size(), R = teachers.size(), pairs = stages.pairs.size(), rows = stages.rows;
  TORCH_CHECK(int64_t(needs.size()) == S + R, "needs must have ", S + R, " entries, got ", needs.size());
  const bool symmetric = !teacher_columns && !student_columns;
  const auto all_teachers = columns_of("teacher_columns", teacher_columns, stages.teachers, stages,
                                       teacher_columns ? offset : 0);
  const auto all_students = columns_of("student_columns", student_columns, stages.students, stages,
                                       student_columns ? offset : 0);
  const auto type = stages.type;
  Backward backward{stages, all_students, all_teachers, vector("upstream", upstream, type, {rows, S, R}),
                    vector("log_sums", log_sums, type, {pairs, rows}),
                    weighted.numel() == 0 ? weighted
                                          : vector("weighted", weighted, type, {pairs, rows, stages.dim}),
                    {}, {}, offset, temperature};
  if (symmetric) {
    backward.column_upstream = backward.upstream;
    backward.column_log_sums = backward.log_sums;
  } else if (column_upstream) {
    TORCH_CHECK(column_log_sums && student_columns, "column_upstream needs student_columns and column_log_sums");
    const int64_t columns = all_students[0].size(0);
    backward.column_upstream = vector("column_upstream", *column_upstream, type, {columns, S, R});
    backward.column_log_sums = vector("column_log_sums", *column_log_sums, type, {pairs, columns});
  }
  std::vector<at::Tensor> gradients, stage(S + R);
  for (int64_t q = 0; q < S + R; ++q) {
    if (needs.get(q)) gradients.push_back(stage[q] = at::zeros_like(q < S ? stages.students[q] : stages.teachers[q - S]));
  }
  for (const Pair& pair : stages.pairs) {
    GKD_DISPATCH(type, [&] {
      if (stage[pair.student].defined()) backward.student<scalar_t>(pair, stage[pair.student]);
      if (stage[S + pair.teacher].defined()) backward.teacher<scalar_t>(pair, stage[S + pair.teacher]);
    });
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("node_contrast", &node_contrast);
  library.impl("node_contrast_backward", &node_contrast_backward);
}

}  // namespace gkd
