// The memory of a gradient sweep, and its layout.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cached_tiles.h"
#include "grad_plan.h"
#include "grads.h"
#include "head.h"
#include "memory.h"

namespace sgcd {

class GradWorkspace {
 public:
  GradWorkspace(const std::vector<Head>& heads, const GradPlan& plan, GradNeeds needs);

  // Release everything but the sums of hidden's gradient.
  void release_buffers();

  // Hidden of a tile of the group, packed for the products with W ...
  char* packed_tile(size_t head, int64_t tile) const {
    return bytes_of(packed_[head]) + tile * packed_tile_bytes_[head];
  }
  // ... and for the product dZ X, [blocks of columns][group][kTile].
  char* token_rows(int64_t tile) const { return bytes_of(token_rows_) + tile * kTile * kTile * size_; }
  char* token_rows(int64_t token, int64_t column) const {
    return bytes_of(token_rows_) + (column * plan_.group + token * kTile) * size_;
  }

  // The copy of W^T at a vocab id of the chunk: interleaved rows, or [steps][H][step], so that the rows of a step lie
  // close together.
  bool copies_weight_t() const { return weight_t_.defined(); }
  char* interleaved_weight(int64_t offset) const { return bytes_of(weight_t_) + offset * interleaved_ld() * size_; }
  char* transposed_weight(int64_t offset) const {
    const int64_t step = offset / plan_.step, within = offset % plan_.step;
    return bytes_of(weight_t_) + (step * width_ * transposed_ld() + within) * size_;
  }
  int64_t interleaved_ld() const { return width_ + kRowPad / 2; }
  int64_t transposed_ld() const { return plan_.step + kRowPad; }

  // dZ, beside cached tiles, at a vocab id of the chunk and one of the tokens: [depths][chunk][kDzTokens], so that rows
  // lie close together.
  TileRows dz(int64_t offset, int64_t token) const {
    const int64_t row = token / kDzTokens * plan_.chunk + offset, column = token % kDzTokens;
    return {bytes_of(dz_) + (row * kDzLd + column) * size_, kDzLd, kDzTokens - column};
  }

  // dX^T of a tile of the call, [H, kTile] fp32, of one vocab split.
  float* hidden_grad(int64_t split, int64_t tile) const {
    return hidden_grad_.mutable_data_ptr<float>() + (split * plan_.padded_tokens / kTile + tile) * width_ * kTile;
  }
  // dW at a vocab id of the chunk, [chunk, padded H] fp32: between groups of tokens, so only where there are several.
  bool has_weight_grad_sums() const { return weight_grad_.defined(); }
  float* weight_grad_sum(int64_t offset) const {
    return weight_grad_.mutable_data_ptr<float>() + offset * plan_.padded_width;
  }
  // d bias at a vocab id of the chunk, summed over one tile of the group.
  float* bias_grad_part(int64_t tile, int64_t offset) const {
    return bias_grad_parts_.mutable_data_ptr<float>() + tile * plan_.chunk + offset;
  }

 private:
  const GradPlan plan_;
  const int64_t width_, size_;
  at::Tensor weight_t_, dz_, token_rows_, hidden_grad_, weight_grad_, bias_grad_parts_;
  std::vector<at::Tensor> packed_;
  std::vector<int64_t> packed_tile_bytes_;
};

}  // namespace sgcd
