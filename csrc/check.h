// Argument checks of the raw operators. Python checks users' arguments; these keep any other caller from a crash.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <vector>

#include "args.h"
#include "head.h"

namespace sgcd {

inline void check_dense(const char* name, const at::Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.layout() == at::kStrided && x.scalar_type() == dtype && x.is_contiguous(),
                    name, " is ", x.toString(), " on ", x.device(), ", needs a contiguous CPU tensor of ", dtype);
}

inline void check_tokens(const char* name, const at::Tensor& x, at::ScalarType dtype, int64_t n) {
  check_dense(name, x, dtype);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == n, name, " has shape ", x.sizes(), ", needs [", n, "]");
}

inline void check_matrix(const char* name, const at::Tensor& x, int64_t rows, int64_t columns) {
  check_dense(name, x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " has shape ", x.sizes(),
                    ", needs [", rows, ", ", columns, "]");
}

inline void check_transform(const HeadArgs& head, int64_t n) {
  if (head.temperature) check_tokens("temperature", *head.temperature, at::kFloat, n);
  TORCH_CHECK_VALUE(head.softcap >= 0 && head.softcap < 1e30, "softcap is ", head.softcap,
                    ", needs a number >= 0 (0 is none)");
}

inline void check_beta(double beta) {
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta is ", beta, ", needs a number in [0, 1]");
}

// The heads of a call, checked: one, or student and teacher.
std::vector<Head> checked_heads(const HeadArgs& args);
std::vector<Head> checked_heads(const PairArgs& args);

}  // namespace sgcd
