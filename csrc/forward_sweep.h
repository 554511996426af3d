// The forward sweep: each tile of logits is computed in cache and reduced into running statistics before the next.
#pragma once

#include <vector>

#include "head.h"
#include "token_inputs.h"

namespace sgcd {

// What is computed of the tiles: `fields` floats per token, in arrays [fields][stride].
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

// Where each head's logits of targets go, [n] per head; written where a target lies in this shard.
using TargetLogits = std::vector<float*>;

// out [fields, n] gets the statistics. The vocabulary is split by its own size and the number of tokens alone, never by
// the number of threads, and the splits' statistics are merged in the order of vocab ids.
void forward_sweep(const std::vector<Head>& heads, const TokenInputs& inputs, const Reduction& reduction,
                   const TargetLogits& targets, float* out);

}  // namespace sgcd
