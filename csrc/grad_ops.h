// Gradients of a head: logits are recomputed tile by tile, replaced by their gradient, and multiplied by W and X.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "args.h"
#include "grads.h"

namespace sgcd {

struct LogprobGradArgs {
  at::Tensor targets, lse;
  OptionalTensor lse_low;  // none is 0
  at::Tensor scale;        // d_lse - d_logp
  at::Tensor d_logp;
  OptionalTensor entropy, d_entropy;  // both or neither
};

// Gradients of sum(d_logp logp + d_entropy entropy + d_lse lse). `cached` is empty, or from head_stats_cached on the
// same arguments; it is consumed.
Grads logprob_grads(const HeadArgs& args, const LogprobGradArgs& loss, GradNeeds needs, std::vector<at::Tensor> cached);

struct DistillGradArgs {
  at::Tensor lse, lse_low, teacher_lse, teacher_lse_low;
  at::Tensor expected_log_ratio;  // KL(p || q), or sum p ln(p / mixture) for JSD; not read for KL(q || p)
  at::Tensor d_loss;
  double beta;   // of JSD
  int64_t kind;  // 0 is KL(p || q), 1 KL(q || p), 2 JSD
};

// The student's gradients of sum(d_loss divergence).
Grads distill_grads(const PairArgs& args, const DistillGradArgs& loss, GradNeeds needs);

}  // namespace sgcd
