#include <torch/library.h>

#include "host.h"

namespace gkd {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> unit_rows(at::TensorList rows, at::ScalarType type) {
  std::vector<at::Tensor> unit, inverse_norms;
  Call call;
  for (const at::Tensor& stage : rows) {
    const at::Tensor x = matrix("rows", stage.to(type), type);
    unit.push_back(at::empty(x.sizes(), x.options()));
    inverse_norms.push_back(at::empty({x.size(0)}, x.options()));
    GKD_DISPATCH(type, [&] {
      kernels<scalar_t>().unit_rows(call.host(),
                                    {x.const_data_ptr<scalar_t>(), x.size(0), x.size(1),
                                     unit.back().mutable_data_ptr<scalar_t>(),
                                     inverse_norms.back().mutable_data_ptr<scalar_t>()});
    });
  }
  return {unit, inverse_norms};
}

std::vector<at::Tensor> unit_rows_backward(at::TensorList upstream, at::TensorList unit, at::TensorList inverse_norms,
                                           at::ScalarType type) {
  std::vector<at::Tensor> gradients;
  Call call;
  for (size_t k = 0; k < unit.size(); ++k) {
    const at::ScalarType compute = row_type(unit[k]);
    const at::Tensor e = matrix("unit", unit[k], compute);
    const at::Tensor g = matrix("upstream", upstream[k], compute, e.size(0), e.size(1));
    const at::Tensor inverse = vector("inverse_norms", inverse_norms[k], compute, {e.size(0)});
    at::Tensor gradient = at::empty(e.sizes(), e.options());
    GKD_DISPATCH(compute, [&] {
      kernels<scalar_t>().unit_rows_backward(
          call.host(), {g.const_data_ptr<scalar_t>(), e.const_data_ptr<scalar_t>(), inverse.const_data_ptr<scalar_t>(),
                        e.size(0), e.size(1), gradient.mutable_data_ptr<scalar_t>()});
    });
    gradients.push_back(gradient.to(type));
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(gkd_fast, CPU, library) {
  library.impl("unit_rows", &unit_rows);
  library.impl("unit_rows_backward", &unit_rows_backward);
}

}  // namespace gkd
