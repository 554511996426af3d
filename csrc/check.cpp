#include "check.h"

#include <algorithm>
#include <string>

namespace sgcd {
namespace {

// Row stride may exceed the row length; elements of a row are contiguous.
void check_rows(const std::string& name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.layout() == at::kStrided, name, " is on ", x.device(), ", needs a CPU");
  const at::ScalarType t = x.scalar_type();
  TORCH_CHECK_VALUE(t == at::kFloat || t == at::kBFloat16 || t == at::kHalf, name, " is ", t,
                    ", needs float32, bfloat16 or float16");
  TORCH_CHECK_VALUE(x.dim() == 2, name, " has shape ", x.sizes(), ", needs two dimensions");
  TORCH_CHECK_VALUE((x.size(1) <= 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1)), name,
                    " has strides ", x.strides(), ", needs rows one after the other");
}

void check_head(const std::string& prefix, const HeadArgs& args) {
  const std::string hidden_name = prefix + "hidden", weight_name = prefix + "weight";
  const at::Tensor &hidden = args.hidden, &weight = args.weight;
  check_rows(hidden_name, hidden);
  check_rows(weight_name, weight);
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(0) < INT32_MAX - 64 && weight.size(1) > 0 &&
                        weight.size(1) < (1 << 20) && hidden.size(1) == weight.size(1),
                    hidden_name, " has shape ", hidden.sizes(), " and ", weight_name, " ", weight.sizes(),
                    ", needs [N, H] and [V, H] with 0 < V < 2^31 - 65 and 0 < H < 2^20");
  if (args.bias) check_tokens("bias", *args.bias, at::kFloat, weight.size(0));
  if (!args.rows) return;
  check_dense("rows", *args.rows, at::kLong);
  TORCH_CHECK_VALUE(args.rows->dim() == 1, "rows has shape ", args.rows->sizes(), ", needs [n]");
  const int64_t* row = args.rows->const_data_ptr<int64_t>();
  const bool inside =
      std::all_of(row, row + args.rows->size(0), [&](int64_t r) { return r >= 0 && r < hidden.size(0); });
  TORCH_CHECK_VALUE(inside, "rows holds an index outside hidden ", hidden.sizes());
}

}  // namespace

std::vector<Head> checked_heads(const HeadArgs& args) {
  check_head("", args);
  return {Head(args)};
}

std::vector<Head> checked_heads(const PairArgs& args) {
  const auto& [student, teacher] = args;
  check_head("", student);
  check_head("teacher_", teacher);
  TORCH_CHECK_VALUE(
      student.hidden.size(0) == teacher.hidden.size(0) && student.weight.size(0) == teacher.weight.size(0),
      "teacher has N = ", teacher.hidden.size(0), ", V = ", teacher.weight.size(0),
      ", needs N = ", student.hidden.size(0), ", V = ", student.weight.size(0), " as the student");
  return {Head(student), Head(teacher)};
}

}  // namespace sgcd
