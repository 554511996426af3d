// What the raw operators refuse. The Python layer checks what users give; this keeps any other caller from a crash.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

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

inline void check_shared(const std::optional<at::Tensor>& temperature, int64_t n, double softcap) {
  if (temperature) check_tokens("temperature", *temperature, at::kFloat, n);
  TORCH_CHECK_VALUE(softcap >= 0 && softcap < 1e30, "softcap is ", softcap, ", needs a number >= 0 (0 is none)");
}

void check_head(const char* prefix, const at::Tensor& hidden, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& rows);
void check_same_tokens_and_words(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& teacher_hidden,
                                 const at::Tensor& teacher_weight);

// Student and teacher, checked.
std::vector<Head> checked_pair(const at::Tensor& hidden, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& teacher_hidden,
                               const at::Tensor& teacher_weight, const std::optional<at::Tensor>& teacher_bias,
                               const std::optional<at::Tensor>& rows);

}  // namespace sgcd
