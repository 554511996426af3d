// Gradients of a head: logits are made again tile by tile, turned into their gradient in place, and multiplied on.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace sgcd {

using OptionalTensor = std::optional<at::Tensor>;
// Of hidden's rows [n, H] and of weight [V, H] in their dtypes (fp16: fp32), of bias [V] fp32; empty where not wanted.
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Of sum(d_logp logp + d_entropy entropy + d_lse lse), with scale = d_lse - d_logp. `wide` keeps hidden's in
// fp32, to be summed over the ranks of a group. `kept` is nothing, or from head_stats_keep on the same arguments; it is
// used up.
Grads logprob_grads(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& rows, const at::Tensor& targets, const OptionalTensor& temperature,
                    double softcap, const at::Tensor& lse, const at::Tensor& scale, const at::Tensor& d_logp,
                    const OptionalTensor& entropy, const OptionalTensor& d_entropy, std::array<bool, 3> needs,
                    bool wide, std::vector<at::Tensor> kept);

// Of sum(d_loss divergence); kind 0 is KL(p || q), 1 KL(q || p), 2 JSD. `centre` is KL(p || q) or sum p ln(p / m).
Grads distill_grads(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight,
                    const OptionalTensor& teacher_bias, const OptionalTensor& rows, const OptionalTensor& temperature,
                    double softcap, const at::Tensor& lse, const at::Tensor& teacher_lse, const at::Tensor& centre,
                    const at::Tensor& d_loss, double beta, int64_t kind, std::array<bool, 3> needs);

}  // namespace sgcd
