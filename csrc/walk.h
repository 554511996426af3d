// The forward walk: every tile of logits is made in cache, folded into running statistics, and forgotten.
#pragma once

#include <vector>

#include "head.h"

namespace sgcd {

// Per-token shared inputs of a call, padded to whole tiles.
struct TokenInputs {
  std::vector<int32_t> target;     // word of this shard, or -1; empty where there is none
  std::vector<float> temperature;  // empty where it is 1
  float softcap = 0;

  TokenInputs(int64_t tokens, const std::optional<at::Tensor>& targets, const std::optional<at::Tensor>& temperature,
              double softcap);
  Finish finish(const Head& head, int64_t token, int64_t word) const;
};

// What is summed over the tiles: `fields` floats a token, kept as arrays [fields][stride].
struct Fold {
  virtual ~Fold() = default;
  virtual int fields() const = 0;
  virtual void start(float* state, int64_t stride, int64_t tokens) const = 0;
  // One tile of one or two heads' final logits; state is at its first token, `word` and `token` say which of the call it begins at.
  virtual void tile(float* const* z, int words, float* state, int64_t stride, int64_t word, int64_t token) const = 0;
  virtual void merge(float* into, const float* from, int64_t stride, int64_t tokens) const = 0;
};

// Logits of targets [n], where they lie in this shard.
using TargetLogits = std::vector<float*>;

// out [fields, n] gets the folded statistics. The vocabulary is cut by its own size and the number of tokens alone,
// never by the number of threads, and partial statistics are merged in the order of the words.
void walk(const std::vector<Head>& heads, const TokenInputs& inputs, const Fold& fold, const TargetLogits& targets,
          float* out);

}  // namespace sgcd
