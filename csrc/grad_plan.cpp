#include "grad_plan.h"

#include <algorithm>

namespace sgcd {
namespace {

constexpr int64_t kPackedBytes = 24 << 20;  // hidden states, packed for both products
constexpr int64_t kMinPackedBytes = 4 << 20;
constexpr int64_t kSumsBytes = 40 << 20;    // packed hidden states, and fp32 sums of their gradient beyond its own size
constexpr int64_t kWeightTBytes = 3 << 20;  // W^T of a chunk; large chunks need few barriers
constexpr int64_t kStepBytes = 256 << 10;   // weight rows, and as much of W^T, that stay in L2 for all tokens
constexpr int64_t kMaxSplits = 8;           // of a chunk, where tiles of tokens are few
constexpr int64_t kSplitTiles = 64;         // as many tasks as this, tiles times splits, are enough
constexpr int64_t kSplitSumsBytes = 8 << 20;  // dX of all splits

// Small groups of tokens repeat the packing, large ones need memory.
int64_t plan_group(const GradSizes& s, int64_t padded_tokens, int64_t padded_width) {
  const int64_t rows_bytes = s.needs_weight ? padded_width * kTile * s.element_size : 0;
  const int64_t sums = s.needs_hidden ? s.width * (4 * padded_tokens - s.hidden_grad_size * s.tokens) : 0;
  const int64_t budget = std::clamp(kSumsBytes - sums, kMinPackedBytes, kPackedBytes);
  const int64_t tiles = budget / (s.packed_tile_bytes + rows_bytes);
  return std::min(padded_tokens, std::max<int64_t>(1, tiles) * kTile);
}

int64_t plan_chunk(const GradSizes& s, int64_t group, int64_t uncached_tokens, bool copies_weight_t) {
  int64_t chunk = kDzBytes / (s.element_size * std::max<int64_t>(uncached_tokens, 1));
  if (copies_weight_t) chunk = std::min(chunk, kWeightTBytes / (s.element_size * s.width));
  if (s.needs_bias) chunk = std::min(chunk, kDzBytes / (4 * group / kTile));
  chunk = std::max<int64_t>(1, chunk / kTile) * kTile;
  return std::min(chunk, round_up(s.vocab, kTile));
}

int64_t plan_splits(const GradSizes& s, int64_t padded_tokens) {
  int64_t splits = std::clamp<int64_t>(kSplitTiles / (padded_tokens / kTile), 1, kMaxSplits);
  if (s.needs_hidden) splits = std::clamp<int64_t>(kSplitSumsBytes / (padded_tokens * s.width * 4), 1, splits);
  return splits;
}

}  // namespace

GradPlan plan_grad(const GradSizes& s) {
  const int64_t padded_tokens = round_up(s.tokens, kTile), padded_width = round_up(s.width, kTile);
  const int64_t group = plan_group(s, padded_tokens, padded_width);
  // Tokens whose dZ has no cached tile to lie in; with several groups, room for a whole one is needed.
  const int64_t uncached_tokens = group == padded_tokens ? padded_tokens - s.cached_tokens : group;
  const bool copies_weight_t = s.needs_hidden && s.weight_t != WeightT::kInPlace;
  const int64_t chunk = plan_chunk(s, group, uncached_tokens, copies_weight_t);
  const int64_t step = std::clamp<int64_t>(kStepBytes / (s.depth * s.element_size) / kTile, 2, 8) * kTile;
  int64_t weight_t_bytes = 0;
  if (copies_weight_t) {
    weight_t_bytes =
        s.element_size * (s.weight_t == WeightT::kInterleaved ? chunk * (s.width + kRowPad / 2)
                                                              : ceil_div(chunk, step) * s.width * (step + kRowPad));
  }
  return {
      .padded_tokens = padded_tokens,
      .padded_width = padded_width,
      .group = group,
      .chunk = chunk,
      .step = step,
      .vocab_splits = plan_splits(s, padded_tokens),
      .weight_t_bytes = weight_t_bytes,
      .dz_bytes = s.needs_weight ? ceil_div(uncached_tokens, kDzTokens) * chunk * kDzLd * s.element_size : 0,
  };
}

}  // namespace sgcd
