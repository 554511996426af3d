#include "grad_workspace.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace sgcd {

GradWorkspace::GradWorkspace(const std::vector<Head>& heads, const GradPlan& plan, GradNeeds needs)
    : plan_(plan), width_(heads[0].width()), size_(element_size(heads[0].math())) {
  const int64_t tiles = plan.group / kTile;
  packed_.reserve(heads.size());
  packed_tile_bytes_.reserve(heads.size());
  for (const Head& head : heads) {
    packed_tile_bytes_.push_back(head.packed_tile_bytes());
    packed_.push_back(allocate_bytes(head.packed_tile_bytes() * tiles));
  }
  if (plan.weight_t_bytes > 0) weight_t_ = allocate_bytes(plan.weight_t_bytes);
  if (needs.hidden)
    hidden_grad_ = at::zeros({plan.vocab_splits, plan.padded_tokens / kTile, width_, kTile}, at::kFloat);
  if (needs.weight) {
    dz_ = allocate_bytes(plan.dz_bytes);
    token_rows_ = allocate_bytes(plan.padded_width * plan.group * size_);
    if (!plan.one_group()) weight_grad_ = allocate({plan.chunk, plan.padded_width}, at::kFloat);
  }
  if (needs.bias) bias_grad_parts_ = at::empty({tiles, plan.chunk}, at::kFloat);
}

void GradWorkspace::release_buffers() {
  packed_.clear();
  for (at::Tensor* buffer : {&weight_t_, &dz_, &token_rows_, &weight_grad_, &bias_grad_parts_}) buffer->reset();
}

}  // namespace sgcd
