// Tiles that the forward sweep of a loss caches for its gradient, so that their logits are computed only once.
//
// A loss that computes its gradients with its value then needs three products instead of four, for as many tokens as
// fit. The first tokens' tiles lie in the memory of the weight's gradient, which is not written yet: row v holds their
// values at vocab id v. A buffer of kCachedBytes holds more. If less than an eighth of all tokens would fit, nothing is
// cached. fp32 products cache final logits, so results have the same bits as without a cache; bf16 products cache
// e^(z - m) rounded to bf16, where m is the token's running maximum at that tile.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "args.h"
#include "head.h"

namespace sgcd {

constexpr int64_t kCachedBytes = 48 << 20;

// Place of the kTile rows of a tile, `ld` elements apart; `tokens` is the number of contiguous tokens from there on.
struct TileRows {
  char* data = nullptr;
  int64_t ld = 0, tokens = 0;
};

class CachedTiles {
 public:
  CachedTiles() = default;  // nothing is cached
  // Room for as many of the head's tokens as fit. With `weight_grad`, the memory of that gradient is used.
  CachedTiles(const Head& head, const HeadArgs& args, bool weight_grad);
  // What `tensors` gave for the same head; checked.
  CachedTiles(const Head& head, const at::Tensor& weight, std::vector<at::Tensor> tensors);

  // [V, H] the weight's gradient; [blocks, kTile, n] tokens beyond those in it; [kTile, n] the last block where V is no
  // whole number of blocks; [blocks, n] maxima; [tokens] logits of targets.
  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  const at::Tensor& weight_grad() const { return tensors_[0]; }
  float* target_logits() const { return tensors_[4].mutable_data_ptr<float>(); }

  bool holds_exponentials() const { return tensors_[3].size(0) > 0; }  // else logits
  int64_t tokens() const { return in_grad_ + beyond_; }                // the first so many are cached, whole tiles

  TileRows rows(int64_t block, int64_t token) const;
  // Copy fp32 logits [count, kTile] from or to where they are cached.
  void load(int64_t block, int64_t token, int count, float* z) const;
  void store(int64_t block, int64_t token, int count, const float* z) const;
  float* maxima(int64_t block, int64_t token) const {
    return tensors_[3].mutable_data_ptr<float>() + block * tokens() + token;
  }

 private:
  void set_layout(int64_t in_grad);

  std::vector<at::Tensor> tensors_;
  int64_t in_grad_ = 0, beyond_ = 0;  // tokens in the weight's gradient, and beside it
  int64_t size_ = 0;                  // bytes of an element
  int64_t whole_blocks_ = 0;          // of kTile vocab ids
  int64_t grad_ld_ = 0;               // elements between rows of the weight's gradient
};

}  // namespace sgcd
