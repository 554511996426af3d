// An operator for the benchmark alone: setup.py compiles this file only with SGCD_BUILD_BENCH=1.
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "forward_sweep.h"

namespace sgcd {
namespace {

struct NoReduction : Reduction {
  int fields() const override { return 1; }
  void init(float* state, int64_t, int64_t tokens) const override { std::fill_n(state, tokens, 0.0f); }
  void update(float* const* z, int, float* state, int64_t, int64_t, int64_t) const override { state[0] = z[0][0]; }
  void merge(float*, const float*, int64_t, int64_t) const override {}
};

// The forward sweep of one head, or of two with one weight, without reading the tiles: the cost of its products.
void matmul_sweep(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& teacher_hidden) {
  const HeadArgs student{.hidden = hidden, .weight = weight, .bias = {}, .rows = {}, .temperature = {}, .softcap = 0};
  HeadArgs teacher = student;
  if (teacher_hidden) teacher.hidden = *teacher_hidden;
  const std::vector<Head> heads = teacher_hidden ? checked_heads(PairArgs{student, teacher}) : checked_heads(student);
  const int64_t n = heads[0].tokens();
  std::vector<float> ignored(n);
  forward_sweep(heads, TokenInputs(n, std::nullopt, student), NoReduction(), {}, ignored.data());
}

}  // namespace
}  // namespace sgcd

TORCH_LIBRARY_FRAGMENT(sgcd_kernels, m) {
  m.def("matmul_sweep(Tensor hidden, Tensor weight, Tensor? teacher_hidden) -> ()");
  m.impl("matmul_sweep", torch::dispatch(c10::DispatchKey::CPU, sgcd::matmul_sweep));
}
