// The requested gradients, and the results, of the gradient operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace sgcd {

struct GradNeeds {
  bool hidden, weight, bias;
  bool hidden_fp32 = false;  // whatever the dtype of hidden: for a sum over the ranks of a group
};

// Of hidden's rows [n, H] and of weight [V, H] in their dtypes (fp16: fp32), of bias [V] fp32; undefined where not
// needed.
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline at::ScalarType grad_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

}  // namespace sgcd
