#include "walk.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace sgcd {
namespace {

constexpr int64_t kPackedBytes = 24 << 20;   // hidden states packed at one time
constexpr int64_t kPartialBytes = 12 << 20;  // statistics of all slices of the vocabulary
constexpr int64_t kWordsBytes = 512 << 10;   // weight rows that stay in L2 while the tokens pass by
constexpr int64_t kMaxSlices = 64;


// One group of tokens, packed, against the whole vocabulary.
class Group {
 public:
  Group(const std::vector<Head>& heads, const TokenInputs& inputs, const Fold& fold, const TargetLogits& targets,
        int64_t first, int64_t tokens)
      : heads_(heads), inputs_(inputs), fold_(fold), targets_(targets), first_(first), tokens_(tokens) {
    stride_ = round_up(tokens, kTile);
    const int64_t per_slice = fold.fields() * stride_ * 4;
    blocks_ = (heads[0].vocab() + kTile - 1) / kTile;
    slices_ = std::clamp<int64_t>(kPartialBytes / per_slice, 4, kMaxSlices);
    slices_ = std::clamp<int64_t>((blocks_ + 3) / 4, 1, slices_);
    state_ = fresh({slices_, fold.fields(), stride_}, at::kFloat);
    for (const Head& head : heads) packed_.push_back(bytes(head.token_tile_bytes() * stride_ / kTile));
  }

  void run(float* out, int64_t out_stride) {
    share(stride_ / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;)
        for (size_t h = 0; h < heads_.size(); h++) heads_[h].pack_token_tile(first_ + tile * kTile, packed(h, tile));
    });
    share(slices_, [&](auto next) {
      Scratch scratch(*this);
      for (int64_t slice; (slice = next()) >= 0;) fold_slice(slice, scratch);
      release_multiplier();
    });
    share(stride_ / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;)
        for (int64_t slice = 1; slice < slices_; slice++)
          fold_.merge(state(0) + tile * kTile, state(slice) + tile * kTile, stride_, kTile);
    });
    for (int field = 0; field < fold_.fields(); field++)
      std::memcpy(out + field * out_stride + first_, state(0) + field * stride_, tokens_ * sizeof(float));
  }

 private:
  struct Scratch {
    at::Tensor z;
    std::vector<at::Tensor> words;
    explicit Scratch(const Group& g) : z(at::empty({2, kTile, kTile}, at::kFloat)) {
      for (const Head& head : g.heads_) words.push_back(bytes(head.words_bytes(g.block_words() * kTile)));
    }
  };

  float* state(int64_t slice) { return state_.mutable_data_ptr<float>() + slice * fold_.fields() * stride_; }
  char* packed(size_t head, int64_t tile) {
    return static_cast<char*>(packed_[head].mutable_data_ptr()) + tile * heads_[head].token_tile_bytes();
  }
  int64_t block_words() const {  // blocks of words that are walked over the tokens together
    int64_t bytes_of_block = 0;
    for (const Head& head : heads_) bytes_of_block = std::max(bytes_of_block, head.words_bytes(kTile));
    return std::clamp<int64_t>(kWordsBytes / bytes_of_block, 1, 4);
  }

  void fold_slice(int64_t slice, Scratch& scratch) {
    float* sums = state(slice);
    fold_.start(sums, stride_, stride_);
    const int64_t vocab = heads_[0].vocab(), end = (slice + 1) * blocks_ / slices_ * kTile;
    const int64_t step = block_words() * kTile;
    for (int64_t word = slice * blocks_ / slices_ * kTile; word < std::min(end, vocab); word += step) {
      const int64_t stop = std::min({word + step, end, vocab});
      Words words[2];
      for (size_t h = 0; h < heads_.size(); h++) {
        const bool shared = h == 1 && heads_[1].same_weight(heads_[0]);
        words[h] = shared ? words[0] : heads_[h].words(word, stop - word, scratch.words[h].mutable_data_ptr());
      }
      for (int64_t tile = 0; tile < stride_ / kTile; tile++)
        for (int64_t at = word; at < stop; at += kTile)
          fold_tile(words, at - word, at, std::min<int64_t>(kTile, stop - at), tile, sums, scratch);
    }
  }

  void fold_tile(const Words* words, int64_t skip, int64_t word, int64_t count, int64_t tile, float* sums,
                 Scratch& scratch) {
    const int64_t token = first_ + tile * kTile;
    float* z[2] = {scratch.z.mutable_data_ptr<float>(), scratch.z.mutable_data_ptr<float>() + kTile * kTile};
    for (size_t h = 0; h < heads_.size(); h++) {
      const Head& head = heads_[h];
      head.multiply_tile(words[h], skip, count, token, packed(h, tile), z[h]);
      cpu_isa().folds->finish(z[h], static_cast<int>(count), inputs_.finish(head, token, word));
    }
    if (!inputs_.target.empty()) pick(z, word, count, token);
    fold_.tile(z, static_cast<int>(count), sums + tile * kTile, stride_, word, token);
  }

  void pick(float* const* z, int64_t word, int64_t count, int64_t token) {
    const int32_t* target = inputs_.target.data() + token;
    uint32_t found = 0;
    for (int i = 0; i < kTile; i++) found |= static_cast<uint32_t>(target[i] - word) < count;
    if (!found) return;
    for (int i = 0; i < kTile; i++) {
      const uint32_t local = static_cast<uint32_t>(target[i] - word);
      if (local < count)
        for (size_t h = 0; h < heads_.size(); h++) targets_[h][token + i] = z[h][local * kTile + i];
    }
  }

  const std::vector<Head>& heads_;
  const TokenInputs& inputs_;
  const Fold& fold_;
  const TargetLogits& targets_;
  int64_t first_, tokens_, stride_ = 0, blocks_ = 0, slices_ = 0;
  at::Tensor state_;
  std::vector<at::Tensor> packed_;
};

}  // namespace

TokenInputs::TokenInputs(int64_t tokens, const std::optional<at::Tensor>& targets,
                         const std::optional<at::Tensor>& temperatures, double cap)
    : softcap(static_cast<float>(cap)) {
  const int64_t padded = round_up(tokens, kTile);
  if (targets) {
    target.assign(padded, -1);
    const int64_t* from = targets->const_data_ptr<int64_t>();
    // Anything that is no word of this shard, however large, is -1 and never found.
    for (int64_t i = 0; i < tokens; i++) target[i] = from[i] >= 0 && from[i] < INT32_MAX ? int32_t(from[i]) : -1;
  }
  if (temperatures) {
    temperature.assign(padded, 1.0f);
    std::copy_n(temperatures->const_data_ptr<float>(), tokens, temperature.begin());
  }
}

Finish TokenInputs::finish(const Head& head, int64_t token, int64_t word) const {
  return {head.bias() ? head.bias() + word : nullptr, softcap, temperature.empty() ? nullptr : &temperature[token]};
}

void walk(const std::vector<Head>& heads, const TokenInputs& inputs, const Fold& fold, const TargetLogits& targets,
          float* out) {
  const int64_t tokens = heads[0].tokens();
  int64_t bytes_of_tile = 0;
  for (const Head& head : heads) bytes_of_tile += head.token_tile_bytes();
  const int64_t step = std::max<int64_t>(1, kPackedBytes / bytes_of_tile) * kTile;
  for (int64_t first = 0; first < tokens; first += step)
    Group(heads, inputs, fold, targets, first, std::min(step, tokens - first)).run(out, tokens);
}

}  // namespace sgcd
