#include "token_inputs.h"

#include <algorithm>

namespace sgcd {

TokenInputs::TokenInputs(int64_t tokens, const OptionalTensor& targets, const HeadArgs& args)
    : softcap(static_cast<float>(args.softcap)) {
  const int64_t padded = round_up(tokens, kTile);
  if (targets) {
    target.assign(padded, -1);
    const int64_t* from = targets->const_data_ptr<int64_t>();
    // Whatever is no vocab id of this shard, however large, is -1 and never found.
    for (int64_t i = 0; i < tokens; i++) {
      if (from[i] >= 0 && from[i] < INT32_MAX) target[i] = static_cast<int32_t>(from[i]);
    }
  }
  if (args.temperature) {
    temperature.assign(padded, 1.0f);
    std::copy_n(args.temperature->const_data_ptr<float>(), tokens, temperature.begin());
  }
}

LogitTransform TokenInputs::transform(const Head& head, int64_t token, int64_t vocab_id) const {
  return {.bias = head.bias() ? head.bias() + vocab_id : nullptr,
          .softcap = softcap,
          .temperature = temperature.empty() ? nullptr : &temperature[token]};
}

}  // namespace sgcd
