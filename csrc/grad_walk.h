// The gradient walk, whatever the formula of a tile's gradient.
//
// A slab of words at a time, in two steps that no two threads write into the same place of:
//   by tiles of tokens   dZ [words, tokens] of the slab, and dX^T += W^T dZ
//   by blocks of words   dW = dZ X, over all tokens at once: summed in fp32 and rounded once
// Every sum has one owner and one order, so results have the same bits whatever the number of threads.
#pragma once

#include "grad.h"
#include "kept.h"
#include "walk.h"

namespace sgcd {

struct GradFormula {
  virtual ~GradFormula() = default;
  // Turn the final logits z[0] of a tile into their gradient; `token` is its first.
  virtual void tile(float* const* z, int words, int64_t word, int64_t token) const = 0;
  // The same from what was kept of the tile: z gets the gradient.
  virtual void kept(const Kept& kept, float* z, int words, int64_t word, int64_t token) const;
};

inline at::ScalarType grad_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

// `heads[0]` is differentiated, `heads[1]` (if any) only read. `hidden` and `weight` are those of heads[0].
Grads grad_walk(const std::vector<Head>& heads, const TokenInputs& inputs, const GradFormula& formula,
                const at::Tensor& hidden, const at::Tensor& weight, std::array<bool, 3> needs, bool wide,
                const Kept& kept);

}  // namespace sgcd
