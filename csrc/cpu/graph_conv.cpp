#include <torch/library.h>

#include <cmath>

#include "host.h"

namespace gkd {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// The graph on both sides; columns undefined: the rows.
struct Graph {
  at::Tensor nodes, columns;
  at::ScalarType type;
  int64_t rows, column_count, offset;
  double inverse_variance;
  bool symmetric() const { return !columns.defined(); }

  template <class T>
  Sides<T> sides() const {
    return sides_of<T>(nodes, symmetric() ? nullptr : &columns, offset);
  }
};

Graph graph_of(const at::Tensor& nodes, const std::optional<at::Tensor>& column_nodes, int64_t offset,
               const at::Tensor& inverse_variance) {
  Graph graph;
  graph.type = row_type(nodes);
  graph.nodes = matrix("nodes", nodes, graph.type);
  if (column_nodes) graph.columns = matrix("column_nodes", *column_nodes, graph.type, -1, nodes.size(1));
  graph.rows = nodes.size(0);
  graph.column_count = column_nodes ? graph.columns.size(0) : graph.rows;
  graph.offset = offset;
  TORCH_CHECK(inverse_variance.dim() == 0, "inverse_variance must have no dimensions");
  graph.inverse_variance = inverse_variance.item<double>();
  return graph;
}

bool is_row(c10::string_view normalization) {
  TORCH_CHECK(normalization == "row" || normalization == "symmetric", "normalization must be row or symmetric, got ",
              normalization);
  return normalization == "row";
}

template <class T>
KernelSums<T> arguments(const Graph& graph) {
  KernelSums<T> args{};
  args.sides = graph.sides<T>();
  args.scale = T(graph.inverse_variance * kLog2E);
  return args;
}

template <class T>
at::Tensor degrees_of(const Graph& graph) {
  Call call;
  KernelSums<T> args = arguments<T>(graph);
  args.degrees = call.zeros<double>(graph.rows);
  kernels<T>().kernel_sums(call.host(), args);
  at::Tensor degrees = at::empty({graph.rows}, graph.nodes.options());
  std::copy(args.degrees, args.degrees + graph.rows, degrees.mutable_data_ptr<T>());
  return degrees;
}

// out[i] = f(degrees[i]) x[i], rows of width `width`
template <class T, class F>
T* scaled(Call& call, const at::Tensor& x, const at::Tensor& degrees, const F& factor) {
  const int64_t rows = x.size(0), width = x.size(1);
  const T *in = x.const_data_ptr<T>(), *degree = degrees.const_data_ptr<T>();
  T* out = call.zeros<T>(rows * width);
  at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T f = factor(degree[i]);
      for (int64_t k = 0; k < width; ++k) out[i * width + k] = f * in[i * width + k];
    }
  });
  return out;
}

template <class T, class F>
void scale_rows(at::Tensor& x, const at::Tensor& degrees, const F& factor) {
  const int64_t width = x.size(1);
  const T* degree = degrees.const_data_ptr<T>();
  T* out = x.mutable_data_ptr<T>();
  at::parallel_for(0, x.size(0), 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T f = factor(degree[i]);
      for (int64_t k = 0; k < width; ++k) out[i * width + k] *= f;
    }
  });
}

template <class T>
T inverse_root(T degree) {
  return 1 / std::sqrt(degree);
}

template <class T>
T inverse(T degree) {
  return 1 / degree;
}

// Σ_j K_ij values_j, [rows, width]
template <class T>
at::Tensor kernel_times(Call& call, const Graph& graph, const T* row_values, const T* column_values, int64_t width,
                        double* degrees) {
  KernelSums<T> args = arguments<T>(graph);
  at::Tensor output = at::zeros({graph.rows, width}, graph.nodes.options());
  args.values = {row_values, column_values};
  args.width = width;
  args.degrees = degrees;
  args.output = output.mutable_data_ptr<T>();
  kernels<T>().kernel_sums(call.host(), args);
  return output;
}

template <class T>
std::tuple<at::Tensor, at::Tensor> forward(const Graph& graph, const at::Tensor& messages, const at::Tensor& columns,
                                           bool row, at::Tensor degrees, at::Tensor column_degrees) {
  Call call;
  const int64_t width = messages.size(1);
  if (row) {
    double* sums = call.zeros<double>(graph.rows);
    const T* values = columns.const_data_ptr<T>();
    at::Tensor output = kernel_times<T>(call, graph, values, values, width, sums);
    degrees = at::empty({graph.rows}, graph.nodes.options());
    std::copy(sums, sums + graph.rows, degrees.mutable_data_ptr<T>());
    scale_rows<T>(output, degrees, inverse<T>);
    return {output, degrees};
  }
  if (graph.symmetric()) column_degrees = degrees = degrees_of<T>(graph);
  const T* values = scaled<T>(call, columns, column_degrees, inverse_root<T>);
  at::Tensor output = kernel_times<T>(call, graph, values, values, width, nullptr);
  scale_rows<T>(output, degrees, inverse_root<T>);
  return {output, degrees};
}

struct Upstream {
  at::Tensor upstream, messages, degrees;  // of one side; upstream undefined: zero
};

// G' and H' of one side, padded.
template <class T>
struct Factors {
  const T *left = nullptr, *right = nullptr;
  Factors(Call& call, const Upstream& side, bool row) {
    if (side.upstream.defined()) {
      left = row ? scaled<T>(call, side.upstream, side.degrees, inverse<T>)
                 : scaled<T>(call, side.upstream, side.degrees, inverse_root<T>);
    }
    if (!side.messages.defined()) return;
    right = row ? side.messages.const_data_ptr<T>() : scaled<T>(call, side.messages, side.degrees, inverse_root<T>);
  }
};

// d_i = −(G_i·Y_i)/deg_i (row) or −(G_i·Y_i + H_i·dH_i)/(2 deg_i) (symmetric)
template <class T>
T* node_terms(Call& call, const Upstream& side, const at::Tensor& output, const at::Tensor* messages_gradient) {
  const int64_t rows = output.size(0), width = output.size(1);
  const T *g = side.upstream.const_data_ptr<T>(), *y = output.const_data_ptr<T>(), *h = side.messages.const_data_ptr<T>();
  const T* dh = messages_gradient ? messages_gradient->const_data_ptr<T>() : nullptr;
  const T* degree = side.degrees.const_data_ptr<T>();
  T* terms = call.zeros<T>(rows);
  for (int64_t i = 0; i < rows; ++i) {
    T total = 0;
    for (int64_t k = i * width; k < (i + 1) * width; ++k) total += g[k] * y[k] + (dh ? h[k] * dh[k] : T(0));
    terms[i] = -total / (dh ? 2 * degree[i] : degree[i]);
  }
  return terms;
}

template <class T>
std::vector<at::Tensor> backward(const Graph& graph, const Upstream& own, const Upstream& columns,
                                 const at::Tensor& output, bool row, bool needs_nodes, bool needs_messages,
                                 const at::Tensor& given_terms, const at::Tensor& column_terms) {
  Call call;
  const int64_t width = output.size(1);
  const Factors<T> mine(call, own, row);
  std::optional<Factors<T>> others;
  if (!graph.symmetric()) others.emplace(call, columns, row);
  const Factors<T>& other = graph.symmetric() ? mine : *others;
  std::vector<at::Tensor> gradients;
  at::Tensor messages_gradient;
  if (needs_messages || (graph.symmetric() && !row)) {
    messages_gradient = other.left ? kernel_times<T>(call, graph, mine.left, other.left, width, nullptr)
                                   : at::zeros_like(output);
    if (!row) scale_rows<T>(messages_gradient, own.degrees, inverse_root<T>);
  }
  if (needs_nodes) {
    NodeGradient<T> args{};
    args.sides = graph.sides<T>();
    args.scale = T(graph.inverse_variance * kLog2E);
    args.inverse_variance = T(graph.inverse_variance);
    args.left = {mine.left, other.left};
    args.right = {mine.right, other.right};
    args.width = width;
    if (graph.symmetric()) {
      const T* terms = node_terms<T>(call, own, output, row ? nullptr : &messages_gradient);
      args.terms = {terms, terms};
    } else {
      args.terms.row = given_terms.const_data_ptr<T>();
      args.terms.column = column_terms.defined()
                              ? call.template copy<T>(column_terms.const_data_ptr<T>(), graph.column_count)
                              : call.template zeros<T>(graph.column_count);
    }
    gradients.push_back(at::zeros_like(graph.nodes));
    args.gradient = gradients.back().template mutable_data_ptr<T>();
    kernels<T>().node_gradient(call.host(), args);
  }
  if (needs_messages) gradients.push_back(messages_gradient);
  return gradients;
}

at::Tensor graph_degrees(const at::Tensor& nodes, const at::Tensor& inverse_variance,
                         c10::string_view product_precision, const std::optional<at::Tensor>& column_nodes,
                         int64_t offset) {
  check_precision(product_precision);
  const Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance);
  return GKD_DISPATCH(graph.type, [&] { return degrees_of<scalar_t>(graph); });
}

std::tuple<at::Tensor, at::Tensor> graph_conv(
    const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& inverse_variance,
    c10::string_view normalization, c10::string_view product_precision, const std::optional<at::Tensor>& column_nodes,
    const std::optional<at::Tensor>& column_messages, int64_t offset, const std::optional<at::Tensor>& degrees,
    const std::optional<at::Tensor>& column_degrees) {
  check_precision(product_precision);
  const bool row = is_row(normalization);
  const Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance);
  TORCH_CHECK(column_nodes.has_value() == column_messages.has_value(), "column_nodes and column_messages go together");
  const at::Tensor own = matrix("messages", messages, graph.type, graph.rows);
  const at::Tensor columns =
      column_messages ? matrix("column_messages", *column_messages, graph.type, graph.column_count, own.size(1)) : own;
  at::Tensor own_degrees, other_degrees;
  if (!graph.symmetric() && !row) {
    TORCH_CHECK(degrees && column_degrees, "symmetric normalization with a column set needs both sides' degrees");
    own_degrees = vector("degrees", *degrees, graph.type, {graph.rows});
    other_degrees = vector("column_degrees", *column_degrees, graph.type, {graph.column_count});
  }
  return GKD_DISPATCH(graph.type,
                      [&] { return forward<scalar_t>(graph, own, columns, row, own_degrees, other_degrees); });
}

std::vector<at::Tensor> graph_conv_backward(
    const at::Tensor& upstream, const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& output,
    const at::Tensor& degrees, const at::Tensor& inverse_variance, c10::string_view normalization,
    c10::string_view product_precision, c10::List<bool> needs, const std::optional<at::Tensor>& column_nodes,
    const std::optional<at::Tensor>& column_messages, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_degrees, const std::optional<at::Tensor>& terms,
    const std::optional<at::Tensor>& column_terms) {
  check_precision(product_precision);
  const bool row = is_row(normalization);
  const Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance);
  const auto type = graph.type;
  const int64_t rows = graph.rows, count = graph.column_count, width = messages.size(-1);
  TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, got ", needs.size());
  const Upstream own{matrix("upstream", upstream, type, rows, width), matrix("messages", messages, type, rows),
                     vector("degrees", degrees, type, {rows})};
  Upstream columns;
  at::Tensor own_terms, other_terms;
  if (!graph.symmetric()) {
    TORCH_CHECK(column_messages, "column_nodes and column_messages go together");
    TORCH_CHECK(column_degrees || (row && !column_upstream), "column_degrees are missing");
    columns.messages = matrix("column_messages", *column_messages, type, count, width);
    if (column_upstream) columns.upstream = matrix("column_upstream", *column_upstream, type, count, width);
    if (column_degrees) columns.degrees = vector("column_degrees", *column_degrees, type, {count});
    TORCH_CHECK(terms || !needs.get(0), "the nodes' gradient with a column set needs node_terms");
    if (terms) own_terms = vector("node_terms", *terms, type, {rows});
    if (column_terms) other_terms = vector("column_node_terms", *column_terms, type, {count});
  }
  const at::Tensor y = matrix("output", output, type, rows, width);
  return GKD_DISPATCH(type, [&] {
    return backward<scalar_t>(graph, own, columns, y, row, needs.get(0), needs.get(1), own_terms, other_terms);
  });
}

// A per-row quantity of both sides, checked; the same twice in the symmetric case. Undefined where it is not given.
struct Both {
  at::Tensor row, column;

  template <class T>
  Terms<T> terms() const {
    auto data = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; };
    return {data(row), data(column)};
  }

  // With room for vectors that read beyond the end of the columns.
  template <class T>
  Terms<T> padded(Call& call) const {
    return {row.const_data_ptr<T>(), call.copy<T>(column.const_data_ptr<T>(), column.numel())};
  }
};

struct BothSides {
  const Graph& graph;

  Both take(const char* name, const std::optional<at::Tensor>& own, const std::optional<at::Tensor>& columns,
            std::vector<int64_t> shape) const {
    if (!own) return {};
    auto check = [&](const at::Tensor& x, int64_t count) {
      shape[0] = count;
      return vector(name, x, graph.type, shape);
    };
    const at::Tensor row = check(*own, graph.rows);
    if (graph.symmetric()) return {row, row};
    TORCH_CHECK(columns, name, " of the columns is missing");
    return {row, check(*columns, graph.column_count)};
  }
};

template <class T>
at::Tensor degree_tangents(const Graph& graph, const Both& tangent) {
  Call call;
  KernelSumsTangent<T> args{};
  args.sides = graph.sides<T>();
  args.scale = T(graph.inverse_variance * kLog2E);
  args.inverse_variance = T(graph.inverse_variance);
  args.tangents = tangent.terms<T>();
  args.degrees = call.zeros<double>(graph.rows);
  kernels<T>().kernel_sums_tangent(call.host(), args);
  at::Tensor degrees = at::empty({graph.rows}, graph.nodes.options());
  std::copy(args.degrees, args.degrees + graph.rows, degrees.mutable_data_ptr<T>());
  return degrees;
}

at::Tensor graph_degrees_tangent(const at::Tensor& nodes, const at::Tensor& tangent, const at::Tensor& inverse_variance,
                                 c10::string_view product_precision, const std::optional<at::Tensor>& column_nodes,
                                 const std::optional<at::Tensor>& column_tangent, int64_t offset) {
  check_precision(product_precision);
  const Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance);
  const Both both = BothSides{graph}.take("tangent", tangent, column_tangent, {0, nodes.size(1)});
  return GKD_DISPATCH(graph.type, [&] { return degree_tangents<scalar_t>(graph, both); });
}

template <class T>
std::vector<at::Tensor> sum_tangents(const Graph& graph, const Both& tangent, const std::vector<at::Tensor>& values,
                                     const std::vector<at::Tensor>& rates, const at::Tensor& extra) {
  Call call;
  const T* more = extra.defined() ? extra.const_data_ptr<T>() : nullptr;
  std::vector<at::Tensor> sums;
  if (!tangent.row.defined()) {
    for (size_t p = 0; p < values.size(); ++p) {
      const int64_t width = values[p].size(1);
      sums.push_back(p == 0 && more ? kernel_times<T>(call, graph, more, more, width, nullptr)
                                    : at::zeros({graph.rows, width}, graph.nodes.options()));
    }
    return sums;
  }
  KernelSumsTangent<T> args{};
  args.sides = graph.sides<T>();
  args.scale = T(graph.inverse_variance * kLog2E);
  args.inverse_variance = T(graph.inverse_variance);
  args.tangents = tangent.terms<T>();
  args.parts = values.size();
  args.extra = more;
  for (size_t p = 0; p < values.size(); ++p) {
    args.widths[p] = values[p].size(1);
    sums.push_back(at::zeros({graph.rows, args.widths[p]}, graph.nodes.options()));
    args.outputs[p] = sums[p].template mutable_data_ptr<T>();
    const T* x = values[p].template const_data_ptr<T>();
    const T* rate = call.copy<T>(rates[p].template const_data_ptr<T>(), graph.column_count);
    args.values[p] = {x, x};
    args.rates[p] = {rate, rate};
  }
  kernels<T>().kernel_sums_tangent(call.host(), args);
  return sums;
}

std::vector<at::Tensor> graph_conv_tangent(const at::Tensor& nodes, const std::optional<at::Tensor>& tangent,
                                           at::TensorList values, at::TensorList rates,
                                           const std::optional<at::Tensor>& extra, const at::Tensor& inverse_variance,
                                           c10::string_view product_precision,
                                           const std::optional<at::Tensor>& column_nodes,
                                           const std::optional<at::Tensor>& column_tangent, int64_t offset) {
  check_precision(product_precision);
  const Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance);
  const int64_t count = graph.column_count;
  TORCH_CHECK(values.size() == rates.size() && !values.empty() && values.size() <= 2,
              "values must be one or two, with as many rates, got ", values.size(), " and ", rates.size());
  const Both both = BothSides{graph}.take("tangent", tangent, column_tangent, {0, nodes.size(1)});
  const std::vector<at::Tensor> own = matrices("values", values, graph.type, count);
  std::vector<at::Tensor> own_rates;
  for (const at::Tensor& x : rates) own_rates.push_back(vector("rates", x, graph.type, {count}));
  const at::Tensor more = extra ? matrix("extra", *extra, graph.type, count, own[0].size(1)) : at::Tensor();
  return GKD_DISPATCH(graph.type, [&] { return sum_tangents<scalar_t>(graph, both, own, own_rates, more); });
}

// What G', H' and the node terms are and how they move, of both sides.
struct Movement {
  Both tangent, left, right, left_rates, right_rates, extra, terms, term_tangents;
};

template <class T>
at::Tensor node_gradient_tangent(const Graph& graph, const Movement& movement) {
  Call call;
  at::Tensor output = at::zeros_like(graph.nodes);
  NodeGradientTangent<T> args{};
  NodeGradient<T>& first = args.gradient;
  first.sides = graph.sides<T>();
  first.scale = T(graph.inverse_variance * kLog2E);
  first.inverse_variance = T(graph.inverse_variance);
  first.left = movement.left.terms<T>();
  first.width = movement.left.row.size(1);
  first.gradient = output.mutable_data_ptr<T>();
  args.extra = movement.extra.terms<T>();
  args.terms = movement.term_tangents.padded<T>(call);
  if (!movement.tangent.row.defined()) {
    // K and G' stand still: a first-order gradient with Ḣ' = extra and ḋ in the place of H' and d.
    if (!args.extra.row) return output;
    first.right = args.extra;
    first.terms = args.terms;
    kernels<T>().node_gradient(call.host(), first);
    return output;
  }
  first.right = movement.right.terms<T>();
  first.terms = movement.terms.padded<T>(call);
  args.tangents = movement.tangent.terms<T>();
  args.left_rates = movement.left_rates.padded<T>(call);
  args.right_rates = movement.right_rates.padded<T>(call);
  kernels<T>().node_gradient_tangent(call.host(), args);
  return output;
}

at::Tensor graph_conv_double_backward(
    const at::Tensor& nodes, const std::optional<at::Tensor>& tangent, const at::Tensor& left, const at::Tensor& right,
    const at::Tensor& left_rates, const at::Tensor& right_rates, const std::optional<at::Tensor>& extra,
    const at::Tensor& terms, const at::Tensor& term_tangents, const at::Tensor& inverse_variance,
    c10::string_view product_precision, const std::optional<at::Tensor>& column_nodes,
    const std::optional<at::Tensor>& column_tangent, const std::optional<at::Tensor>& column_left,
    const std::optional<at::Tensor>& column_right, const std::optional<at::Tensor>& column_left_rates,
    const std::optional<at::Tensor>& column_right_rates, const std::optional<at::Tensor>& column_extra,
    const std::optional<at::Tensor>& column_terms, const std::optional<at::Tensor>& column_term_tangents,
    int64_t offset) {
  check_precision(product_precision);
  const Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance);
  const BothSides both{graph};
  const int64_t width = left.size(-1);
  const Movement movement{both.take("tangent", tangent, column_tangent, {0, nodes.size(1)}),
                          both.take("left", left, column_left, {0, width}),
                          both.take("right", right, column_right, {0, width}),
                          both.take("left_rates", left_rates, column_left_rates, {0}),
                          both.take("right_rates", right_rates, column_right_rates, {0}),
                          both.take("extra", extra, column_extra, {0, width}),
                          both.take("terms", terms, column_terms, {0}),
                          both.take("term_tangents", term_tangents, column_term_tangents, {0})};
  return GKD_DISPATCH(graph.type, [&] { return node_gradient_tangent<scalar_t>(graph, movement); });
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("graph_degrees", &graph_degrees);
  library.impl("graph_conv", &graph_conv);
  library.impl("graph_conv_backward", &graph_conv_backward);
  library.impl("graph_degrees_tangent", &graph_degrees_tangent);
  library.impl("graph_conv_tangent", &graph_conv_tangent);
  library.impl("graph_conv_double_backward", &graph_conv_double_backward);
}

}  // namespace gkd
