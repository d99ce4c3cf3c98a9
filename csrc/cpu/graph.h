// The graph of graph_conv's ops, and the sums over its adjacency.
#pragma once
#include "host.h"

namespace gkd {

// The graph on both sides; columns undefined: the rows.
struct Graph {
  at::Tensor nodes, columns;
  at::ScalarType type;
  Product product;
  int64_t rows, column_count, offset;
  double inverse_variance;
  // K of the upper tiles, of neighbor_conv the cosines, kept from pass to pass; undefined or [0]: recomputed in each.
  at::Tensor affinities;
  bool known = false;     // a pass has written them
  bool symmetric() const { return !columns.defined(); }

  template <class T>
  Sides<T> sides() const {
    return sides_of<T>(nodes, symmetric() ? nullptr : &columns, offset);
  }
};

inline Graph graph_of(const at::Tensor& nodes, const std::optional<at::Tensor>& column_nodes, int64_t offset,
               const at::Tensor& inverse_variance, c10::string_view product_precision) {
  Graph graph;
  graph.type = row_type(nodes);
  graph.product = product_of(product_precision, graph.type);
  graph.nodes = matrix("nodes", nodes, graph.type);
  if (column_nodes) graph.columns = matrix("column_nodes", *column_nodes, graph.type, -1, nodes.size(1));
  graph.rows = nodes.size(0);
  graph.column_count = column_nodes ? graph.columns.size(0) : graph.rows;
  graph.offset = offset;
  TORCH_CHECK(inverse_variance.dim() == 0, "inverse_variance must have no dimensions");
  graph.inverse_variance = inverse_variance.item<double>();
  return graph;
}

template <class T>
KernelSums<T> arguments(const Graph& graph) {
  KernelSums<T> args{};
  args.sides = graph.sides<T>();
  args.scale = T(graph.inverse_variance * kLog2E);
  args.affinities = kept<T>(graph.affinities, graph.rows, 1);
  args.known = graph.known && args.affinities;
  return args;
}

// Σ_j K_ij factors_j values_j, [rows, width]
template <class T>
at::Tensor kernel_times(const Graph& graph, const T* values, const T* factors, int64_t width, double* degrees) {
  Call call(graph.product);
  KernelSums<T> args = arguments<T>(graph);
  at::Tensor output = at::zeros({graph.rows, width}, graph.nodes.options());
  args.values = values;
  args.factors = factors;
  args.width = width;
  args.degrees = degrees;
  args.output = output.mutable_data_ptr<T>();
  kernels<T>().kernel_sums(call.host(), args);
  return output;
}

}  // namespace gkd
