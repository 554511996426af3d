// The gradient sweep, for any formula of a tile's gradient.
//
// One vocab chunk at a time, in two steps, in neither of which two threads write to the same place:
//   by tiles of tokens    dZ [chunk, tokens], and dX^T += W^T dZ
//   by blocks of vocab    dW = dZ X, over all tokens at once: summed in fp32 and rounded once
// Every sum has one owner and one order, so results have the same bits whatever the number of threads.
#pragma once

#include <vector>

#include "cached_tiles.h"
#include "grads.h"
#include "token_inputs.h"

namespace sgcd {

struct GradFormula {
  virtual ~GradFormula() = default;
  // Replace the final logits z[0] of a tile by their gradient; `vocab_id` and `token` are the first of the tile.
  virtual void logits_to_grad(float* const* z, int count, int64_t vocab_id, int64_t token) const = 0;
  // The same from cached e^(z - m): dz gets the gradient.
  virtual void cached_to_grad(const CachedTiles& cached, float* dz, int count, int64_t vocab_id, int64_t token) const;
};

// `heads[0]`, of `args`, is differentiated; `heads[1]` (if any) is only read.
Grads grad_sweep(const std::vector<Head>& heads, const HeadArgs& args, const TokenInputs& inputs,
                 const GradFormula& formula, GradNeeds needs, const CachedTiles& cached);

}  // namespace sgcd
