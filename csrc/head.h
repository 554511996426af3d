// One projection head as tiles: hidden states packed by tiles of tokens, the weight by blocks of words.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "folds.h"
#include "gemm.h"

namespace sgcd {

struct Words {
  const void* data;  // [count, ld] of the head's math
  int64_t ld;

  const void* at(int64_t word, Math math) const {
    return static_cast<const char*>(data) + word * ld * element_size(math);
  }
};

class Head {
 public:
  // hidden [N, H], weight [V, H], rows contiguous in both; bias [V] fp32; rows [n] int64 or none.
  Head(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
       const std::optional<at::Tensor>& rows);

  Math math() const { return math_; }
  int64_t tokens() const { return tokens_; }
  int64_t vocab() const { return vocab_; }
  int64_t width() const { return width_; }   // H
  int64_t depth() const { return depth_; }   // H padded to what a product needs
  const float* bias() const { return bias_; }
  bool same_weight(const Head& other) const;

  // Columns of the tile that starts at `token` that a product has to make: those of tokens, to whole 32; others are 0.
  int64_t columns(int64_t token) const { return std::min<int64_t>(kTile, round_up(tokens_ - token, 32)); }

  int64_t token_tile_bytes() const { return depth_ * kTile * element_size(math_); }
  int64_t words_bytes(int64_t count) const { return count * scratch_ld() * element_size(math_); }

  // Logits of some words and the tile of tokens that starts at `token`, [count, kTile], without what `Finish` adds.
  void multiply_tile(const Words& words, int64_t skip, int64_t count, int64_t token, const void* packed, float* z) const;

  // hidden^T of the tile that starts at `token`, [depth, kTile] (in pairs for bf16); tokens beyond the end are 0.
  void pack_token_tile(int64_t token, void* out) const;
  // Hidden of the same tile for a product over tokens: [ceil(H / kTile)][kTile tokens][kTile] (in pairs for bf16),
  // blocks of columns apart by `block_stride` elements.
  void pack_token_rows(int64_t token, void* out, int64_t block_stride) const;
  // Rows of the weight, in place where they can be multiplied as they are, else copied to `scratch`. Our own product
  // wants a copy: it reads few columns of many rows at a time, and rows a power of two apart share few sets of a cache.
  Words words(int64_t first, int64_t count, void* scratch) const;
  // bf16 rows by pairs, [ceil(count / 2)][ld][2]; an odd last one with 0.
  void pair_words(int64_t first, int64_t count, void* out, int64_t ld) const;
  // weight^T of these words, [H, ld], columns from `count` to `padded` 0.
  void transpose_words(int64_t first, int64_t count, int64_t padded, void* out, int64_t ld) const;

 private:
  int64_t scratch_ld() const { return math_ == Math::kFloat ? depth_ + 16 : depth_; }

  at::ScalarType hidden_type_, weight_type_;
  const char *hidden_, *weight_;
  int64_t hidden_ld_, weight_ld_;
  const float* bias_;
  const int64_t* rows_;
  int64_t tokens_, vocab_, width_, depth_;
  Math math_;
};

}  // namespace sgcd
