#include "stats.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cached_tiles.h"
#include "check.h"
#include "forward_sweep.h"
#include "isa.h"

namespace sgcd {
namespace {

// Merging only reads its source.
float* readable(const float* state) { return const_cast<float*>(state); }

struct HeadReduction : Reduction {
  int fields() const override { return 3; }
  void init(float* state, int64_t stride, int64_t tokens) const override {
    clear(head_stats_at(state, stride), tokens);
  }
  void update(float* const* z, int count, float* state, int64_t stride, int64_t, int64_t) const override {
    tile_kernels().update_head(z[0], count, head_stats_at(state, stride));
  }
  void merge(float* into, const float* from, int64_t stride, int64_t tokens) const override {
    tile_kernels().merge_head(head_stats_at(into, stride), head_stats_at(readable(from), stride), tokens);
  }
};

// The same, and cache tiles for the gradient.
struct CachingReduction : HeadReduction {
  const CachedTiles& cached;
  explicit CachingReduction(const CachedTiles& tiles) : cached(tiles) {}
  void update(float* const* z, int count, float* state, int64_t stride, int64_t vocab_id,
              int64_t token) const override {
    if (token >= cached.tokens()) return HeadReduction::update(z, count, state, stride, vocab_id, token);
    const int64_t block = vocab_id / kTile;
    if (cached.holds_exponentials()) {
      const TileRows rows = cached.rows(block, token);
      tile_kernels().update_head_and_cache(z[0], count, head_stats_at(state, stride),
                                           reinterpret_cast<uint16_t*>(rows.data), rows.ld,
                                           cached.maxima(block, token));
    } else {
      tile_kernels().update_head(z[0], count, head_stats_at(state, stride));
      cached.store(block, token, count, z[0]);
    }
  }
};

struct PairReduction : Reduction {
  int fields() const override { return 9; }
  void init(float* state, int64_t stride, int64_t tokens) const override {
    const PairStats stats = pair_stats_at(state, stride);
    clear(stats.p, tokens);
    clear(stats.q, tokens);
    for (float* sum : {stats.a_p, stats.a_q, stats.overlap}) std::fill_n(sum, tokens, 0.0f);
  }
  void update(float* const* z, int count, float* state, int64_t stride, int64_t, int64_t) const override {
    tile_kernels().update_pair(z[0], z[1], count, pair_stats_at(state, stride));
  }
  void merge(float* into, const float* from, int64_t stride, int64_t tokens) const override {
    tile_kernels().merge_pair(pair_stats_at(into, stride), pair_stats_at(readable(from), stride), tokens);
  }
};

struct MixtureReduction : Reduction {
  std::vector<float> normalisers;  // [4][padded]
  int64_t padded;
  float beta;
  bool jsd, tv;

  explicit MixtureReduction(const MixtureArgs& args)
      : padded(round_up(args.normalisers.size(1), kTile)),
        beta(static_cast<float>(args.beta)),
        jsd(args.jsd),
        tv(args.tv) {
    const int64_t n = args.normalisers.size(1);
    normalisers.assign(4 * padded, 0.0f);
    for (int64_t i = 0; i < 4; i++)
      std::copy_n(args.normalisers.const_data_ptr<float>() + i * n, n, normalisers.begin() + i * padded);
  }
  int fields() const override { return 3; }
  void init(float* state, int64_t stride, int64_t tokens) const override {
    for (int field = 0; field < fields(); field++) std::fill_n(state + field * stride, tokens, 0.0f);
  }
  void update(float* const* z, int count, float* state, int64_t stride, int64_t, int64_t token) const override {
    const float* known = normalisers.data() + token;
    const MixtureStats sums{.m_p = known,
                            .log_l_p = known + padded,
                            .m_q = known + 2 * padded,
                            .log_l_q = known + 3 * padded,
                            .jsd = jsd ? state : nullptr,
                            .tv = tv ? state + stride : nullptr,
                            .expected_log_ratio = jsd ? state + 2 * stride : nullptr,
                            .beta = beta};
    tile_kernels().add_mixture(z[0], z[1], count, sums);
  }
  void merge(float* into, const float* from, int64_t stride, int64_t tokens) const override {
    for (int field = 0; field < fields(); field++) {
      for (int64_t i = 0; i < tokens; i++) into[field * stride + i] += from[field * stride + i];
    }
  }
};

std::vector<Head> checked_call(const HeadArgs& args, const at::Tensor& targets) {
  std::vector<Head> heads = checked_heads(args);
  check_tokens("targets", targets, at::kLong, heads[0].tokens());
  check_transform(args, heads[0].tokens());
  return heads;
}

at::Tensor sweep_one_head(const std::vector<Head>& heads, const HeadArgs& args, const at::Tensor& targets,
                          const HeadReduction& reduction) {
  const int64_t n = heads[0].tokens();
  at::Tensor out = at::zeros({4, n}, args.hidden.options().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  forward_sweep(heads, TokenInputs(n, targets, args), reduction, {data + 3 * n}, data);
  return out;
}

}  // namespace

at::Tensor head_stats(const HeadArgs& args, const at::Tensor& targets) {
  return sweep_one_head(checked_call(args, targets), args, targets, HeadReduction());
}

std::tuple<at::Tensor, std::vector<at::Tensor>> head_stats_cached(const HeadArgs& args, const at::Tensor& targets,
                                                                  bool weight_grad) {
  const std::vector<Head> heads = checked_call(args, targets);
  const CachedTiles cached(heads[0], args, weight_grad);
  const at::Tensor stats = sweep_one_head(heads, args, targets, CachingReduction(cached));
  const int64_t n = heads[0].tokens();
  if (!cached.tensors().empty()) std::copy_n(stats.const_data_ptr<float>() + 3 * n, n, cached.target_logits());
  return {stats, cached.tensors()};
}

at::Tensor pair_stats(const PairArgs& args, const at::Tensor& targets) {
  const std::vector<Head> heads = checked_heads(args);
  const int64_t n = heads[0].tokens();
  check_tokens("targets", targets, at::kLong, n);
  check_transform(args.student, n);
  at::Tensor target_logits = at::zeros({2, n}, args.student.hidden.options().dtype(at::kFloat));
  at::Tensor sums = at::empty({9, n}, target_logits.options());
  float* found = target_logits.mutable_data_ptr<float>();
  forward_sweep(heads, TokenInputs(n, targets, args.student), PairReduction(), {found, found + n},
                sums.mutable_data_ptr<float>());
  return at::cat({sums.slice(0, 0, 3), target_logits.slice(0, 0, 1), sums.slice(0, 3, 6), target_logits.slice(0, 1, 2),
                  sums.slice(0, 6, 9)});
}

at::Tensor mixture_stats(const PairArgs& args, const MixtureArgs& mixture) {
  const std::vector<Head> heads = checked_heads(args);
  const int64_t n = heads[0].tokens();
  check_matrix("normalisers", mixture.normalisers, 4, n);
  check_transform(args.student, n);
  check_beta(mixture.beta);
  at::Tensor out = at::empty({3, n}, mixture.normalisers.options());
  forward_sweep(heads, TokenInputs(n, std::nullopt, args.student), MixtureReduction(mixture), {},
                out.mutable_data_ptr<float>());
  return out;
}

}  // namespace sgcd
