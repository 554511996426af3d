// The forward sweep: each tile of logits is computed in cache and reduced into running statistics before the next.
#pragma once

#include <vector>

#include "head.h"
#include "token_inputs.h"

namespace sgcd {

// The reduction of the tiles: `fields` floats per token, in arrays [fields][stride].
struct Reduction {
  virtual ~Reduction() = default;
  virtual int fields() const = 0;
  virtual void init(float* state, int64_t stride, int64_t tokens) const = 0;
  // One tile of one or two heads' final logits. `state` points at the tile's first token; `vocab_id` and `token` are
  // the first of the tile in the call.
  virtual void update(float* const* z, int count, float* state, int64_t stride, int64_t vocab_id,
                      int64_t token) const = 0;
  virtual void merge(float* into, const float* from, int64_t stride, int64_t tokens) const = 0;
};

// Output for each head's logits of the targets, [n] per head; only written for targets in this shard.
using TargetLogits = std::vector<float*>;

// out [fields, n] gets the statistics. The vocab splits depend only on V and the number of tokens, not on the number of
// threads, and their statistics are merged in the order of vocab ids.
void forward_sweep(const std::vector<Head>& heads, const TokenInputs& inputs, const Reduction& reduction,
                   const TargetLogits& targets, float* out);

}  // namespace sgcd
