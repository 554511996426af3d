#include "grad_walk.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace sgcd {
namespace {

constexpr int64_t kPackedBytes = 24 << 20;  // hidden states, packed for both products
constexpr int64_t kSlabBytes = 8 << 20;     // dZ of a slab
constexpr int64_t kDepth = 1024;            // tokens of one product into dW

at::Tensor bytes(int64_t count) { return at::empty({count}, at::kByte); }
char* data(const at::Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

class GradWalk {
 public:
  GradWalk(const std::vector<Head>& heads, const TokenInputs& inputs, const GradFormula& formula,
           const at::Tensor& weight, std::array<bool, 3> needs)
      : heads_(heads),
        head_(heads[0]),
        inputs_(inputs),
        formula_(formula),
        folds_(*cpu_isa().folds),
        math_(head_.math()),
        size_(element_size(math_)),
        needs_(needs),
        columns_(round_up(head_.width(), kTile)) {
    const int64_t padded = round_up(head_.tokens(), kTile);
    int64_t per_tile = needs[1] ? columns_ * kTile * size_ : 0;
    for (const Head& head : heads) per_tile += head.token_tile_bytes();
    group_ = std::min(padded, std::max<int64_t>(1, kPackedBytes / per_tile) * kTile);
    const bool one_group = group_ == padded;
    // Packing the tokens again for each slab is paid for by taller slabs.
    slab_ = std::clamp<int64_t>(kSlabBytes / (size_ * group_) / kTile, 1, one_group ? 8 : 32) * kTile;
    slab_ = std::min(slab_, round_up(head_.vocab(), kTile));
    // Rows a multiple of a page apart would all fall into one set of the cache.
    dz_ld_ = group_ + 32;
    wt_ld_ = slab_ + 32;
    dw_ = needs[1] ? at::empty(weight.sizes(), weight.options().dtype(grad_type(weight))) : at::Tensor();
    db_ = needs[2] ? at::zeros({head_.vocab()}, at::kFloat) : at::Tensor();
    dx_ = needs[0] ? at::zeros({padded / kTile, head_.width(), kTile}, at::kFloat) : at::Tensor();
    if (needs[0]) wt_ = bytes(head_.width() * wt_ld_ * size_);
    if (needs[1]) {
      dz_ = bytes(slab_ * dz_ld_ * size_);
      rows_ = bytes(columns_ * group_ * size_);
      if (!one_group) dw_sum_ = at::empty({slab_, columns_}, at::kFloat);
    }
    if (needs[2]) db_part_ = at::empty({group_ / kTile, slab_}, at::kFloat);
    for (const Head& head : heads) packed_.push_back(bytes(head.token_tile_bytes() * group_ / kTile));
  }

  Grads run(at::ScalarType hidden_type) {
    const int64_t padded = round_up(head_.tokens(), kTile);
    for (word_ = 0; word_ < head_.vocab(); word_ += slab_) {
      words_ = std::min(slab_, head_.vocab() - word_);
      if (needs_[0]) transpose_slab();
      for (first_ = 0; first_ < padded; first_ += group_) {
        tokens_ = std::min(group_, padded - first_);
        if (word_ == 0 || group_ < padded) pack_tokens();
        by_tokens();
        if (needs_[1] || needs_[2]) by_words();
      }
    }
    return {needs_[0] ? hidden_grad(hidden_type) : at::Tensor(), dw_, db_};
  }

  static at::ScalarType grad_type(const at::Tensor& x) {
    return x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  }

 private:
  char* packed(size_t head, int64_t tile) { return data(packed_[head]) + tile * heads_[head].token_tile_bytes(); }

  void pack_tokens() {
    share(tokens_ / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;) {
        for (size_t h = 0; h < heads_.size(); h++) heads_[h].pack_token_tile(first_ + tile * kTile, packed(h, tile));
        if (needs_[1])
          head_.pack_token_rows(first_ + tile * kTile, data(rows_) + tile * kTile * kTile * size_, group_ * kTile);
      }
    });
  }

  void transpose_slab() {
    share((words_ + kTile - 1) / kTile, [&](auto next) {
      for (int64_t block; (block = next()) >= 0;) {
        const int64_t at = block * kTile, count = std::min<int64_t>(kTile, words_ - at);
        head_.transpose_words(word_ + at, count, round_up(count, 2), data(wt_) + at * size_, wt_ld_);
      }
    });
  }

  void by_tokens() {
    share(tokens_ / kTile, [&](auto next) {
      const at::Tensor z = at::empty({3, kTile, kTile}, at::kFloat), dz = bytes(round_up(slab_, 2) * kTile * size_);
      std::vector<at::Tensor> scratch;
      for (const Head& head : heads_) scratch.push_back(bytes(head.words_bytes(kTile)));
      for (int64_t tile; (tile = next()) >= 0;) {
        for (int64_t at = 0; at < words_; at += kTile)
          grad_tile(tile, at, std::min<int64_t>(kTile, words_ - at), z.mutable_data_ptr<float>(), scratch, data(dz));
        if (!needs_[0]) continue;
        float* dx = dx_.mutable_data_ptr<float>() + (first_ / kTile + tile) * head_.width() * kTile;
        for (int64_t h = 0; h < head_.width(); h += kTile)
          multiply(math_, std::min<int64_t>(kTile, head_.width() - h), kTile,
                   math_ == Math::kBf16 ? round_up(words_, 2) : words_, data(wt_) + h * wt_ld_ * size_, wt_ld_,
                   data(dz), kTile, dx + h * kTile, kTile, true);
      }
      release_multiplier();
    });
  }

  // dZ of one tile: packed into `dz` for the product with W^T, and laid out in rows for the product with X.
  void grad_tile(int64_t tile, int64_t at, int64_t count, float* z, const std::vector<at::Tensor>& scratch, char* dz) {
    const int64_t token = first_ + tile * kTile, word = word_ + at;
    const int words = static_cast<int>(count);
    float* tiles[2] = {z, z + kTile * kTile};
    for (size_t h = 0; h < heads_.size(); h++) {
      const Words w = heads_[h].words(word, count, data(scratch[h]));
      multiply(heads_[h].math(), count, kTile, heads_[h].depth(), w.data, w.ld, packed(h, tile), kTile, tiles[h], kTile,
               false);
      folds_.finish(tiles[h], words, inputs_.finish(heads_[h], token, word));
    }
    float* logits = z + 2 * kTile * kTile;
    if (inputs_.softcap != 0) std::memcpy(logits, z, count * kTile * sizeof(float));
    formula_.tile(tiles, words, word, token);
    folds_.unfinish(z, logits, words, inputs_.finish(head_, token, word));
    if (needs_[2]) sum_rows(z, count, db_part_.mutable_data_ptr<float>() + tile * slab_ + at);
    char* rows = needs_[1] ? data(dz_) + (at * dz_ld_ + tile * kTile) * size_ : nullptr;
    if (math_ == Math::kBf16) {
      folds_.round_tile(z, words, reinterpret_cast<uint16_t*>(rows), dz_ld_,
                        reinterpret_cast<uint16_t*>(dz + at * kTile * size_));
      return;
    }
    std::memcpy(dz + at * kTile * size_, z, count * kTile * sizeof(float));
    for (int64_t w = 0; rows && w < count; w++)
      std::memcpy(rows + w * dz_ld_ * size_, z + w * kTile, kTile * sizeof(float));
  }

  static void sum_rows(const float* z, int64_t count, float* out) {
    for (int64_t w = 0; w < count; w++) {
      float sums[8] = {};
      for (int i = 0; i < kTile; i++) sums[i % 8] += z[w * kTile + i];
      out[w] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
  }

  void by_words() {
    share((words_ + kTile - 1) / kTile, [&](auto next) {
      const at::Tensor own = dw_sum_.defined() || !needs_[1] ? at::Tensor() : at::empty({kTile, columns_}, at::kFloat);
      for (int64_t block; (block = next()) >= 0;) {
        const int64_t at = block * kTile, count = std::min<int64_t>(kTile, words_ - at);
        if (needs_[2]) add_bias_parts(at, count);
        if (!needs_[1]) continue;
        float* sum = own.defined() ? own.mutable_data_ptr<float>() : dw_sum_.mutable_data_ptr<float>() + at * columns_;
        for (int64_t t = 0; t < tokens_; t += kDepth) {
          const int64_t depth = std::min(kDepth, tokens_ - t);
          for (int64_t c = 0; c < columns_; c += kTile)
            multiply(math_, count, kTile, depth, data(dz_) + (at * dz_ld_ + t) * size_, dz_ld_,
                     data(rows_) + (c * group_ + t * kTile) * size_, kTile, sum + c, columns_, first_ + t > 0);
        }
        if (first_ + tokens_ >= head_.tokens()) write_rows(sum, word_ + at, count);
      }
      release_multiplier();
    });
  }

  void add_bias_parts(int64_t at, int64_t count) {
    const float* part = db_part_.const_data_ptr<float>() + at;
    float* out = db_.mutable_data_ptr<float>() + word_ + at;
    for (int64_t tile = 0; tile < tokens_ / kTile; tile++)
      for (int64_t w = 0; w < count; w++) out[w] += part[tile * slab_ + w];
  }

  void write_rows(const float* sum, int64_t word, int64_t count) {
    const int64_t width = head_.width();
    for (int64_t w = 0; w < count; w++, sum += columns_) {
      if (dw_.scalar_type() == at::kBFloat16) {
        at::BFloat16* out = dw_.mutable_data_ptr<at::BFloat16>() + (word + w) * width;
        for (int64_t k = 0; k < width; k++) out[k] = sum[k];
      } else {
        std::memcpy(dw_.mutable_data_ptr<float>() + (word + w) * width, sum, width * sizeof(float));
      }
    }
  }

  at::Tensor hidden_grad(at::ScalarType type) {
    const int64_t n = head_.tokens(), width = head_.width();
    at::Tensor out = at::empty({n, width}, type);
    const bool half = type == at::kBFloat16;
    share(round_up(n, kTile) / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;) {
        const float* from = dx_.const_data_ptr<float>() + tile * width * kTile;
        for (int64_t t = 0; t < std::min<int64_t>(kTile, n - tile * kTile); t++) {
          const int64_t row = (tile * kTile + t) * width;
          if (half)
            for (int64_t k = 0; k < width; k++) out.mutable_data_ptr<at::BFloat16>()[row + k] = from[k * kTile + t];
          else
            for (int64_t k = 0; k < width; k++) out.mutable_data_ptr<float>()[row + k] = from[k * kTile + t];
        }
      }
    });
    return out;
  }

  const std::vector<Head>& heads_;
  const Head& head_;
  const TokenInputs& inputs_;
  const GradFormula& formula_;
  const Folds& folds_;
  const Math math_;
  const int64_t size_;
  const std::array<bool, 3> needs_;
  const int64_t columns_;  // H padded to whole tiles
  int64_t group_ = 0, slab_ = 0, dz_ld_ = 0, wt_ld_ = 0;
  int64_t word_ = 0, words_ = 0, first_ = 0, tokens_ = 0;  // where the walk is
  at::Tensor dw_, db_, dx_, wt_, dz_, rows_, dw_sum_, db_part_;
  std::vector<at::Tensor> packed_;
};

}  // namespace

Grads grad_walk(const std::vector<Head>& heads, const TokenInputs& inputs, const GradFormula& formula,
                const at::Tensor& hidden, const at::Tensor& weight, std::array<bool, 3> needs, bool wide) {
  const at::ScalarType hidden_type = wide ? at::kFloat : GradWalk::grad_type(hidden);
  if (heads[0].tokens() == 0) {
    const auto zeros = [&](bool need, at::IntArrayRef sizes, at::ScalarType type) {
      return need ? at::zeros(sizes, hidden.options().dtype(type)) : at::Tensor();
    };
    return {zeros(needs[0], {0, heads[0].width()}, hidden_type),
            zeros(needs[1], weight.sizes(), GradWalk::grad_type(weight)),
            zeros(needs[2], {heads[0].vocab()}, at::kFloat)};
  }
  return GradWalk(heads, inputs, formula, weight, needs).run(hidden_type);
}

}  // namespace sgcd
