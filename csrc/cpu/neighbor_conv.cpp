#include <torch/library.h>

#include <cmath>

#include "graph.h"

namespace gkd::neighbors {
namespace {

// The shares of l_i and of l_j in the exponent of A_ij.
struct Shares {
  double row, column;
};

Shares shares_of(c10::string_view normalization) {
  if (normalization == "row") return {1, 0};
  if (normalization == "column") return {0, 1};
  TORCH_CHECK(normalization == "symmetric", "normalization must be row, column or symmetric, got ", normalization);
  return {0.5, 0.5};
}

// Among fewer nodes products are not rounded: it would gain nothing, and where a node has one other the gradient is 0, all
// of it cancellation.
constexpr int64_t kFewestRounded = 32;

Graph graph_of_others(const at::Tensor& nodes, const std::optional<at::Tensor>& column_nodes, int64_t offset,
                      const at::Tensor& inverse_variance, c10::string_view product_precision) {
  Graph graph = graph_of(nodes, column_nodes, offset, inverse_variance, product_precision);
  if (graph.column_count < kFewestRounded) graph.product = Product::own;
  return graph;
}

// What all ops have in common.
template <class T, class Arguments>
Arguments arguments(const Graph& graph) {
  Arguments args{};
  args.sides = graph.sides<T>();
  args.kept.tiles = kept<T>(graph.affinities, graph.rows, 1);
  args.kept.known = graph.known && args.kept.tiles;
  args.scale = T(graph.inverse_variance * kLog2E);
  return args;
}

at::Tensor log_sums_of(const char* name, const std::optional<at::Tensor>& log_sums, int64_t count) {
  return log_sums ? vector(name, *log_sums, at::kDouble, {count}) : at::Tensor();
}

// Of both sides, in base 2, each times its share; undefined: 0. That of a row without others, −∞, counts as 0: nothing
// but its own column is there to be weighed.
template <class T>
WideTerms<T> wide_terms(Call& call, const Graph& graph, const at::Tensor& row, const at::Tensor& column, Shares shares) {
  auto of_side = [&](const at::Tensor& log_sums, double share, int64_t count) {
    WideNumbers<T> numbers(call, count);
    if (!log_sums.defined() || share == 0) return numbers;
    const double* l = log_sums.const_data_ptr<double>();
    for (int64_t i = 0; i < count; ++i) {
      if (l[i] != -INFINITY) numbers.set(i, l[i] * share * kLog2E);
    }
    return numbers;
  };
  return wide_terms(of_side(row, shares.row, graph.rows), of_side(column, shares.column, graph.column_count));
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sums_of(const Graph& graph) {
  Call call(graph.product);
  auto args = arguments<T, NeighborSums<T>>(graph);
  const int64_t rows = graph.rows;
  args.shifts = call.zeros<T>(rows);
  std::fill(args.shifts, args.shifts + rows, -3 * args.scale);  // of cosines from −1 exponents are −2·scale and more
  args.sums = call.zeros<double>(4 * rows);
  kernels<T>().neighbor_sums(call.host(), args);
  at::Tensor results[4];
  for (int64_t q = 0; q < 4; ++q) {
    results[q] = at::empty({rows}, graph.nodes.options().dtype(at::kDouble));
    double* out = results[q].mutable_data_ptr<double>();
    const double *totals = args.sums + q % 2 * rows, *products = args.sums + q * rows;
    for (int64_t i = 0; i < rows; ++i) {
      if (q < 2) out[i] = std::log(totals[i]) + (q + 1) * args.shifts[i] * kLn2;
      else out[i] = totals[i] == 0 ? 0 : products[i] / totals[i] * kLn2;
    }
  }
  return {results[0], results[1], results[2], results[3]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> neighbor_sums(
    const at::Tensor& nodes, const at::Tensor& inverse_variance, c10::string_view product_precision,
    const std::optional<at::Tensor>& column_nodes, int64_t offset) {
  const Graph graph = graph_of_others(nodes, column_nodes, offset, inverse_variance, product_precision);
  return GKD_DISPATCH(graph.type, [&] { return sums_of<scalar_t>(graph); });
}

template <class T>
at::Tensor forward(const Graph& graph, const at::Tensor& values, const at::Tensor& log_sums,
                   const at::Tensor& column_log_sums, Shares shares) {
  Call call(graph.product);
  auto args = arguments<T, NeighborConv<T>>(graph);
  args.shares = wide_terms<T>(call, graph, log_sums, column_log_sums, shares);
  args.transposes = graph.symmetric() && shares.row != shares.column;
  if (args.transposes) {
    args.transposed_shares = wide_terms<T>(call, graph, log_sums, log_sums, {shares.column, shares.row});
  }
  at::Tensor output = at::zeros({graph.rows, values.size(1)}, graph.nodes.options());
  args.values = values.const_data_ptr<T>();
  args.width = values.size(1);
  args.output = output.mutable_data_ptr<T>();
  kernels<T>().neighbor_conv(call.host(), args);
  return output;
}

at::Tensor neighbor_conv(const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& log_sums,
                         const at::Tensor& inverse_variance, c10::string_view normalization,
                         c10::string_view product_precision, const std::optional<at::Tensor>& column_nodes,
                         const std::optional<at::Tensor>& column_messages, int64_t offset,
                         const std::optional<at::Tensor>& column_log_sums) {
  const Shares shares = shares_of(normalization);
  const Graph graph = graph_of_others(nodes, column_nodes, offset, inverse_variance, product_precision);
  TORCH_CHECK(column_nodes.has_value() == column_messages.has_value(), "column_nodes and column_messages go together");
  TORCH_CHECK(graph.symmetric() || column_log_sums || shares.column == 0, "column_log_sums are missing");
  const at::Tensor own = matrix("messages", messages, graph.type, graph.rows);
  const at::Tensor values =
      column_messages ? matrix("column_messages", *column_messages, graph.type, graph.column_count, own.size(1)) : own;
  const at::Tensor l = log_sums_of("log_sums", log_sums, graph.rows);
  const at::Tensor others =
      graph.symmetric() ? l : log_sums_of("column_log_sums", column_log_sums, graph.column_count);
  return GKD_DISPATCH(graph.type, [&] { return forward<scalar_t>(graph, values, l, others, shares); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> neighbor_conv_keep(
    const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& inverse_variance,
    c10::string_view normalization, c10::string_view product_precision) {
  const Shares shares = shares_of(normalization);
  Graph graph = graph_of_others(nodes, {}, 0, inverse_variance, product_precision);
  const at::Tensor own = matrix("messages", messages, graph.type, graph.rows);
  graph.affinities = affinities_of(graph.nodes);
  return GKD_DISPATCH(graph.type, [&] {
    const at::Tensor log_sums = std::get<0>(sums_of<scalar_t>(graph));
    graph.known = true;
    return std::make_tuple(forward<scalar_t>(graph, own, log_sums, log_sums, shares), log_sums, graph.affinities);
  });
}

struct Side {
  at::Tensor upstream, messages, log_sums, terms;  // all but messages may be undefined: 0
};

// Output and messages' gradient, where they are defined, in place of the terms, and the weights' sums.
template <class T>
at::Tensor backward(const Graph& graph, const Side& own, const Side& columns, bool symmetric,
                    const at::Tensor& output = {}, const at::Tensor& messages_gradient = {},
                    const at::Tensor& weight_sums = {}) {
  Call call(graph.product);
  auto args = arguments<T, NeighborGradient<T>>(graph);
  auto pointer = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; };
  args.inverse_variance = T(graph.inverse_variance);
  args.symmetric = symmetric;
  args.log_sums = wide_terms<T>(call, graph, own.log_sums, columns.log_sums, {1, 1});
  args.left = {pointer(own.upstream), pointer(columns.upstream)};
  args.right = {pointer(own.messages), pointer(columns.messages)};
  args.width = own.upstream.size(1);
  args.terms = {pointer(own.terms), pointer(columns.terms)};
  args.output = pointer(output);
  args.messages_gradient = pointer(messages_gradient);
  args.weight_sums = pointer(weight_sums);
  at::Tensor gradient = at::zeros_like(graph.nodes);
  args.gradient = gradient.mutable_data_ptr<T>();
  kernels<T>().neighbor_gradient(call.host(), args);
  return gradient;
}

at::Tensor neighbor_conv_backward(
    const at::Tensor& upstream, const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& log_sums,
    const at::Tensor& node_terms, const at::Tensor& inverse_variance, c10::string_view normalization,
    c10::string_view product_precision, const std::optional<at::Tensor>& column_nodes,
    const std::optional<at::Tensor>& column_messages, int64_t offset, const std::optional<at::Tensor>& column_upstream,
    const std::optional<at::Tensor>& column_log_sums, const std::optional<at::Tensor>& column_node_terms) {
  TORCH_CHECK(normalization == "row" || normalization == "symmetric", "normalization must be row or symmetric, got ",
              normalization);
  const bool symmetric = normalization == "symmetric";
  const Graph graph = graph_of_others(nodes, column_nodes, offset, inverse_variance, product_precision);
  const auto type = graph.type;
  const int64_t rows = graph.rows, count = graph.column_count, width = messages.size(-1);
  const Side own{matrix("upstream", upstream, type, rows, width), matrix("messages", messages, type, rows),
                 log_sums_of("log_sums", log_sums, rows), vector("node_terms", node_terms, type, {rows})};
  Side columns = own;
  if (!graph.symmetric()) {
    TORCH_CHECK(column_messages, "column_nodes and column_messages go together");
    TORCH_CHECK(column_log_sums || (!symmetric && !column_upstream && !column_node_terms), "column_log_sums are missing");
    columns = {};
    columns.messages = matrix("column_messages", *column_messages, type, count, width);
    columns.log_sums = log_sums_of("column_log_sums", column_log_sums, count);
    if (column_upstream) columns.upstream = matrix("column_upstream", *column_upstream, type, count, width);
    if (column_node_terms) columns.terms = vector("column_node_terms", *column_node_terms, type, {count});
  }
  return GKD_DISPATCH(type, [&] { return backward<scalar_t>(graph, own, columns, symmetric); });
}

std::vector<at::Tensor> neighbor_conv_gradients(
    const at::Tensor& upstream, const at::Tensor& nodes, const at::Tensor& messages, const at::Tensor& output,
    const at::Tensor& log_sums, const at::Tensor& inverse_variance, c10::string_view normalization,
    c10::string_view product_precision, c10::List<bool> needs, const std::optional<at::Tensor>& affinities) {
  const Shares shares = shares_of(normalization);
  TORCH_CHECK(shares.row > 0, "normalization must be row or symmetric, got ", normalization);
  TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, got ", needs.size());
  const bool symmetric = shares.row == shares.column, needs_nodes = needs.get(0), needs_messages = needs.get(1);
  Graph graph = graph_of_others(nodes, {}, 0, inverse_variance, product_precision);
  if (affinities) graph.affinities = *affinities;
  graph.known = true;
  const int64_t rows = graph.rows, width = messages.size(-1);
  const Side own{matrix("upstream", upstream, graph.type, rows, width), matrix("messages", messages, graph.type, rows),
                 log_sums_of("log_sums", log_sums, rows), {}};
  const at::Tensor y = matrix("output", output, graph.type, rows, width);
  return GKD_DISPATCH(graph.type, [&] {
    std::vector<at::Tensor> gradients;
    at::Tensor messages_gradient, weight_sums;
    if (needs_messages || symmetric) {
      messages_gradient =
          forward<scalar_t>(graph, own.upstream, own.log_sums, own.log_sums, {shares.column, shares.row});
    }
    // The one other of two nodes weighs 1 however far it is: a gradient of 0, all of it cancellation.
    const bool moves = needs_nodes && rows > 2;
    if (moves && graph.type == at::kDouble) {
      // Log-sums are of the size 1/σ² and rounded as such, which is a factor of all weights of a row.
      const at::Tensor ones = at::empty({rows, 1}, nodes.options());
      std::fill_n(ones.mutable_data_ptr<scalar_t>(), rows, scalar_t(1));
      weight_sums = forward<scalar_t>(graph, ones, own.log_sums, own.log_sums, {1, 0});
    }
    if (moves) gradients.push_back(backward<scalar_t>(graph, own, own, symmetric, y, messages_gradient, weight_sums));
    else if (needs_nodes) gradients.push_back(at::zeros_like(nodes));
    if (needs_messages) gradients.push_back(messages_gradient);
    return gradients;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("neighbor_sums", &neighbor_sums);
  library.impl("neighbor_conv", &neighbor_conv);
  library.impl("neighbor_conv_keep", &neighbor_conv_keep);
  library.impl("neighbor_conv_backward", &neighbor_conv_backward);
  library.impl("neighbor_conv_gradients", &neighbor_conv_gradients);
}

}  // namespace gkd::neighbors
