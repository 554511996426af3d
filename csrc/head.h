// One LM head as the products read it: hidden states packed by tiles of tokens, the weight by rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "args.h"
#include "gemm.h"
#include "sizes.h"

namespace sgcd {

struct WeightRows {
  const void* data = nullptr;  // [count, ld] of the head's math
  int64_t ld = 0;

  const void* at(int64_t row, Math math) const {
    return static_cast<const char*>(data) + row * ld * element_size(math);
  }
};

class Head {
 public:
  // Reads the tensors of `args`, which must outlive it and fit (check.h).
  explicit Head(const HeadArgs& args);

  Math math() const { return math_; }
  int64_t tokens() const { return tokens_; }
  int64_t vocab() const { return vocab_; }
  int64_t width() const { return width_; }  // H
  int64_t depth() const { return depth_; }  // H padded to what a product needs
  const float* bias() const { return bias_; }
  bool same_weight(const Head& other) const;

  // Columns of the tile at `token` that a product must compute: those of tokens, up to a multiple of 32. Others are 0.
  int64_t live_columns(int64_t token) const { return std::min<int64_t>(kTile, round_up(tokens_ - token, 32)); }

  int64_t packed_tile_bytes() const { return depth_ * kTile * element_size(math_); }
  int64_t weight_rows_bytes(int64_t count) const { return count * scratch_ld() * element_size(math_); }

  // Products [count, kTile] of weight rows, from `skip` on, and the tile of tokens at `token`; not yet transformed.
  void multiply_tile(const WeightRows& rows, int64_t skip, int64_t count, int64_t token, const void* packed,
                     float* z) const;

  // hidden^T of the tile at `token`, [depth, kTile] (in pairs for bf16); tokens beyond the end are 0.
  void pack_token_tile(int64_t token, void* out) const;
  // Hidden of the same tile for a product over tokens: [ceil(H / kTile)][kTile tokens][kTile] (in pairs for bf16),
  // blocks of columns `block_stride` elements apart.
  void pack_token_rows(int64_t token, void* out, int64_t block_stride) const;
  // Rows of the weight, in place if the product can read them there, else copied to `scratch`. Our own product needs a
  // copy: it reads few columns of many rows at a time, and row strides of a power of two map to few cache sets.
  WeightRows weight_rows(int64_t first, int64_t count, void* scratch) const;
  // bf16 rows interleaved by pairs, [ceil(count / 2)][ld][2]; an odd last one with 0.
  void interleave_weight_rows(int64_t first, int64_t count, void* out, int64_t ld) const;
  // weight^T of these rows, [H, ld], columns from `count` to `padded` 0.
  void transpose_weight_rows(int64_t first, int64_t count, int64_t padded, void* out, int64_t ld) const;

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
