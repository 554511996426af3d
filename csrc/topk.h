// Both heads in one sweep, for the KL over {the teacher's K likeliest vocab ids, the target, all others as one}.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "args.h"

namespace sgcd {

// statistics [15, n]: those of pair_stats; then, of the tail (the vocab ids that are neither among the K nor the
// target), m and l of the student and of the teacher logits [2, n, K]: the student's and the teacher's at the teacher's
// K likeliest vocab ids, in no particular order vocab ids [n, K] int64: which they are; of those that tie for the K-th
// place the first ones
std::tuple<at::Tensor, at::Tensor, at::Tensor> pair_topk(const PairArgs& args, const at::Tensor& targets, int64_t k);

}  // namespace sgcd
