// The tiling plan of a gradient sweep: arithmetic on sizes and memory budgets, without tensors.
#pragma once

#include <stdint.h>

#include "sizes.h"

namespace sgcd {

constexpr int64_t kDzBytes = 8 << 20;  // dZ of a vocab chunk, beside cached tiles
constexpr int64_t kDzTokens = 512;     // tokens of one product into dW
constexpr int64_t kRowPad = 32;        // elements: row strides of a power of two would map to few cache sets
constexpr int64_t kDzLd = kDzTokens + kRowPad;

// How the product dX^T = W^T dZ reads W^T.
enum class WeightT {
  kInPlace,      // from the rows of W that the logits are computed from
  kInterleaved,  // from a copy of W's rows, interleaved by pairs
  kTransposed,   // from a transposed copy
};

struct GradSizes {
  int64_t tokens, vocab;
  int64_t width, depth;       // H, and H padded to what a product needs
  int64_t element_size;       // of what products read, in bytes
  int64_t hidden_grad_size;   // of an element of hidden's gradient
  int64_t packed_tile_bytes;  // of a tile of tokens of all heads
  int64_t cached_tokens;      // the first so many have cached tiles
  WeightT weight_t;
  bool needs_hidden, needs_weight, needs_bias;
};

// A sweep loops over vocab chunks and, for each, over groups of tokens. Within a group, threads take tasks of one of
// `vocab_splits` parts of the chunk and some tiles of tokens, and read `step` vocab ids at a time.
struct GradPlan {
  int64_t padded_tokens;   // whole tiles
  int64_t padded_width;    // H, whole tiles
  int64_t group;           // tokens, whole tiles
  int64_t chunk;           // vocab ids, whole tiles
  int64_t step;            // vocab ids, whole tiles
  int64_t vocab_splits;    // each with a dX of its own
  int64_t weight_t_bytes;  // of the copy of W^T of a chunk; 0 where none is needed
  int64_t dz_bytes;        // of dZ of a chunk, without cached tiles; 0 where the weight's gradient is not needed

  bool one_group() const { return group == padded_tokens; }
};

GradPlan plan_grad(const GradSizes& sizes);

}  // namespace sgcd
