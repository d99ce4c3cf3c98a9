#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "graph.h"

namespace gkd {
namespace {

bool is_row(c10::string_view normalization) {
  TORCH_CHECK(normalization == "row" || normalization == "symmetric", "normalization must be row or symmetric, got ",
              normalization);
  return normalization == "row";
}

template <class T>
at::Tensor degrees_of(const Graph& graph) {
  Call call(graph.product);
  KernelSums<T> args = arguments<T>(graph);
  args.degrees = call.zeros<double>(graph.rows);
  kernels<T>().kernel_sums(call.host(), args);
  at::Tensor degrees = at::empty({graph.rows}, graph.nodes.options());
  std::copy(args.degrees, args.degrees + graph.rows, degrees.mutable_data_ptr<T>());
  return degrees;
}

// f(degrees)
template <class T, class F>
const T* factors_of(Call& call, const at::Tensor& degrees, const F& factor) {
  const T* degree = degrees.const_data_ptr<T>();
  T* out = call.zeros<T>(degrees.numel());
  std::transform(degree, degree + degrees.numel(), out, factor);
  return out;
}

template <class T>
T inverse_root(T degree) {
  return 1 / std::sqrt(degree);
}

template <class T>
T inverse(T degree) {
  return 1 / degree;
}

template <class T>
std::tuple<at::Tensor, at::Tensor> forward(Graph& graph, const at::Tensor& messages, const at::Tensor& columns,
                                           bool row, at::Tensor degrees, at::Tensor column_degrees) {
  Call call(graph.product);
  const int64_t width = messages.size(1);
  if (row) {
    double* sums = call.zeros<double>(graph.rows);
    const T* values = columns.const_data_ptr<T>();
    at::Tensor output = kernel_times<T>(graph, values, nullptr, width, sums);
    degrees = at::empty({graph.rows}, graph.nodes.options());
    std::copy(sums, sums + graph.rows, degrees.mutable_data_ptr<T>());
    scale_rows(output.mutable_data_ptr<T>(), sums, graph.rows, width, inverse<double>);
    return {output, degrees};
  }
  if (graph.symmetric()) {
    column_degrees = degrees = degrees_of<T>(graph);
    graph.known = true;
  }
  const T* factors = factors_of<T>(call, column_degrees, inverse_root<T>);
  at::Tensor output = kernel_times<T>(graph, columns.const_data_ptr<T>(), factors, width, nullptr);
  scale_rows(output.mutable_data_ptr<T>(), degrees.const_data_ptr<T>(), graph.rows, width, inverse_root<T>);
  return {output, degrees};
}

struct Upstream {
  at::Tensor upstream, messages, degrees;  // of one side; upstream undefined: zero
};

// G' and H' of one side: upstream and messages, and what multiplies them.
template <class T>
struct Factors {
  const T *left = nullptr, *right = nullptr, *left_factors = nullptr, *right_factors = nullptr;
  Factors(Call& call, const Upstream& side, bool row) {
    if (side.upstream.defined()) left = side.upstream.const_data_ptr<T>();
    if (side.messages.defined()) right = side.messages.const_data_ptr<T>();
    if (!side.degrees.defined()) return;
    left_factors = row ? factors_of<T>(call, side.degrees, inverse<T>) : factors_of<T>(call, side.degrees, inverse_root<T>);
    if (!row) right_factors = left_factors;
  }
};

// d_i = −(G_i·Y_i)/deg_i (row) or −(G_i·Y_i + H_i·dH_i)/(2 deg_i) (symmetric)
template <class T>
T* node_terms(Call& call, const Upstream& side, const at::Tensor& output, const at::Tensor* messages_gradient) {
  const int64_t rows = output.size(0), width = output.size(1);
  const T* degree = side.degrees.const_data_ptr<T>();
  Call dots;
  double* totals = dots.zeros<double>(rows);
  auto add_dots = [&](const at::Tensor& a, const at::Tensor& b) {
    kernels<T>().row_dots(dots.host(), {a.const_data_ptr<T>(), b.const_data_ptr<T>(), rows, width, totals});
  };
  add_dots(side.upstream, output);
  if (messages_gradient) add_dots(side.messages, *messages_gradient);
  T* terms = call.zeros<T>(rows);
  for (int64_t i = 0; i < rows; ++i) terms[i] = T(-totals[i] / (messages_gradient ? 2 * degree[i] : degree[i]));
  return terms;
}

template <class T>
std::vector<at::Tensor> backward(const Graph& graph, const Upstream& own, const Upstream& columns,
                                 const at::Tensor& output, bool row, bool needs_nodes, bool needs_messages,
                                 const at::Tensor& given_terms, const at::Tensor& column_terms) {
  Call call(graph.product);
  const int64_t width = output.size(1);
  const Factors<T> mine(call, own, row);
  std::optional<Factors<T>> others;
  if (!graph.symmetric()) others.emplace(call, columns, row);
  const Factors<T>& other = graph.symmetric() ? mine : *others;
  std::vector<at::Tensor> gradients;
  at::Tensor messages_gradient;
  // Only the symmetric normalization's node terms need the messages' gradient.
  const bool at_once = row && needs_nodes && needs_messages && other.left;
  if (at_once) {
    messages_gradient = at::zeros_like(output);
  } else if (needs_messages || (graph.symmetric() && !row)) {
    messages_gradient = other.left ? kernel_times<T>(graph, other.left, other.left_factors, width, nullptr)
                                   : at::zeros_like(output);
    if (!row) {
      scale_rows(messages_gradient.mutable_data_ptr<T>(), own.degrees.const_data_ptr<T>(), graph.rows, width,
                 inverse_root<T>);
    }
  }
  if (needs_nodes) {
    NodeGradient<T> args{};
    args.sides = graph.sides<T>();
    args.scale = T(graph.inverse_variance * kLog2E);
    args.inverse_variance = T(graph.inverse_variance);
    args.left = {mine.left, other.left};
    args.right = {mine.right, other.right};
    args.left_factors = {mine.left_factors, other.left_factors};
    args.right_factors = {mine.right_factors, other.right_factors};
    args.width = width;
    args.affinities = kept<T>(graph.affinities, graph.rows, 1);
    if (at_once) args.messages_gradient = messages_gradient.mutable_data_ptr<T>();
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
  const Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance, product_precision);
  return GKD_DISPATCH(graph.type, [&] { return degrees_of<scalar_t>(graph); });
}

std::tuple<at::Tensor, at::Tensor> graph_conv(
    const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& inverse_variance,
    c10::string_view normalization, c10::string_view product_precision, const std::optional<at::Tensor>& column_nodes,
    const std::optional<at::Tensor>& column_messages, int64_t offset, const std::optional<at::Tensor>& degrees,
    const std::optional<at::Tensor>& column_degrees) {
  const bool row = is_row(normalization);
  Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance, product_precision);
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
  if (graph.symmetric() && !row) graph.affinities = affinities_of(graph.nodes);
  return GKD_DISPATCH(graph.type,
                      [&] { return forward<scalar_t>(graph, own, columns, row, own_degrees, other_degrees); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> graph_conv_keep(
    const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& inverse_variance,
    c10::string_view normalization, c10::string_view product_precision) {
  Graph graph = graph_of(nodes, {}, 0, inverse_variance, product_precision);
  const at::Tensor own = matrix("messages", messages, graph.type, graph.rows);
  graph.affinities = affinities_of(graph.nodes);
  return std::tuple_cat(
      GKD_DISPATCH(graph.type, [&] { return forward<scalar_t>(graph, own, own, is_row(normalization), {}, {}); }),
      std::make_tuple(graph.affinities));
}

std::vector<at::Tensor> graph_conv_backward(
    const at::Tensor& upstream, const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& output,
    const at::Tensor& degrees, const at::Tensor& inverse_variance, c10::string_view normalization,
    c10::string_view product_precision, c10::List<bool> needs, const std::optional<at::Tensor>& column_nodes,
    const std::optional<at::Tensor>& column_messages, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_degrees, const std::optional<at::Tensor>& terms,
    const std::optional<at::Tensor>& column_terms, const std::optional<at::Tensor>& affinities) {
  const bool row = is_row(normalization);
  Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance, product_precision);
  TORCH_CHECK(graph.symmetric() || !affinities, "affinities are kept where the columns are the rows");
  if (affinities) graph.affinities = *affinities;
  graph.known = true;
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

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("graph_degrees", &graph_degrees);
  library.impl("graph_conv", &graph_conv);
  library.impl("graph_conv_keep", &graph_conv_keep);
  library.impl("graph_conv_backward", &graph_conv_backward);
}

}  // namespace gkd
