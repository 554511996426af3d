#include "grad.h"

#include <cmath>

#include "check.h"
#include "grad_walk.h"
#include "isa.h"

namespace sgcd {
namespace {

// A per-token input, padded to whole tiles.
std::vector<float> padded(const char* name, const at::Tensor& x, int64_t n, float fill) {
  check_tokens(name, x, at::kFloat, n);
  std::vector<float> out(round_up(n, kTile), fill);
  std::copy_n(x.const_data_ptr<float>(), n, out.begin());
  return out;
}

constexpr float kHuge = 1e30f;  // a normaliser that leaves the tokens of padding no probability

struct LogprobFormula : GradFormula {
  const Folds& folds = *cpu_isa().folds;
  const std::vector<int32_t>& target;
  std::vector<float> lse, scale, d_logp, entropy, d_entropy;
  std::vector<float> logit;  // of targets, where tiles were kept

  explicit LogprobFormula(const std::vector<int32_t>& t) : target(t) {}

  void kept(const Kept& kept, float* z, int words, int64_t word, int64_t token) const override {
    const Kept::Rows rows = kept.rows(word / kTile, token);
    folds.kept_grad(reinterpret_cast<const uint16_t*>(rows.data), rows.ld, words, kept.maxima(word / kTile, token),
                    {&lse[token], &scale[token], nullptr, nullptr}, z);
    // 1 - p of a word that is nearly certain is lost in a rounded p.
    at_targets(words, word, token, [&](int64_t at, int64_t t) { z[at] = std::exp(logit[t] - lse[t]) * scale[t] + d_logp[t]; });
  }

  void tile(float* const* z, int words, int64_t word, int64_t token) const override {
    const bool both = !d_entropy.empty();
    folds.logprob_grad(z[0], words,
                       {&lse[token], &scale[token], both ? &entropy[token] : nullptr,
                        both ? &d_entropy[token] : nullptr});
    at_targets(words, word, token, [&](int64_t at, int64_t t) { z[0][at] += d_logp[t]; });
  }

  // Call f(place in the tile, token) where a token's target is among the words.
  template <class F>
  void at_targets(int words, int64_t word, int64_t token, F f) const {
    for (int64_t t = token; t < token + kTile; t++) {
      const uint32_t local = static_cast<uint32_t>(target[t] - word);
      if (local < static_cast<uint32_t>(words)) f(int64_t{local} * kTile + t - token, t);
    }
  }
};

struct DistillFormula : GradFormula {
  const Folds& folds = *cpu_isa().folds;
  std::vector<float> lse_p, lse_q, centre, d_loss;
  float beta = 0;
  DistillKind kind = kReverseKl;

  void tile(float* const* z, int words, int64_t, int64_t token) const override {
    folds.distill_grad(z[0], z[1], words,
                       {&lse_p[token], &lse_q[token], &centre[token], &d_loss[token], beta, kind});
  }
};

}  // namespace

Grads logprob_grads(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& rows, const at::Tensor& targets, const OptionalTensor& temperature,
                    double softcap, const at::Tensor& lse, const at::Tensor& scale, const at::Tensor& d_logp,
                    const OptionalTensor& entropy, const OptionalTensor& d_entropy, std::array<bool, 3> needs,
                    bool wide, std::vector<at::Tensor> kept_tensors) {
  check_head("", hidden, weight, bias, rows);
  const std::vector<Head> heads{{hidden, weight, bias, rows}};
  const int64_t n = heads[0].tokens();
  check_tokens("targets", targets, at::kLong, n);
  check_shared(temperature, n, softcap);
  TORCH_CHECK_VALUE(entropy.has_value() == d_entropy.has_value(), "entropy and d_entropy come together");
  const TokenInputs inputs(n, targets, temperature, softcap);
  LogprobFormula formula(inputs.target);
  formula.lse = padded("lse", lse, n, kHuge);
  formula.scale = padded("scale", scale, n, 0);
  formula.d_logp = padded("d_logp", d_logp, n, 0);
  if (entropy) {
    formula.entropy = padded("entropy", *entropy, n, 0);
    formula.d_entropy = padded("d_entropy", *d_entropy, n, 0);
  }
  const Kept kept(heads[0], weight, std::move(kept_tensors));
  if (kept.tokens() > 0) {
    TORCH_CHECK_VALUE(!d_entropy && (kept.weight_grad().numel() > 0) == needs[1] && (softcap == 0 || !kept.half()),
                      "kept fits no gradient of entropies, and one of the weight only where it was made for that");
    formula.logit = padded("kept[4]", kept.tensors()[4], n, 0);
  }
  return grad_walk(heads, inputs, formula, hidden, weight, needs, wide, kept);
}

Grads distill_grads(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight,
                    const OptionalTensor& teacher_bias, const OptionalTensor& rows, const OptionalTensor& temperature,
                    double softcap, const at::Tensor& lse, const at::Tensor& teacher_lse, const at::Tensor& centre,
                    const at::Tensor& d_loss, double beta, int64_t kind, std::array<bool, 3> needs) {
  const std::vector<Head> heads =
      checked_pair(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, rows);
  const int64_t n = heads[0].tokens();
  check_shared(temperature, n, softcap);
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta is ", beta, ", needs a number in [0, 1]");
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 2, "kind is ", kind, ", needs 0, 1 or 2");
  const TokenInputs inputs(n, std::nullopt, temperature, softcap);
  DistillFormula formula;
  formula.lse_p = padded("lse", lse, n, kHuge);
  formula.lse_q = padded("teacher_lse", teacher_lse, n, kHuge);
  formula.centre = padded("centre", centre, n, 0);
  formula.d_loss = padded("d_loss", d_loss, n, 0);
  formula.beta = static_cast<float>(beta);
  formula.kind = static_cast<DistillKind>(kind);
  return grad_walk(heads, inputs, formula, hidden, weight, needs, false, {});
}

}  // namespace sgcd
