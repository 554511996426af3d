#include "grad_walk.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace sgcd {
namespace {

constexpr int64_t kPackedBytes = 24 << 20;  // hidden states, packed for both products
constexpr int64_t kLeastPacked = 4 << 20;
constexpr int64_t kSumsBytes = 40 << 20;  // hidden states packed, and the sums of their gradient beyond its own size
constexpr int64_t kTransposedBytes = 3 << 20;  // weight^T of a slab; tall slabs mean few places where threads wait
constexpr int64_t kStepBytes = 256 << 10;   // words, and as much of weight^T, that stay in L2 while tokens pass by
constexpr int64_t kBatch = 2;                // tiles of tokens that pass by them
constexpr int64_t kShares = 8;               // of a slab's words, each with a dX of its own, where tiles are few
constexpr int64_t kSharedTiles = 64;
constexpr int64_t kSharedBytes = 8 << 20;    // of all their dX
constexpr int64_t kDepth = 512;             // tokens of one product into dW
constexpr int64_t kPad = 32;                // elements: rows a power of two apart would fall into few sets of a cache
constexpr int64_t kDzLd = kDepth + kPad;

char* data(const at::Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

class GradWalk {
 public:
  // `grad_bytes` are those of an element of hidden's gradient.
  GradWalk(const std::vector<Head>& heads, const TokenInputs& inputs, const GradFormula& formula,
           const at::Tensor& weight, std::array<bool, 3> needs, const Kept& kept, int64_t grad_bytes)
      : heads_(heads),
        head_(heads[0]),
        inputs_(inputs),
        formula_(formula),
        kept_(kept),
        folds_(*cpu_isa().folds),
        math_(head_.math()),
        size_(element_size(math_)),
        needs_(needs),
        own_(has_transposed_products(math_)),
        in_place_(own_ && math_ == Math::kFloat),
        columns_(round_up(head_.width(), kTile)) {
    const int64_t padded = round_up(head_.tokens(), kTile);
    int64_t per_tile = needs[1] ? columns_ * kTile * size_ : 0;
    for (const Head& head : heads) per_tile += head.token_tile_bytes();
    const int64_t beyond = needs[0] ? head_.width() * (4 * padded - grad_bytes * head_.tokens()) : 0;
    const int64_t packed = std::clamp(kSumsBytes - beyond, kLeastPacked, kPackedBytes);
    group_ = std::min(padded, std::max<int64_t>(1, packed / per_tile) * kTile);
    const bool one_group = group_ == padded;
    const int64_t transposed = needs[0] && !in_place_ ? kTransposedBytes / (size_ * head_.width()) : INT64_MAX;
    const int64_t loose = one_group ? padded - kept.tokens() : group_;  // tokens whose dZ has no room of its own
    slab_ = std::min(kSlabBytes / (size_ * std::max<int64_t>(loose, 1)), transposed);
    if (needs[2]) slab_ = std::min(slab_, kSlabBytes / (4 * group_ / kTile));
    slab_ = std::max<int64_t>(1, slab_ / kTile) * kTile;
    slab_ = std::min(slab_, round_up(head_.vocab(), kTile));
    if (needs[1])
      dw_ = kept.tokens() ? kept.weight_grad() : fresh(weight.sizes(), weight.options().dtype(grad_type(weight)));
    db_ = needs[2] ? at::zeros({head_.vocab()}, at::kFloat) : at::Tensor();
    shares_ = std::clamp<int64_t>(kSharedTiles / (padded / kTile), 1, kShares);
    if (needs[0]) shares_ = std::clamp<int64_t>(kSharedBytes / (padded * head_.width() * 4), 1, shares_);
    dx_ = needs[0] ? at::zeros({shares_, padded / kTile, head_.width(), kTile}, at::kFloat) : at::Tensor();
    step_ = std::clamp<int64_t>(kStepBytes / (head_.depth() * size_) / kTile, 2, 8) * kTile;
    if (needs[0] && !in_place_)
      wt_ = bytes(own_ ? slab_ * pairs_ld() * size_
                       : round_up(slab_, step_) / step_ * head_.width() * (step_ + kPad) * size_);
    if (needs[1]) {
      dz_ = bytes(round_up(loose, kDepth) / kDepth * slab_ * kDzLd * size_);
      rows_ = bytes(columns_ * group_ * size_);
      if (!one_group) dw_sum_ = fresh({slab_, columns_}, at::kFloat);
    }
    if (needs[2]) db_part_ = at::empty({group_ / kTile, slab_}, at::kFloat);
    for (const Head& head : heads) packed_.push_back(bytes(head.token_tile_bytes() * group_ / kTile));
  }

  Grads run(at::ScalarType hidden_type) {
    const int64_t padded = round_up(head_.tokens(), kTile);
    words_ = std::min(slab_, head_.vocab());
    share(blocks(words_), [&](auto next) {
      for (int64_t block; (block = next()) >= 0;) transpose_block(0, block);
    });
    for (word_ = 0; word_ < head_.vocab(); word_ += slab_) {
      words_ = std::min(slab_, head_.vocab() - word_);
      for (first_ = 0; first_ < padded; first_ += group_) {
        tokens_ = std::min(group_, padded - first_);
        if (word_ == 0 || group_ < padded) pack_tokens();
        by_tokens();
        by_words(first_ + group_ >= padded);
      }
    }
    packed_.clear();  // the result of hidden_grad takes their place
    for (at::Tensor* used : {&wt_, &dz_, &rows_, &dw_sum_, &db_part_}) used->reset();
    return {needs_[0] ? hidden_grad(hidden_type) : at::Tensor(), dw_, db_};
  }

 private:
  char* packed(size_t head, int64_t tile) { return data(packed_[head]) + tile * heads_[head].token_tile_bytes(); }

  // weight^T at a word of the slab: for our own product rows by pairs, else [steps][H][step], so that a step's rows lie
  // close together.
  int64_t pairs_ld() const { return head_.width() + kPad / 2; }
  char* weight_t(int64_t word) {
    if (own_) return data(wt_) + word * pairs_ld() * size_;
    return data(wt_) + (word / step_ * head_.width() * (step_ + kPad) + word % step_) * size_;
  }
  // dZ at a word of the slab, the first of a block, and a token of the group: where the tile was kept, else in
  // [depths][words][kDepth], so that rows lie close together.
  Kept::Rows dz(int64_t word, int64_t token) {
    const int64_t kept = std::clamp<int64_t>(kept_.tokens() - first_, 0, tokens_), loose = token - kept;
    if (loose < 0) return kept_.rows((word_ + word) / kTile, first_ + token);
    char* at = data(dz_) + ((loose / kDepth * slab_ + word) * kDzLd + loose % kDepth) * size_;
    return {at, kDzLd, kDepth - loose % kDepth};
  }

  void pack_tokens() {
    share(tokens_ / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;) {
        for (size_t h = 0; h < heads_.size(); h++) heads_[h].pack_token_tile(first_ + tile * kTile, packed(h, tile));
        if (needs_[1])
          head_.pack_token_rows(first_ + tile * kTile, data(rows_) + tile * kTile * kTile * size_, group_ * kTile);
      }
    });
  }

  static int64_t blocks(int64_t words) { return (words + kTile - 1) / kTile; }

  void transpose_block(int64_t slab, int64_t block) {
    const int64_t at = block * kTile, word = slab + at, count = std::min<int64_t>(kTile, head_.vocab() - word);
    if (!wt_.defined() || count <= 0) return;
    if (own_) return head_.pair_words(word, count, weight_t(at), pairs_ld());
    head_.transpose_words(word, count, round_up(count, 2), weight_t(at), step_ + kPad);
  }

  void by_tokens() {
    const int64_t tiles = tokens_ / kTile, threads = at::get_num_threads();
    const int64_t batch = std::clamp<int64_t>(tiles * shares_ / (4 * threads), 1, kBatch);
    const int64_t batches = (tiles + batch - 1) / batch, steps = (words_ + step_ - 1) / step_;
    const bool reads_words = (in_place_ && needs_[0]) || first_ + tokens_ > kept_.tokens();
    share(batches * shares_, [&](auto next) {
      const at::Tensor z = at::empty({3, kTile, kTile}, at::kFloat);
      const at::Tensor packed_dz = bytes(step_ * kTile * size_);
      std::vector<at::Tensor> scratch;
      for (const Head& head : heads_) scratch.push_back(bytes(head.words_bytes(step_)));
      for (int64_t task; (task = next()) >= 0;) {
        const int64_t share = task / batches, first = task % batches * batch;
        const int64_t end = std::min((share + 1) * steps / shares_ * step_, words_);
        for (int64_t step = share * steps / shares_ * step_; step < end; step += step_) {
          const int64_t stop = std::min(step + step_, words_);
          Words words[2];
          for (size_t h = 0; h < heads_.size() && reads_words; h++)
            words[h] = heads_[h].words(word_ + step, stop - step, data(scratch[h]));
          for (int64_t tile = first; tile < std::min(first + batch, tiles); tile++) {
            for (int64_t at = step; at < stop; at += kTile)
              grad_tile(tile, at, std::min<int64_t>(kTile, stop - at), words, at - step, z.mutable_data_ptr<float>(),
                        data(packed_dz) + (at - step) * kTile * size_);
            if (needs_[0]) add_hidden_grad(share, tile, step, stop - step, words[0], data(packed_dz));
          }
        }
      }
      release_multiplier();
    });
  }

  float* dx(int64_t share, int64_t tile) {
    return dx_.mutable_data_ptr<float>() + (share * dx_.size(1) + tile) * head_.width() * kTile;
  }

  // dX^T of a tile of tokens += W^T dZ of some words
  void add_hidden_grad(int64_t share, int64_t tile, int64_t at, int64_t count, const Words& words, const char* dz) {
    const int64_t width = head_.width(), depth = math_ == Math::kBf16 ? round_up(count, 2) : count;
    const int64_t live = head_.columns(first_ + tile * kTile);
    float* sum = dx(share, first_ / kTile + tile);
    if (own_)
      return multiply_transposed(math_, width, live, depth, in_place_ ? words.data : weight_t(at),
                                 in_place_ ? words.ld : pairs_ld(), dz, kTile, sum, kTile, true);
    for (int64_t h = 0; h < width; h += kTile)
      multiply(math_, std::min<int64_t>(kTile, width - h), live, depth, weight_t(at) + h * (step_ + kPad) * size_,
               step_ + kPad, dz, kTile, sum + h * kTile, kTile, true);
  }

  // dZ of one tile: packed into `out` for the product with W^T, and laid out in rows for the product with X.
  // `words` are those from `skip` words before.
  void grad_tile(int64_t tile, int64_t at, int64_t count, const Words* words, int64_t skip, float* z, char* out) {
    const int64_t token = first_ + tile * kTile, word = word_ + at;
    const bool kept = token < kept_.tokens();
    const int tall = static_cast<int>(count);
    const Finish finish = inputs_.finish(head_, token, word);
    float* logits = z + 2 * kTile * kTile;
    if (kept && kept_.half()) {
      formula_.kept(kept_, z, tall, word, token);
    } else {
      float* tiles[2] = {z, z + kTile * kTile};
      if (kept) {
        kept_.load(word / kTile, token, tall, z);
      } else {
        make_logits(tile, word, count, words, skip, tiles);
      }
      if (finish.softcap != 0) std::memcpy(logits, z, count * kTile * sizeof(float));
      formula_.tile(tiles, tall, word, token);
    }
    folds_.unfinish(z, logits, tall, finish);
    if (needs_[2]) sum_rows(z, count, db_part_.mutable_data_ptr<float>() + tile * slab_ + at);
    const Kept::Rows rows = needs_[1] ? dz(at, tile * kTile) : Kept::Rows{};
    if (math_ == Math::kBf16) {
      folds_.round_tile(z, tall, reinterpret_cast<uint16_t*>(rows.data), rows.ld, reinterpret_cast<uint16_t*>(out));
      return;
    }
    std::memcpy(out, z, count * kTile * sizeof(float));
    for (int64_t w = 0; rows.data && w < count; w++)
      std::memcpy(rows.data + w * rows.ld * size_, z + w * kTile, kTile * sizeof(float));
  }

  void make_logits(int64_t tile, int64_t word, int64_t count, const Words* words, int64_t skip, float* const* tiles) {
    const int64_t token = first_ + tile * kTile;
    for (size_t h = 0; h < heads_.size(); h++) {
      heads_[h].multiply_tile(words[h], skip, count, token, packed(h, tile), tiles[h]);
      folds_.finish(tiles[h], static_cast<int>(count), inputs_.finish(heads_[h], token, word));
    }
  }

  static void sum_rows(const float* z, int64_t count, float* out) {
    for (int64_t w = 0; w < count; w++) {
      float sums[8] = {};
      for (int i = 0; i < kTile; i++) sums[i % 8] += z[w * kTile + i];
      out[w] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
  }

  // After a slab's last tokens its weight^T has served, and the next slab's is made here: one place less to wait at.
  void by_words(bool last) {
    if (!needs_[1] && !needs_[2] && !last) return;
    share(blocks(words_), [&](auto next) {
      const at::Tensor own = dw_sum_.defined() || !needs_[1] ? at::Tensor() : at::empty({kTile, columns_}, at::kFloat);
      for (int64_t block; (block = next()) >= 0;) {
        const int64_t at = block * kTile, count = std::min<int64_t>(kTile, words_ - at);
        if (last) transpose_block(word_ + slab_, block);
        if (needs_[2]) add_bias_parts(at, count);
        if (!needs_[1]) continue;
        float* sum = own.defined() ? own.mutable_data_ptr<float>() : dw_sum_.mutable_data_ptr<float>() + at * columns_;
        const int64_t live = std::min(tokens_, round_up(head_.tokens() - first_, 2));  // dZ of others is 0
        for (int64_t t = 0, depth; t < live; t += depth) {
          const Kept::Rows rows = dz(at, t);
          depth = std::min({kDepth, rows.tokens, live - t});
          for (int64_t c = 0; c < columns_; c += kTile)
            multiply(math_, count, kTile, depth, rows.data, rows.ld, data(rows_) + (c * group_ + t * kTile) * size_,
                     kTile, sum + c, columns_, first_ + t > 0);
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
        folds_.round_row(sum, width, static_cast<uint16_t*>(dw_.mutable_data_ptr()) + (word + w) * width);
      } else {
        std::memcpy(dw_.mutable_data_ptr<float>() + (word + w) * width, sum, width * sizeof(float));
      }
    }
  }

  at::Tensor hidden_grad(at::ScalarType type) {
    const int64_t n = head_.tokens(), width = head_.width();
    at::Tensor out = fresh({n, width}, type);
    const bool half = type == at::kBFloat16;
    share(round_up(n, kTile) / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;) {
        float* from = dx(0, tile);
        for (int64_t share = 1; share < shares_; share++) {
          const float* more = dx(share, tile);
          for (int64_t i = 0; i < width * kTile; i++) from[i] += more[i];
        }
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
  const Kept& kept_;
  const Folds& folds_;
  const Math math_;
  const int64_t size_;
  const std::array<bool, 3> needs_;
  const bool own_;         // the product with W^T is our own
  const bool in_place_;    // and reads W as it lies
  const int64_t columns_;  // H padded to whole tiles
  int64_t group_ = 0, slab_ = 0, step_ = 0, shares_ = 1;
  int64_t word_ = 0, words_ = 0, first_ = 0, tokens_ = 0;  // where the walk is
  at::Tensor dw_, db_, dx_, wt_, dz_, rows_, dw_sum_, db_part_;
  std::vector<at::Tensor> packed_;
};

}  // namespace

void GradFormula::kept(const Kept&, float*, int, int64_t, int64_t) const {
  TORCH_INTERNAL_ASSERT(false, "nothing is kept for this formula");
}

Grads grad_walk(const std::vector<Head>& heads, const TokenInputs& inputs, const GradFormula& formula,
                const at::Tensor& hidden, const at::Tensor& weight, std::array<bool, 3> needs, bool wide,
                const Kept& kept) {
  const at::ScalarType hidden_type = wide ? at::kFloat : grad_type(hidden);
  if (heads[0].tokens() == 0) {
    const auto zeros = [&](bool need, at::IntArrayRef sizes, at::ScalarType type) {
      return need ? at::zeros(sizes, hidden.options().dtype(type)) : at::Tensor();
    };
    return {zeros(needs[0], {0, heads[0].width()}, hidden_type),
            zeros(needs[1], weight.sizes(), grad_type(weight)),
            zeros(needs[2], {heads[0].vocab()}, at::kFloat)};
  }
  return GradWalk(heads, inputs, formula, weight, needs, kept, at::elementSize(hidden_type)).run(hidden_type);
}

}  // namespace sgcd
