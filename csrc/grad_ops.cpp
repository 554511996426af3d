#include "grad_ops.h"

#include <algorithm>
#include <cmath>

#include "cached_tiles.h"
#include "check.h"
#include "grad_sweep.h"
#include "isa.h"

namespace sgcd {
namespace {

constexpr float kMinExponent = -1e4f;  // e^kMinExponent is 0, and 0 times it is 0 where 0 times -inf would be NaN
constexpr float kHuge = 1e30f;         // a normaliser at which padding tokens have probability 0

// A per-token input, padded to whole tiles.
std::vector<float> padded(const char* name, const at::Tensor& x, int64_t n, float fill) {
  check_tokens(name, x, at::kFloat, n);
  std::vector<float> out(round_up(n, kTile), fill);
  std::copy_n(x.const_data_ptr<float>(), n, out.begin());
  return out;
}

struct LogprobFormula : GradFormula {
  const std::vector<int32_t>& target;
  std::vector<float> lse, lse_low, scale, d_logp, entropy, d_entropy;
  std::vector<float> target_logit;  // where tiles are cached

  explicit LogprobFormula(const std::vector<int32_t>& targets) : target(targets) {}

  void logits_to_grad(float* const* z, int count, int64_t vocab_id, int64_t token) const override {
    const bool both = !d_entropy.empty();
    const LogprobGrad grad{.lse = &lse[token],
                           .lse_low = &lse_low[token],
                           .scale = &scale[token],
                           .entropy = both ? &entropy[token] : nullptr,
                           .d_entropy = both ? &d_entropy[token] : nullptr};
    float target_z[kTile];
    for_targets(count, vocab_id, token, [&](int64_t cell, int64_t t) { target_z[t - token] = z[0][cell]; });
    tile_kernels().logprob_grad(z[0], count, grad);
    for_targets(count, vocab_id, token,
                [&](int64_t cell, int64_t t) { z[0][cell] = target_grad(target_z[t - token], t); });
  }

  void cached_to_grad(const CachedTiles& cached, float* dz, int count, int64_t vocab_id, int64_t token) const override {
    const int64_t block = vocab_id / kTile;
    const TileRows rows = cached.rows(block, token);
    const LogprobGrad grad{.lse = &lse[token],
                           .lse_low = &lse_low[token],
                           .scale = &scale[token],
                           .entropy = nullptr,
                           .d_entropy = nullptr};
    tile_kernels().cached_logprob_grad(reinterpret_cast<const uint16_t*>(rows.data), rows.ld, count,
                                       cached.maxima(block, token), grad, dz);
    for_targets(count, vocab_id, token, [&](int64_t cell, int64_t t) { dz[cell] = target_grad(target_logit[t], t); });
  }

  // d_logp (1 - p) + p (d_lse - d_entropy (ln p + entropy)). 1 - p is -expm1(ln p): of a target that is nearly certain,
  // it would be rounding error.
  float target_grad(float z, int64_t t) const {
    float log_p = z - lse[t] - lse_low[t];
    if (log_p < kMinExponent) log_p = kMinExponent;  // not std::max, which would lose a NaN
    float slope = scale[t] + d_logp[t];
    if (!d_entropy.empty()) slope -= d_entropy[t] * (log_p + entropy[t]);
    return std::exp(log_p) * slope - std::expm1(log_p) * d_logp[t];
  }

  // Call f(cell of the tile, token) for each token whose target is in the tile.
  template <class F>
  void for_targets(int count, int64_t vocab_id, int64_t token, F f) const {
    for (int64_t t = token; t < token + kTile; t++) {
      const uint32_t local = static_cast<uint32_t>(target[t] - vocab_id);
      if (local < static_cast<uint32_t>(count)) f(int64_t{local} * kTile + t - token, t);
    }
  }
};

struct DistillFormula : GradFormula {
  std::vector<float> lse_p, lse_p_low, lse_q, lse_q_low, expected_log_ratio, d_loss;
  float beta = 0;
  DistillKind kind = kReverseKl;

  void logits_to_grad(float* const* z, int count, int64_t, int64_t token) const override {
    const DistillGrad grad{.lse_p = &lse_p[token],
                           .lse_p_low = &lse_p_low[token],
                           .lse_q = &lse_q[token],
                           .lse_q_low = &lse_q_low[token],
                           .expected_log_ratio = &expected_log_ratio[token],
                           .d_loss = &d_loss[token],
                           .beta = beta,
                           .kind = kind};
    tile_kernels().distill_grad(z[0], z[1], count, grad);
  }
};

}  // namespace

Grads logprob_grads(const HeadArgs& args, const LogprobGradArgs& loss, GradNeeds needs,
                    std::vector<at::Tensor> cached_tensors) {
  const std::vector<Head> heads = checked_heads(args);
  const int64_t n = heads[0].tokens();
  check_tokens("targets", loss.targets, at::kLong, n);
  check_transform(args, n);
  TORCH_CHECK_VALUE(loss.entropy.has_value() == loss.d_entropy.has_value(), "entropy and d_entropy come together");
  const TokenInputs inputs(n, loss.targets, args);
  LogprobFormula formula(inputs.target);
  formula.lse = padded("lse", loss.lse, n, kHuge);
  formula.lse_low = loss.lse_low ? padded("lse_low", *loss.lse_low, n, 0) : std::vector<float>(formula.lse.size());
  formula.scale = padded("scale", loss.scale, n, 0);
  formula.d_logp = padded("d_logp", loss.d_logp, n, 0);
  if (loss.entropy && loss.d_entropy) {
    formula.entropy = padded("entropy", *loss.entropy, n, 0);
    formula.d_entropy = padded("d_entropy", *loss.d_entropy, n, 0);
  }
  const CachedTiles cached(heads[0], args.weight, std::move(cached_tensors));
  if (cached.tokens() > 0) {
    const bool has_weight_grad = cached.weight_grad().numel() > 0;
    TORCH_CHECK_VALUE(
        !loss.d_entropy && has_weight_grad == needs.weight && (args.softcap == 0 || !cached.holds_exponentials()),
        "cached fits no gradient of entropies, and one of the weight only where it was made for that");
    formula.target_logit = padded("cached[4]", cached.tensors()[4], n, 0);
  }
  return grad_sweep(heads, args, inputs, formula, needs, cached);
}

Grads distill_grads(const PairArgs& args, const DistillGradArgs& loss, GradNeeds needs) {
  const std::vector<Head> heads = checked_heads(args);
  const int64_t n = heads[0].tokens();
  check_transform(args.student, n);
  check_beta(loss.beta);
  TORCH_CHECK_VALUE(loss.kind >= 0 && loss.kind <= 2, "kind is ", loss.kind, ", needs 0, 1 or 2");
  const TokenInputs inputs(n, std::nullopt, args.student);
  DistillFormula formula;
  formula.lse_p = padded("lse", loss.lse, n, kHuge);
  formula.lse_p_low = padded("lse_low", loss.lse_low, n, 0);
  formula.lse_q = padded("teacher_lse", loss.teacher_lse, n, kHuge);
  formula.lse_q_low = padded("teacher_lse_low", loss.teacher_lse_low, n, 0);
  formula.expected_log_ratio = padded("expected_log_ratio", loss.expected_log_ratio, n, 0);
  formula.d_loss = padded("d_loss", loss.d_loss, n, 0);
  formula.beta = static_cast<float>(loss.beta);
  formula.kind = static_cast<DistillKind>(loss.kind);
  return grad_sweep(heads, args.student, inputs, formula, needs, {});
}

}  // namespace sgcd
