#include "forward_sweep.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace sgcd {
namespace {

constexpr int64_t kPackedBytes = 24 << 20;       // hidden states packed at one time
constexpr int64_t kPartialBytes = 12 << 20;      // statistics of all vocab splits
constexpr int64_t kWeightRowsBytes = 512 << 10;  // weight rows that stay in L2 for all tiles of tokens
constexpr int64_t kMaxSplits = 64;

// One group of tokens, packed, against the whole vocabulary.
class TokenGroup {
 public:
  TokenGroup(const std::vector<Head>& heads, const TokenInputs& inputs, const Reduction& reduction,
             const TargetLogits& targets, int64_t first, int64_t tokens)
      : heads_(heads), inputs_(inputs), reduction_(reduction), targets_(targets), first_(first), tokens_(tokens) {
    stride_ = round_up(tokens, kTile);
    const int64_t split_bytes = reduction.fields() * stride_ * 4;
    blocks_ = ceil_div(heads[0].vocab(), kTile);
    splits_ = std::clamp<int64_t>(kPartialBytes / split_bytes, 4, kMaxSplits);
    splits_ = std::clamp<int64_t>((blocks_ + 3) / 4, 1, splits_);
    state_ = allocate({splits_, reduction.fields(), stride_}, at::kFloat);
    packed_.reserve(heads.size());
    for (const Head& head : heads) packed_.push_back(allocate_bytes(head.packed_tile_bytes() * stride_ / kTile));
  }

  void run(float* out, int64_t out_stride) {
    parallel_tasks(stride_ / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;) {
        for (size_t h = 0; h < heads_.size(); h++) heads_[h].pack_token_tile(first_ + tile * kTile, packed(h, tile));
      }
    });
    parallel_tasks(splits_, [&](auto next) {
      Scratch scratch(*this);
      for (int64_t split; (split = next()) >= 0;) reduce_split(split, scratch);
      release_multiplier();
    });
    parallel_tasks(stride_ / kTile, [&](auto next) {
      for (int64_t tile; (tile = next()) >= 0;) {
        for (int64_t split = 1; split < splits_; split++)
          reduction_.merge(state(0) + tile * kTile, state(split) + tile * kTile, stride_, kTile);
      }
    });
    for (int field = 0; field < reduction_.fields(); field++)
      std::memcpy(out + field * out_stride + first_, state(0) + field * stride_, tokens_ * sizeof(float));
  }

 private:
  struct Scratch {  // of a thread
    at::Tensor z;
    std::vector<at::Tensor> weight_rows;
    explicit Scratch(const TokenGroup& g) : z(at::empty({2, kTile, kTile}, at::kFloat)) {
      weight_rows.reserve(g.heads_.size());
      for (const Head& head : g.heads_)
        weight_rows.push_back(allocate_bytes(head.weight_rows_bytes(g.blocks_per_step() * kTile)));
    }
  };

  float* state(int64_t split) { return state_.mutable_data_ptr<float>() + split * reduction_.fields() * stride_; }
  char* packed(size_t head, int64_t tile) { return bytes_of(packed_[head]) + tile * heads_[head].packed_tile_bytes(); }
  // Blocks of kTile vocab ids that are swept for all tokens before the next ones.
  int64_t blocks_per_step() const {
    int64_t block_bytes = 0;
    for (const Head& head : heads_) block_bytes = std::max(block_bytes, head.weight_rows_bytes(kTile));
    return std::clamp<int64_t>(kWeightRowsBytes / block_bytes, 1, 4);
  }

  void reduce_split(int64_t split, Scratch& scratch) {
    float* stats = state(split);
    reduction_.init(stats, stride_, stride_);
    const int64_t vocab = heads_[0].vocab(), end = (split + 1) * blocks_ / splits_ * kTile;
    const int64_t step = blocks_per_step() * kTile;
    for (int64_t first = split * blocks_ / splits_ * kTile; first < std::min(end, vocab); first += step) {
      const int64_t stop = std::min({first + step, end, vocab});
      WeightRows rows[2];
      for (size_t h = 0; h < heads_.size(); h++) {
        const bool shared = h == 1 && heads_[1].same_weight(heads_[0]);
        rows[h] = shared ? rows[0] : heads_[h].weight_rows(first, stop - first, bytes_of(scratch.weight_rows[h]));
      }
      for (int64_t tile = 0; tile < stride_ / kTile; tile++) {
        for (int64_t vocab_id = first; vocab_id < stop; vocab_id += kTile) {
          const int64_t count = std::min<int64_t>(kTile, stop - vocab_id);
          reduce_tile(rows, vocab_id - first, vocab_id, count, tile, stats, scratch);
        }
      }
    }
  }

  // The weight rows of the tile are `rows` from `skip` on.
  void reduce_tile(const WeightRows* rows, int64_t skip, int64_t vocab_id, int64_t count, int64_t tile, float* stats,
                   Scratch& scratch) {
    const int64_t token = first_ + tile * kTile;
    float* z[2] = {scratch.z.mutable_data_ptr<float>(), scratch.z.mutable_data_ptr<float>() + kTile * kTile};
    for (size_t h = 0; h < heads_.size(); h++) {
      const Head& head = heads_[h];
      head.multiply_tile(rows[h], skip, count, token, packed(h, tile), z[h]);
      tile_kernels().transform_logits(z[h], static_cast<int>(count), inputs_.transform(head, token, vocab_id));
    }
    if (!inputs_.target.empty()) pick_targets(z, vocab_id, count, token);
    reduction_.update(z, static_cast<int>(count), stats + tile * kTile, stride_, vocab_id, token);
  }

  void pick_targets(float* const* z, int64_t vocab_id, int64_t count, int64_t token) {
    const int32_t* target = inputs_.target.data() + token;
    uint32_t found = 0;
    for (int i = 0; i < kTile; i++) found |= static_cast<uint32_t>(target[i] - vocab_id) < count;
    if (!found) return;
    for (int i = 0; i < kTile; i++) {
      const uint32_t local = static_cast<uint32_t>(target[i] - vocab_id);
      if (local >= count) continue;
      for (size_t h = 0; h < heads_.size(); h++) targets_[h][token + i] = z[h][local * kTile + i];
    }
  }

  const std::vector<Head>& heads_;
  const TokenInputs& inputs_;
  const Reduction& reduction_;
  const TargetLogits& targets_;
  int64_t first_, tokens_, stride_ = 0, blocks_ = 0, splits_ = 0;
  at::Tensor state_;
  std::vector<at::Tensor> packed_;
};

}  // namespace

void forward_sweep(const std::vector<Head>& heads, const TokenInputs& inputs, const Reduction& reduction,
                   const TargetLogits& targets, float* out) {
  const int64_t tokens = heads[0].tokens();
  int64_t tile_bytes = 0;
  for (const Head& head : heads) tile_bytes += head.packed_tile_bytes();
  const int64_t step = std::max<int64_t>(1, kPackedBytes / tile_bytes) * kTile;
  for (int64_t first = 0; first < tokens; first += step)
    TokenGroup(heads, inputs, reduction, targets, first, std::min(step, tokens - first)).run(out, tokens);
}

}  // namespace sgcd
