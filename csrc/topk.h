// Both heads in one pass, for the KL over {the teacher's K likeliest words, the observed token, all others as one}.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace sgcd {

// statistics [15, n]: those of pair_stats; then, of the words that are neither among the K nor observed, m and z of the
// student and of the teacher
// logits [2, n, K]: the student's and the teacher's of the teacher's K likeliest words, in no particular order
// words [n, K] int64: which they are; of words that tie for the K-th place the first ones
std::tuple<at::Tensor, at::Tensor, at::Tensor> pair_topk(
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight, const std::optional<at::Tensor>& teacher_bias,
    const std::optional<at::Tensor>& rows, const at::Tensor& targets, const std::optional<at::Tensor>& temperature,
    double softcap, int64_t k);

}  // namespace sgcd
