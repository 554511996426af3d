// Tiles that the forward walk of a loss leaves for its gradient, so that their logits are made once.
//
// A loss that computes its gradients with its value needs three products instead of four wherever there is room. The
// rows of the weight's gradient are room: row w, not written yet, holds what word w is to the first tokens, as many as
// fit. So much again as `kKeptBytes` says holds further tokens; less than an eighth of all tokens is not kept. fp32
// products keep final logits, and so the same bits; bf16 products keep e^(z - m) rounded to bf16, m being the token's
// running maximum when the tile was folded.
#pragma once

#include <vector>

#include "head.h"

namespace sgcd {

constexpr int64_t kKeptBytes = 48 << 20;
constexpr int64_t kSlabBytes = 8 << 20;  // of it the gradient walk needs for tokens that are not kept

class Kept {
 public:
  Kept() = default;  // nothing is kept
  // Room for as many of the head's tokens as fit; `softcap` as in Finish.
  Kept(const Head& head, const at::Tensor& weight, bool weight_grad, float softcap);
  // What `tensors` gave for the same head; checked.
  Kept(const Head& head, const at::Tensor& weight, std::vector<at::Tensor> tensors);

  // [V, H] the weight's gradient; [blocks, kTile, n] tokens beyond those; [kTile, n] the last block where V is no whole
  // number of blocks; [blocks, n] maxima; [tokens] logits of targets.
  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  const at::Tensor& weight_grad() const { return tensors_[0]; }
  float* target_logits() const { return tensors_[4].mutable_data_ptr<float>(); }

  bool half() const { return tensors_[3].size(0) > 0; }
  int64_t tokens() const { return in_grad_ + beyond_; }  // the first so many, whole tiles

  struct Rows {
    char* data;       // [kTile words] at a token
    int64_t ld;       // elements
    int64_t tokens;   // that lie one after the other from there
  };
  Rows rows(int64_t block, int64_t token) const;
  // Copy fp32 logits [words, kTile] from or to where they are kept.
  void load(int64_t block, int64_t token, int words, float* z) const;
  void store(int64_t block, int64_t token, int words, const float* z) const;
  float* maxima(int64_t block, int64_t token) const {
    return tensors_[3].mutable_data_ptr<float>() + block * tokens() + token;
  }

 private:
  void look();

  std::vector<at::Tensor> tensors_;
  int64_t size_ = 0, in_grad_ = 0, beyond_ = 0, whole_blocks_ = 0, grad_ld_ = 0;
};

}  // namespace sgcd
