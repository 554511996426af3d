#include "cached_tiles.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "grad_plan.h"
#include "grads.h"
#include "memory.h"

namespace sgcd {
namespace {

int64_t whole_tiles(int64_t tokens) { return std::max<int64_t>(tokens, 0) / kTile * kTile; }
at::ScalarType cached_type(Math math) { return math == Math::kBf16 ? at::kBFloat16 : at::kFloat; }

struct CachePlan {
  int64_t in_grad = 0, beyond = 0;  // tokens in the weight's gradient, and beside it
};

// `grad_row_bytes` are those of a row of the weight's gradient, or 0 where it is not to be used.
CachePlan plan_cache(const Head& head, int64_t grad_row_bytes) {
  const bool exponentials = head.math() == Math::kBf16;
  const int64_t padded = round_up(head.tokens(), kTile), blocks = ceil_div(head.vocab(), kTile);
  const int64_t size = element_size(head.math());
  const int64_t maxima_bytes = exponentials ? 4 * blocks : 0, token_bytes = blocks * kTile * size + maxima_bytes;
  int64_t in_grad = grad_row_bytes % size ? 0 : std::min(padded, whole_tiles(grad_row_bytes / size));
  if (exponentials) in_grad = std::min(in_grad, whole_tiles(kCachedBytes / 2 / maxima_bytes));
  int64_t beyond = padded - in_grad;
  const int64_t room = kCachedBytes - in_grad * maxima_bytes;
  // If not all tokens fit, the gradient sweep needs memory for dZ of the others.
  if (beyond * token_bytes > room) beyond = whole_tiles((room - kDzBytes) / token_bytes);
  const bool all = in_grad + beyond == padded;
  if (beyond < padded / 8 && !all) beyond = 0;   // not worth its memory
  if (in_grad + beyond < padded / 8) return {};  // nor that of the maxima
  return {in_grad, beyond};
}

}  // namespace

CachedTiles::CachedTiles(const Head& head, const HeadArgs& args, bool weight_grad) {
  const bool exponentials = head.math() == Math::kBf16;
  // The backward of a softcap needs the logits.
  if (head.tokens() == 0 || (exponentials && static_cast<float>(args.softcap) != 0)) return;
  const at::ScalarType type = grad_type(args.weight);
  const CachePlan plan = plan_cache(head, weight_grad ? head.width() * at::elementSize(type) : 0);
  const int64_t tokens = plan.in_grad + plan.beyond, blocks = ceil_div(head.vocab(), kTile);
  if (tokens == 0) return;
  const auto options = args.weight.options(), tiles = options.dtype(cached_type(head.math()));
  const auto floats = options.dtype(at::kFloat);
  tensors_ = {weight_grad ? allocate(args.weight.sizes(), options.dtype(type)) : at::empty({0}, options),
              allocate({blocks, kTile, plan.beyond}, tiles),
              at::empty({head.vocab() % kTile ? kTile : 0, tokens}, tiles),
              allocate({exponentials ? blocks : 0, tokens}, floats), at::empty({head.tokens()}, floats)};
  set_layout(plan.in_grad);
}

CachedTiles::CachedTiles(const Head& head, const at::Tensor& weight, std::vector<at::Tensor> tensors)
    : tensors_(std::move(tensors)) {
  if (tensors_.empty()) return;
  TORCH_CHECK_VALUE(tensors_.size() == 5, "cached holds ", tensors_.size(), " tensors, needs 5 or none");
  const bool exponentials = head.math() == Math::kBf16, in_weight_grad = tensors_[0].numel() > 0;
  const int64_t padded = round_up(head.tokens(), kTile), blocks = ceil_div(head.vocab(), kTile);
  const at::ScalarType type = cached_type(head.math());
  if (in_weight_grad) check_dense("cached[0]", tensors_[0], grad_type(weight));
  check_dense("cached[1]", tensors_[1], type);
  check_dense("cached[2]", tensors_[2], type);
  check_dense("cached[3]", tensors_[3], at::kFloat);
  check_tokens("cached[4]", tensors_[4], at::kFloat, head.tokens());
  const int64_t beyond = tensors_[1].dim() == 3 ? tensors_[1].size(2) : -1;
  const int64_t tokens = tensors_[2].dim() == 2 ? tensors_[2].size(1) : -1;
  const auto fits = [](const at::Tensor& x, at::IntArrayRef sizes) { return x.sizes() == sizes; };
  const int64_t row_bytes = in_weight_grad ? head.width() * tensors_[0].element_size() : 0;
  const int64_t size = element_size(head.math()), most = row_bytes % size ? 0 : row_bytes / size;
  TORCH_CHECK_VALUE((!in_weight_grad || tensors_[0].sizes() == weight.sizes()) &&
                        fits(tensors_[1], {blocks, kTile, beyond}) &&
                        fits(tensors_[2], {head.vocab() % kTile ? kTile : 0, tokens}) &&
                        fits(tensors_[3], {exponentials ? blocks : 0, tokens}) && beyond >= 0 && beyond % kTile == 0 &&
                        tokens >= beyond && tokens % kTile == 0 && tokens <= padded && tokens - beyond <= most,
                    "cached has shapes that do not fit hidden and weight");
  set_layout(tokens - beyond);
}

void CachedTiles::set_layout(int64_t in_grad) {
  in_grad_ = in_grad;
  beyond_ = tensors_[1].size(2);
  size_ = tensors_[1].element_size();
  const int64_t blocks = tensors_[1].size(0);
  whole_blocks_ = tensors_[2].size(0) ? blocks - 1 : blocks;
  if (in_grad_) grad_ld_ = tensors_[0].size(1) * tensors_[0].element_size() / size_;
}

TileRows CachedTiles::rows(int64_t block, int64_t token) const {
  if (block >= whole_blocks_) return {bytes_of(tensors_[2]) + token * size_, tokens(), tokens() - token};
  if (token < in_grad_)
    return {bytes_of(tensors_[0]) + (block * kTile * grad_ld_ + token) * size_, grad_ld_, in_grad_ - token};
  const int64_t local = token - in_grad_;
  return {bytes_of(tensors_[1]) + (block * kTile * beyond_ + local) * size_, beyond_, beyond_ - local};
}

void CachedTiles::load(int64_t block, int64_t token, int count, float* z) const {
  const TileRows from = rows(block, token);
  for (int v = 0; v < count; v++, z += kTile) std::memcpy(z, from.data + v * from.ld * size_, kTile * sizeof(float));
}

void CachedTiles::store(int64_t block, int64_t token, int count, const float* z) const {
  const TileRows to = rows(block, token);
  for (int v = 0; v < count; v++, z += kTile) std::memcpy(to.data + v * to.ld * size_, z, kTile * sizeof(float));
}

}  // namespace sgcd
