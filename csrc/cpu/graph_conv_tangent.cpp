#include <torch/library.h>

#include "graph.h"

namespace gkd {
namespace {

Graph second_order(Graph graph) {
  graph.product = second_order_product;
  return graph;
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
  const Graph graph = second_order(graph_of(nodes, column_nodes, offset, inverse_variance, product_precision));
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
      sums.push_back(p == 0 && more ? kernel_times<T>(graph, more, nullptr, width, nullptr)
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
  const Graph graph = second_order(graph_of(nodes, column_nodes, offset, inverse_variance, product_precision));
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
  const Graph graph = second_order(graph_of(nodes, column_nodes, offset, inverse_variance, product_precision));
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
  library.impl("graph_degrees_tangent", &graph_degrees_tangent);
  library.impl("graph_conv_tangent", &graph_conv_tangent);
  library.impl("graph_conv_double_backward", &graph_conv_double_backward);
}

}  // namespace gkd
