#include <torch/library.h>

#include "host.h"

namespace gkd::pairs {
namespace {

struct Kind {
  const char* name;
  PairKind kind;
  int64_t sides, terms, sums;
};

constexpr Kind kKinds[] = {{"absolute_sums", PairKind::absolute_sums, 1, 0, 1},
                           {"distances", PairKind::distances, 1, 1, 1},
                           {"rkd_distance", PairKind::rkd_distance, 2, 2, 3},
                           {"polynomial", PairKind::polynomial, 2, 0, 1},
                           {"pkt", PairKind::pkt, 2, 2, 1}};

const Kind& kind_of(c10::string_view name) {
  for (const Kind& kind : kKinds) {
    if (name == kind.name) return kind;
  }
  TORCH_CHECK(false, "unknown kind of pair sums ", name);
}

using Optional = std::optional<at::Tensor>;

// The rows of the graphs, their terms, and what they meet. Directions are undefined where nothing moves.
struct Rows {
  std::vector<at::Tensor> sides;
  at::Tensor terms, tangents[2], term_tangents;
};

Rows rows_of(const char* name, const Kind& kind, at::TensorList sides, const at::Tensor& terms, at::ScalarType type,
             Product product) {
  TORCH_CHECK(int64_t(sides.size()) == kind.sides, kind.name, " has ", kind.sides, " sides, got ", sides.size());
  Rows rows;
  for (const at::Tensor& x : matrices(name, sides, type, sides[0].size(0))) {
    rows.sides.push_back(as_multiplied(x, product));
  }
  rows.terms = vector("terms", terms, type, {kind.terms, sides[0].size(0)});
  return rows;
}

void add_tangents(Rows& rows, at::TensorList tangents, const c10::List<bool>& moving, const at::Tensor& term_tangents) {
  size_t next = 0;
  TORCH_CHECK(moving.size() == rows.sides.size(), "moving must have an entry per side");
  for (size_t q = 0; q < rows.sides.size(); ++q) {
    if (!moving.get(q)) continue;
    TORCH_CHECK(next < tangents.size(), "tangents must have one for each moving side, got ", tangents.size());
    const at::Tensor& x = rows.sides[q];
    rows.tangents[q] = matrix("tangents", tangents[next++], x.scalar_type(), x.size(0), x.size(1));
  }
  rows.term_tangents = vector("term_tangents", term_tangents, rows.terms.scalar_type(), rows.terms.sizes().vec());
}

struct Problem {
  Kind kind;
  Rows own, others;  // others: the column set
  bool symmetric;
  at::Tensor constants, constant_tangents;
  int64_t offset;
  at::ScalarType type;
  Product product;

  int64_t count() const { return own.sides[0].size(0); }
};

Problem problem_of(c10::string_view name, at::TensorList sides, const at::Tensor& terms, const at::Tensor& constants,
                   c10::string_view product_precision, const std::optional<at::TensorList>& columns,
                   const Optional& column_terms, int64_t offset, bool second_order = false) {
  TORCH_CHECK(!sides.empty(), "pair_sums needs a side");
  const Kind& kind = kind_of(name);
  Problem p{kind, {}, {}, !columns, {}, {}, offset, row_type(sides[0]), Product::own};
  const Product product = product_of(product_precision, p.type);
  if (!second_order) p.product = product;
  p.own = rows_of("sides", kind, sides, terms, p.type, product);
  p.others = p.own;
  if (columns) {
    TORCH_CHECK(column_terms, "columns and column_terms go together");
    p.others = rows_of("columns", kind, *columns, *column_terms, p.type, product);
  }
  p.constants = vector("constants", constants, at::kDouble, {constants.numel()});
  return p;
}

template <class T>
struct Arguments {
  Call call;
  PairSums<T> args{};

  explicit Arguments(const Problem& p) : call(p.product) {
    args.kind = p.kind.kind;
    args.moving = p.own.term_tangents.defined();
    for (int64_t q = 0; q < p.kind.sides; ++q) {
      args.sides[q] = sides_of<T>(p.own.sides[q], p.symmetric ? nullptr : &p.others.sides[q], p.offset);
      args.tangents[q] = {data(p.own.tangents[q]), data(p.others.tangents[q])};
    }
    for (int64_t k = 0; k < p.kind.terms; ++k) {
      args.terms[k] = both(p, p.own.terms, p.others.terms, k);
      if (args.moving) args.term_tangents[k] = both(p, p.own.term_tangents, p.others.term_tangents, k);
    }
    args.constant_count = p.constants.numel();
    args.constants = call.template copy<T>(p.constants.const_data_ptr<double>(), args.constant_count);
    if (!args.moving) return;
    args.constant_tangents = call.template copy<T>(p.constant_tangents.const_data_ptr<double>(), args.constant_count);
  }

  static const T* data(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; }

  // Row k of tensors [·, count], with room for vectors that read beyond the end.
  Terms<T> both(const Problem& p, const at::Tensor& own, const at::Tensor& others, int64_t k) {
    auto row = [&](const at::Tensor& x) {
      return call.template copy<T>(x.const_data_ptr<T>() + k * x.size(1), x.size(1));
    };
    const T* mine = row(own);
    return {mine, p.symmetric ? mine : row(others)};
  }
};

at::Tensor sums_of(const Problem& p) {
  at::Tensor sums = at::zeros({p.kind.sums, p.count()}, p.own.terms.options().dtype(at::kDouble));
  GKD_DISPATCH(p.type, [&] {
    Arguments<scalar_t> with(p);
    with.args.sums = sums.mutable_data_ptr<double>();
    kernels<scalar_t>().pair_sums(with.call.host(), with.args);
  });
  return sums;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> gradients_of(const Problem& p, const at::Tensor& upstream,
                                                             const Optional& column_upstream,
                                                             const c10::List<bool>& needs) {
  TORCH_CHECK(int64_t(needs.size()) == p.kind.sides, "needs must have ", p.kind.sides, " entries, got ", needs.size());
  TORCH_CHECK(p.symmetric == !column_upstream, "columns and column_upstream go together");
  std::vector<at::Tensor> gradients;
  at::Tensor wide = at::zeros({p.kind.terms, p.count()}, p.own.terms.options().dtype(at::kDouble));
  const at::Tensor own = vector("upstream", upstream, p.type, {p.count()}).unsqueeze(0);
  const at::Tensor others =
      p.symmetric ? own : vector("column_upstream", *column_upstream, p.type, {p.others.sides[0].size(0)}).unsqueeze(0);
  GKD_DISPATCH(p.type, [&] {
    Arguments<scalar_t> with(p);
    with.args.upstream = with.both(p, own, others, 0);
    for (int64_t q = 0; q < p.kind.sides; ++q) {
      if (!needs.get(q)) continue;
      gradients.push_back(at::zeros_like(p.own.sides[q]));
      with.args.gradients[q] = gradients.back().template mutable_data_ptr<scalar_t>();
    }
    with.args.term_sums = wide.mutable_data_ptr<double>();
    kernels<scalar_t>().pair_sums_backward(with.call.host(), with.args);
  });
  return {gradients, wide.to(p.type)};
}

void set_directions(Problem& p, at::TensorList tangents, const c10::List<bool>& moving, const at::Tensor& term_tangents,
                    const at::Tensor& constant_tangents, const std::optional<at::TensorList>& column_tangents,
                    const Optional& column_term_tangents) {
  add_tangents(p.own, tangents, moving, term_tangents);
  if (p.symmetric) {
    p.others = p.own;
  } else {
    TORCH_CHECK(column_tangents && column_term_tangents, "columns and their tangents go together");
    add_tangents(p.others, *column_tangents, moving, *column_term_tangents);
  }
  p.constant_tangents = vector("constant_tangents", constant_tangents, at::kDouble, p.constants.sizes().vec());
}

at::Tensor pair_sums(c10::string_view kind, at::TensorList sides, const at::Tensor& terms, const at::Tensor& constants,
                     c10::string_view product_precision, std::optional<at::TensorList> columns,
                     const Optional& column_terms, int64_t offset) {
  return sums_of(problem_of(kind, sides, terms, constants, product_precision, columns, column_terms, offset));
}

std::tuple<std::vector<at::Tensor>, at::Tensor> pair_sums_backward(
    c10::string_view kind, const at::Tensor& upstream, at::TensorList sides, const at::Tensor& terms,
    const at::Tensor& constants, c10::string_view product_precision, c10::List<bool> needs,
    std::optional<at::TensorList> columns, const Optional& column_terms, const Optional& column_upstream,
    int64_t offset) {
  const Problem p = problem_of(kind, sides, terms, constants, product_precision, columns, column_terms, offset);
  return gradients_of(p, upstream, column_upstream, needs);
}

at::Tensor pair_sums_tangent(c10::string_view kind, at::TensorList sides, const at::Tensor& terms,
                             const at::Tensor& constants, at::TensorList tangents, c10::List<bool> moving,
                             const at::Tensor& term_tangents, const at::Tensor& constant_tangents,
                             c10::string_view product_precision, std::optional<at::TensorList> columns,
                             const Optional& column_terms, std::optional<at::TensorList> column_tangents,
                             const Optional& column_term_tangents, int64_t offset) {
  Problem p = problem_of(kind, sides, terms, constants, product_precision, columns, column_terms, offset, true);
  set_directions(p, tangents, moving, term_tangents, constant_tangents, column_tangents, column_term_tangents);
  return sums_of(p);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> pair_sums_double_backward(
    c10::string_view kind, const at::Tensor& upstream, at::TensorList sides, const at::Tensor& terms,
    const at::Tensor& constants, at::TensorList tangents, c10::List<bool> moving, const at::Tensor& term_tangents,
    const at::Tensor& constant_tangents, c10::string_view product_precision, c10::List<bool> needs,
    std::optional<at::TensorList> columns, const Optional& column_terms,
    std::optional<at::TensorList> column_tangents, const Optional& column_term_tangents,
    const Optional& column_upstream, int64_t offset) {
  Problem p = problem_of(kind, sides, terms, constants, product_precision, columns, column_terms, offset, true);
  set_directions(p, tangents, moving, term_tangents, constant_tangents, column_tangents, column_term_tangents);
  return gradients_of(p, upstream, column_upstream, needs);
}

// One graph per sample: of tensors [graphs, rows, …] and of those whose graphs are the second dimension.
at::Tensor of_graph(const at::Tensor& x, int64_t g, int64_t count) { return x.select(0, g).narrow(0, 0, count); }

std::vector<at::Tensor> of_graph(at::TensorList list, int64_t g, int64_t count) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& x : list) out.push_back(of_graph(x, g, count));
  return out;
}

at::Tensor terms_of_graph(const at::Tensor& x, int64_t g, int64_t count) { return x.select(1, g).narrow(1, 0, count); }

void check_graphs(at::TensorList sides, const at::Tensor& terms, const at::Tensor& constants, const at::Tensor& counts) {
  TORCH_CHECK(!sides.empty() && sides[0].dim() == 3, "sides must have 3 dimensions [graphs, rows, width]");
  const int64_t graphs = sides[0].size(0), rows = sides[0].size(1);
  for (const at::Tensor& x : sides) {
    TORCH_CHECK(x.dim() == 3 && x.size(0) == graphs && x.size(1) == rows, "sides must have shape [", graphs, ", ", rows,
                ", width], got ", x.sizes());
  }
  TORCH_CHECK(counts.dim() == 1 && counts.size(0) == graphs, "counts must have shape [", graphs, "], got ",
              counts.sizes());
  TORCH_CHECK(terms.dim() == 3 && terms.size(1) == graphs && terms.size(2) == rows, "terms must have shape [terms, ",
              graphs, ", ", rows, "], got ", terms.sizes());
  TORCH_CHECK(constants.dim() == 2 && constants.size(1) == graphs, "constants must have shape [constants, ", graphs,
              "], got ", constants.sizes());
}

at::Tensor batched_sums(c10::string_view kind, const at::Tensor& rows, const at::Tensor& counts, auto&& sums_of_graph) {
  at::Tensor sums = at::zeros({kind_of(kind).sums, rows.size(0), rows.size(1)}, rows.options().dtype(at::kDouble));
  for_graphs(counts, rows.size(1), [&](int64_t g, int64_t count) {
    terms_of_graph(sums, g, count).copy_(sums_of_graph(g, count));
  });
  return sums;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> batched_gradients(at::TensorList sides, const at::Tensor& terms,
                                                                  const at::Tensor& counts,
                                                                  const c10::List<bool>& needs,
                                                                  auto&& gradients_of_graph) {
  TORCH_CHECK(needs.size() == sides.size(), "needs must have ", sides.size(), " entries, got ", needs.size());
  std::vector<at::Tensor> gradients;
  for (size_t q = 0; q < sides.size(); ++q) {
    if (needs.get(q)) gradients.push_back(at::zeros_like(sides[q]));
  }
  at::Tensor moved = at::zeros_like(terms);
  for_graphs(counts, terms.size(2), [&](int64_t g, int64_t count) {
    const auto [own, own_terms] = gradients_of_graph(g, count);
    for (size_t q = 0; q < own.size(); ++q) of_graph(gradients[q], g, count).copy_(own[q]);
    terms_of_graph(moved, g, count).copy_(own_terms);
  });
  return {gradients, moved};
}

Problem problem_of_graph(c10::string_view kind, at::TensorList sides, const at::Tensor& terms,
                         const at::Tensor& constants, c10::string_view product_precision, int64_t g, int64_t count,
                         bool second_order = false) {
  return problem_of(kind, of_graph(sides, g, count), terms_of_graph(terms, g, count), constants.select(1, g),
                    product_precision, {}, {}, 0, second_order);
}

void set_directions_of_graph(Problem& p, at::TensorList tangents, const c10::List<bool>& moving,
                             const at::Tensor& term_tangents, const at::Tensor& constant_tangents, int64_t g,
                             int64_t count) {
  set_directions(p, of_graph(tangents, g, count), moving, terms_of_graph(term_tangents, g, count),
                 constant_tangents.select(1, g), {}, {});
}

at::Tensor batched_pair_sums(c10::string_view kind, at::TensorList sides, const at::Tensor& terms,
                             const at::Tensor& constants, c10::string_view product_precision,
                             const at::Tensor& counts) {
  check_graphs(sides, terms, constants, counts);
  return batched_sums(kind, sides[0], counts, [&](int64_t g, int64_t count) {
    return sums_of(problem_of_graph(kind, sides, terms, constants, product_precision, g, count));
  });
}

std::tuple<std::vector<at::Tensor>, at::Tensor> batched_pair_sums_backward(
    c10::string_view kind, const at::Tensor& upstream, at::TensorList sides, const at::Tensor& terms,
    const at::Tensor& constants, c10::string_view product_precision, c10::List<bool> needs, const at::Tensor& counts) {
  check_graphs(sides, terms, constants, counts);
  return batched_gradients(sides, terms, counts, needs, [&](int64_t g, int64_t count) {
    const Problem p = problem_of_graph(kind, sides, terms, constants, product_precision, g, count);
    return gradients_of(p, of_graph(upstream, g, count), {}, needs);
  });
}

at::Tensor batched_pair_sums_tangent(c10::string_view kind, at::TensorList sides, const at::Tensor& terms,
                                     const at::Tensor& constants, at::TensorList tangents, c10::List<bool> moving,
                                     const at::Tensor& term_tangents, const at::Tensor& constant_tangents,
                                     c10::string_view product_precision, const at::Tensor& counts) {
  check_graphs(sides, terms, constants, counts);
  return batched_sums(kind, sides[0], counts, [&](int64_t g, int64_t count) {
    Problem p = problem_of_graph(kind, sides, terms, constants, product_precision, g, count, true);
    set_directions_of_graph(p, tangents, moving, term_tangents, constant_tangents, g, count);
    return sums_of(p);
  });
}

std::tuple<std::vector<at::Tensor>, at::Tensor> batched_pair_sums_double_backward(
    c10::string_view kind, const at::Tensor& upstream, at::TensorList sides, const at::Tensor& terms,
    const at::Tensor& constants, at::TensorList tangents, c10::List<bool> moving, const at::Tensor& term_tangents,
    const at::Tensor& constant_tangents, c10::string_view product_precision, c10::List<bool> needs,
    const at::Tensor& counts) {
  check_graphs(sides, terms, constants, counts);
  return batched_gradients(sides, terms, counts, needs, [&](int64_t g, int64_t count) {
    Problem p = problem_of_graph(kind, sides, terms, constants, product_precision, g, count, true);
    set_directions_of_graph(p, tangents, moving, term_tangents, constant_tangents, g, count);
    return gradients_of(p, of_graph(upstream, g, count), {}, needs);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("pair_sums", &pair_sums);
  library.impl("pair_sums_backward", &pair_sums_backward);
  library.impl("pair_sums_tangent", &pair_sums_tangent);
  library.impl("pair_sums_double_backward", &pair_sums_double_backward);
  library.impl("batched_pair_sums", &batched_pair_sums);
  library.impl("batched_pair_sums_backward", &batched_pair_sums_backward);
  library.impl("batched_pair_sums_tangent", &batched_pair_sums_tangent);
  library.impl("batched_pair_sums_double_backward", &batched_pair_sums_double_backward);
}

}  // namespace gkd::pairs
