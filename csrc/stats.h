// The raw statistics of one head, of two, and those that need both normalisers first.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "args.h"
#include "tile_kernels.h"

namespace sgcd {

// Statistics in arrays one after the other, `stride` apart.
inline HeadStats head_stats_at(float* state, int64_t stride) { return {state, state + stride, state + 2 * stride}; }
inline void clear(const HeadStats& stats, int64_t tokens) {
  std::fill_n(stats.m, tokens, kLowest);
  std::fill_n(stats.rest, tokens, -1.0f);
  std::fill_n(stats.s, tokens, 0.0f);
}
inline PairStats pair_stats_at(float* state, int64_t stride) {
  float* more = state + 6 * stride;
  return {head_stats_at(state, stride), head_stats_at(state + 3 * stride, stride), more, more + stride,
          more + 2 * stride};
}

// [4, n]: m, rest = l - 1, s, target logit
at::Tensor head_stats(const HeadArgs& args, const at::Tensor& targets);

// Also the `cached` argument of logprob_grads, see cached_tiles.h; `weight_grad`: that gradient will be requested.
std::tuple<at::Tensor, std::vector<at::Tensor>> head_stats_cached(const HeadArgs& args, const at::Tensor& targets,
                                                                  bool weight_grad);

// [11, n]: those of the student, those of the teacher, a_p, a_q, overlap
at::Tensor pair_stats(const PairArgs& args, const at::Tensor& targets);

struct MixtureArgs {
  at::Tensor normalisers;  // [4, n]: m and ln l of the student, then of the teacher
  double beta;             // the mixture is beta q + (1 - beta) p
  bool jsd, tv;            // which are wanted
};

// [3, n]: jsd, tv and sum p ln(p / mixture)
at::Tensor mixture_stats(const PairArgs& args, const MixtureArgs& mixture);

}  // namespace sgcd
