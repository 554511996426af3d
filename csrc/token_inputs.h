// What each token brings to a call beside its hidden state, padded to whole tiles.
#pragma once

#include <vector>

#include "head.h"
#include "tile_kernels.h"

namespace sgcd {

struct TokenInputs {
  std::vector<int32_t> target;     // a vocab id of this shard, or -1; empty where the call has no targets
  std::vector<float> temperature;  // empty where it is 1
  float softcap = 0;

  // Of `tokens` tokens, with the temperature and softcap of `args`.
  TokenInputs(int64_t tokens, const OptionalTensor& targets, const HeadArgs& args);

  // The logit transform of the tile whose first vocab id and token are these.
  LogitTransform transform(const Head& head, int64_t token, int64_t vocab_id) const;
};

}  // namespace sgcd
