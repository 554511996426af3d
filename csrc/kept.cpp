#include "kept.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "grad_walk.h"
#include "memory.h"

namespace sgcd {
namespace {

int64_t whole_tiles(int64_t tokens) { return std::max<int64_t>(tokens, 0) / kTile * kTile; }
at::ScalarType kept_type(Math math) { return math == Math::kBf16 ? at::kBFloat16 : at::kFloat; }

}  // namespace

Kept::Kept(const Head& head, const at::Tensor& weight, bool weight_grad, float softcap) {
  const bool half = head.math() == Math::kBf16;
  if (head.tokens() == 0 || (half && softcap != 0)) return;
  const int64_t padded = round_up(head.tokens(), kTile), blocks = (head.vocab() + kTile - 1) / kTile;
  const int64_t size = element_size(head.math()), of_maxima = half ? 4 * blocks : 0;  // bytes a token
  const int64_t row = weight_grad ? head.width() * at::elementSize(grad_type(weight)) : 0;
  int64_t in_grad = row % size ? 0 : std::min(padded, whole_tiles(row / size));
  if (half) in_grad = std::min(in_grad, whole_tiles(kKeptBytes / 2 / of_maxima));
  int64_t beyond = padded - in_grad;
  const int64_t a_token = blocks * kTile * size + of_maxima, room = kKeptBytes - in_grad * of_maxima;
  if (beyond * a_token > room) beyond = whole_tiles((room - kSlabBytes) / a_token);
  if (beyond < padded / 8 && in_grad + beyond < padded) beyond = 0;  // not worth its memory
  if (in_grad + beyond < padded / 8) return;  // nor that of the maxima
  const at::Tensor grad = weight_grad ? fresh(weight.sizes(), weight.options().dtype(grad_type(weight)))
                                      : at::empty({0}, weight.options());
  const auto like = weight.options().dtype(kept_type(head.math()));
  const int64_t tokens = in_grad + beyond;
  tensors_ = {grad,
              fresh({blocks, kTile, beyond}, like),
              at::empty({head.vocab() % kTile ? kTile : 0, tokens}, like),
              fresh({half ? blocks : 0, tokens}, like.dtype(at::kFloat)),
              at::empty({head.tokens()}, like.dtype(at::kFloat))};
  in_grad_ = in_grad;
  look();
}

Kept::Kept(const Head& head, const at::Tensor& weight, std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {
  if (tensors_.empty()) return;
  TORCH_CHECK_VALUE(tensors_.size() == 5, "kept holds ", tensors_.size(), " tensors, needs 5 or none");
  const bool half = head.math() == Math::kBf16, graded = tensors_[0].numel() > 0;
  const int64_t padded = round_up(head.tokens(), kTile), blocks = (head.vocab() + kTile - 1) / kTile;
  const at::ScalarType type = kept_type(head.math());
  if (graded) check_dense("kept[0]", tensors_[0], grad_type(weight));
  check_dense("kept[1]", tensors_[1], type);
  check_dense("kept[2]", tensors_[2], type);
  check_dense("kept[3]", tensors_[3], at::kFloat);
  check_tokens("kept[4]", tensors_[4], at::kFloat, head.tokens());
  const int64_t beyond = tensors_[1].dim() == 3 ? tensors_[1].size(2) : -1;
  const int64_t tokens = tensors_[2].dim() == 2 ? tensors_[2].size(1) : -1;
  const auto fits = [](const at::Tensor& x, at::IntArrayRef sizes) { return x.sizes() == sizes; };
  const int64_t row = graded ? head.width() * tensors_[0].element_size() : 0, size = element_size(head.math());
  const int64_t most = row % size ? 0 : row / size;
  TORCH_CHECK_VALUE((!graded || tensors_[0].sizes() == weight.sizes()) && fits(tensors_[1], {blocks, kTile, beyond}) &&
                        fits(tensors_[2], {head.vocab() % kTile ? kTile : 0, tokens}) &&
                        fits(tensors_[3], {half ? blocks : 0, tokens}) && beyond >= 0 && beyond % kTile == 0 &&
                        tokens >= beyond && tokens % kTile == 0 && tokens <= padded && tokens - beyond <= most,
                    "kept has shapes that are not of hidden and weight");
  in_grad_ = tokens - beyond;
  look();
}

void Kept::look() {
  size_ = tensors_[1].element_size();
  beyond_ = tensors_[1].size(2);
  const int64_t blocks = tensors_[1].size(0);
  whole_blocks_ = tensors_[2].size(0) ? blocks - 1 : blocks;
  if (in_grad_) grad_ld_ = tensors_[0].size(1) * tensors_[0].element_size() / size_;
}

Kept::Rows Kept::rows(int64_t block, int64_t token) const {
  const auto at = [](const at::Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); };
  if (block >= whole_blocks_) return {at(tensors_[2]) + token * size_, tokens(), tokens() - token};
  if (token < in_grad_)
    return {at(tensors_[0]) + (block * kTile * grad_ld_ + token) * size_, grad_ld_, in_grad_ - token};
  const int64_t local = token - in_grad_;
  return {at(tensors_[1]) + (block * kTile * beyond_ + local) * size_, beyond_, beyond_ - local};
}

void Kept::load(int64_t block, int64_t token, int words, float* z) const {
  const Rows from = rows(block, token);
  for (int w = 0; w < words; w++, z += kTile)
    std::memcpy(z, from.data + w * from.ld * size_, kTile * sizeof(float));
}

void Kept::store(int64_t block, int64_t token, int words, const float* z) const {
  const Rows to = rows(block, token);
  for (int w = 0; w < words; w++, z += kTile)
    std::memcpy(to.data + w * to.ld * size_, z, kTile * sizeof(float));
}

}  // namespace sgcd
