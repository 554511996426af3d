#include "check.h"

#include <algorithm>
#include <string>

namespace sgcd {
namespace {

// Rows may be apart by more than their length; within a row elements are neighbours.
void check_rows(const std::string& name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.layout() == at::kStrided, name, " is on ", x.device(), ", needs a CPU");
  const at::ScalarType t = x.scalar_type();
  TORCH_CHECK_VALUE(t == at::kFloat || t == at::kBFloat16 || t == at::kHalf, name, " is ", t,
                    ", needs float32, bfloat16 or float16");
  TORCH_CHECK_VALUE(x.dim() == 2, name, " has shape ", x.sizes(), ", needs two dimensions");
  TORCH_CHECK_VALUE((x.size(1) <= 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1)), name,
                    " has strides ", x.strides(), ", needs rows one after the other");
}

}  // namespace

void check_head(const char* prefix, const at::Tensor& hidden, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& rows) {
  const std::string hidden_name = std::string(prefix) + "hidden", weight_name = std::string(prefix) + "weight";
  check_rows(hidden_name, hidden);
  check_rows(weight_name, weight);
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(0) < INT32_MAX - 64 && weight.size(1) > 0 &&
                        weight.size(1) < (1 << 20) && hidden.size(1) == weight.size(1),
                    hidden_name, " has shape ", hidden.sizes(), " and ", weight_name, " ", weight.sizes(),
                    ", needs [N, H] and [V, H] with 0 < V < 2^31 - 65 and 0 < H < 2^20");
  if (bias) check_tokens("bias", *bias, at::kFloat, weight.size(0));
  if (!rows) return;
  check_dense("rows", *rows, at::kLong);
  TORCH_CHECK_VALUE(rows->dim() == 1, "rows has shape ", rows->sizes(), ", needs [n]");
  const int64_t* at = rows->const_data_ptr<int64_t>();
  const bool inside = std::all_of(at, at + rows->size(0), [&](int64_t row) { return row >= 0 && row < hidden.size(0); });
  TORCH_CHECK_VALUE(inside, "rows holds an index outside hidden ", hidden.sizes());
}

void check_same_tokens_and_words(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& teacher_hidden,
                                 const at::Tensor& teacher_weight) {
  TORCH_CHECK_VALUE(hidden.size(0) == teacher_hidden.size(0) && weight.size(0) == teacher_weight.size(0),
                    "teacher has N = ", teacher_hidden.size(0), ", V = ", teacher_weight.size(0), ", needs N = ",
                    hidden.size(0), ", V = ", weight.size(0), " as the student");
}

std::vector<Head> checked_pair(const at::Tensor& hidden, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& teacher_hidden,
                               const at::Tensor& teacher_weight, const std::optional<at::Tensor>& teacher_bias,
                               const std::optional<at::Tensor>& rows) {
  check_head("", hidden, weight, bias, rows);
  check_head("teacher_", teacher_hidden, teacher_weight, teacher_bias, rows);
  check_same_tokens_and_words(hidden, weight, teacher_hidden, teacher_weight);
  return {{hidden, weight, bias, rows}, {teacher_hidden, teacher_weight, teacher_bias, rows}};
}

}  // namespace sgcd
