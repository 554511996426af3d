// The raw statistics of one head, of two, and what needs both normalisers first.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "folds.h"

namespace sgcd {

// Statistics that lie one field after the other, `stride` apart.
inline HeadStats head_at(float* state, int64_t stride) { return {state, state + stride, state + 2 * stride}; }
inline PairStats pair_at(float* state, int64_t stride) {
  float* more = state + 6 * stride;
  return {head_at(state, stride), head_at(state + 3 * stride, stride), more, more + stride, more + 2 * stride};
}

using OptionalTensor = std::optional<at::Tensor>;

// [4, n]: m, z, s, target logit
at::Tensor head_stats(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& rows, const at::Tensor& targets, const OptionalTensor& temperature,
                      double softcap);

// And what logprob_grads takes as `kept`, see kept.h.
std::tuple<at::Tensor, std::vector<at::Tensor>> head_stats_keep(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& rows,
    const at::Tensor& targets, const OptionalTensor& temperature, double softcap, bool weight_grad);

// The walk of one head, or of two on one weight, without a fold: what the products alone cost.
void bare_walk(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& teacher_hidden);

// [11, n]: those of the student, those of the teacher, a_p, a_q, overlap
at::Tensor pair_stats(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                      const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight,
                      const OptionalTensor& teacher_bias, const OptionalTensor& rows, const at::Tensor& targets,
                      const OptionalTensor& temperature, double softcap);

// [3, n]: jsd, tv and sum p ln(p / m), given normalisers [4, n]: m and ln z of the student, then of the teacher
at::Tensor mixture_stats(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                         const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight,
                         const OptionalTensor& teacher_bias, const OptionalTensor& rows, const at::Tensor& normalisers,
                         const OptionalTensor& temperature, double softcap, double beta, bool jsd, bool tv);

}  // namespace sgcd
