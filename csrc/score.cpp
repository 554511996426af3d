#include "score.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "check.h"
#include "isa.h"
#include "kept.h"
#include "walk.h"

namespace sgcd {
namespace {

// Merging only reads what it merges from.
float* readable(const float* state) { return const_cast<float*>(state); }

struct HeadFold : Fold {
  const Folds& folds = *cpu_isa().folds;
  int fields() const override { return 3; }
  void start(float* state, int64_t stride, int64_t tokens) const override {
    std::fill_n(state, tokens, kLowest);
    for (int field = 1; field < fields(); field++) std::fill_n(state + field * stride, tokens, 0.0f);
  }
  void tile(float* const* z, int words, float* state, int64_t stride, int64_t, int64_t) const override {
    folds.fold_head(z[0], words, head_at(state, stride));
  }
  void merge(float* into, const float* from, int64_t stride, int64_t tokens) const override {
    folds.merge_head(head_at(into, stride), head_at(readable(from), stride), tokens);
  }
};

// The same, and what the gradient can be made of stays.
struct KeepingFold : HeadFold {
  const Kept& kept;
  explicit KeepingFold(const Kept& k) : kept(k) {}
  void tile(float* const* z, int words, float* state, int64_t stride, int64_t word, int64_t token) const override {
    if (token >= kept.tokens()) return HeadFold::tile(z, words, state, stride, word, token);
    const int64_t block = word / kTile;
    if (kept.half()) {
      const Kept::Rows rows = kept.rows(block, token);
      folds.fold_head_keep(z[0], words, head_at(state, stride), reinterpret_cast<uint16_t*>(rows.data), rows.ld,
                           kept.maxima(block, token));
    } else {
      folds.fold_head(z[0], words, head_at(state, stride));
      kept.store(block, token, words, z[0]);
    }
  }
};

// Folds nothing: the price of the products alone, for the benchmark.
struct NoFold : Fold {
  int fields() const override { return 1; }
  void start(float* state, int64_t, int64_t tokens) const override { std::fill_n(state, tokens, 0.0f); }
  void tile(float* const* z, int, float* state, int64_t, int64_t, int64_t) const override { state[0] = z[0][0]; }
  void merge(float*, const float*, int64_t, int64_t) const override {}
};

struct PairFold : Fold {
  const Folds& folds = *cpu_isa().folds;
  int fields() const override { return 9; }
  void start(float* state, int64_t stride, int64_t tokens) const override {
    for (int field = 0; field < fields(); field++)
      std::fill_n(state + field * stride, tokens, field == 0 || field == 3 ? kLowest : 0.0f);
  }
  void tile(float* const* z, int words, float* state, int64_t stride, int64_t, int64_t) const override {
    folds.fold_pair(z[0], z[1], words, pair_at(state, stride));
  }
  void merge(float* into, const float* from, int64_t stride, int64_t tokens) const override {
    folds.merge_pair(pair_at(into, stride), pair_at(readable(from), stride), tokens);
  }
};

struct MixtureFold : Fold {
  const Folds& folds = *cpu_isa().folds;
  std::vector<float> normalisers;  // [4][padded]
  int64_t padded;
  float beta;
  bool jsd, tv;

  MixtureFold(const at::Tensor& from, double b, bool with_jsd, bool with_tv)
      : padded(round_up(from.size(1), kTile)), beta(static_cast<float>(b)), jsd(with_jsd), tv(with_tv) {
    normalisers.assign(4 * padded, 0.0f);
    for (int64_t i = 0; i < 4; i++)
      std::copy_n(from.const_data_ptr<float>() + i * from.size(1), from.size(1), normalisers.begin() + i * padded);
  }
  int fields() const override { return 3; }
  void start(float* state, int64_t stride, int64_t tokens) const override {
    for (int field = 0; field < fields(); field++) std::fill_n(state + field * stride, tokens, 0.0f);
  }
  void tile(float* const* z, int words, float* state, int64_t stride, int64_t, int64_t token) const override {
    const float* at = normalisers.data() + token;
    folds.second_pass(z[0], z[1], words,
                      {at, at + padded, at + 2 * padded, at + 3 * padded, jsd ? state : nullptr,
                       tv ? state + stride : nullptr, jsd ? state + 2 * stride : nullptr, beta});
  }
  void merge(float* into, const float* from, int64_t stride, int64_t tokens) const override {
    for (int field = 0; field < fields(); field++)
      for (int64_t i = 0; i < tokens; i++) into[field * stride + i] += from[field * stride + i];
  }
};

}  // namespace

namespace {

at::Tensor head_walk(const std::vector<Head>& heads, const at::Tensor& like, const at::Tensor& targets,
                     const OptionalTensor& temperature, double softcap, const Fold& fold) {
  const int64_t n = heads[0].tokens();
  at::Tensor out = at::zeros({4, n}, like.options().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  walk(heads, TokenInputs(n, targets, temperature, softcap), fold, {data + 3 * n}, data);
  return out;
}

std::vector<Head> checked_head(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& rows, const at::Tensor& targets,
                               const OptionalTensor& temperature, double softcap) {
  check_head("", hidden, weight, bias, rows);
  const std::vector<Head> heads{{hidden, weight, bias, rows}};
  check_tokens("targets", targets, at::kLong, heads[0].tokens());
  check_shared(temperature, heads[0].tokens(), softcap);
  return heads;
}

}  // namespace

at::Tensor head_stats(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& rows, const at::Tensor& targets, const OptionalTensor& temperature,
                      double softcap) {
  const std::vector<Head> heads = checked_head(hidden, weight, bias, rows, targets, temperature, softcap);
  return head_walk(heads, hidden, targets, temperature, softcap, HeadFold());
}

std::tuple<at::Tensor, std::vector<at::Tensor>> head_stats_keep(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& rows,
    const at::Tensor& targets, const OptionalTensor& temperature, double softcap, bool weight_grad) {
  const std::vector<Head> heads = checked_head(hidden, weight, bias, rows, targets, temperature, softcap);
  const Kept kept(heads[0], weight, weight_grad, static_cast<float>(softcap));
  const KeepingFold fold(kept);
  const at::Tensor stats = head_walk(heads, hidden, targets, temperature, softcap, fold);
  if (!kept.tensors().empty())
    std::copy_n(stats.const_data_ptr<float>() + 3 * heads[0].tokens(), heads[0].tokens(), kept.target_logits());
  return {stats, kept.tensors()};
}

void bare_walk(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& teacher_hidden) {
  check_head("", hidden, weight, std::nullopt, std::nullopt);
  std::vector<Head> heads{{hidden, weight, std::nullopt, std::nullopt}};
  if (teacher_hidden) {
    check_head("teacher_", *teacher_hidden, weight, std::nullopt, std::nullopt);
    check_same_tokens_and_words(hidden, weight, *teacher_hidden, weight);
    heads.push_back({*teacher_hidden, weight, std::nullopt, std::nullopt});
  }
  const int64_t n = heads[0].tokens();
  std::vector<float> nothing(n);
  walk(heads, TokenInputs(n, std::nullopt, std::nullopt, 0), NoFold(), {}, nothing.data());
}

at::Tensor pair_stats(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                      const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight,
                      const OptionalTensor& teacher_bias, const OptionalTensor& rows, const at::Tensor& targets,
                      const OptionalTensor& temperature, double softcap) {
  const std::vector<Head> heads =
      checked_pair(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, rows);
  const int64_t n = heads[0].tokens();
  check_tokens("targets", targets, at::kLong, n);
  check_shared(temperature, n, softcap);
  at::Tensor found = at::zeros({2, n}, hidden.options().dtype(at::kFloat));
  at::Tensor folded = at::empty({9, n}, found.options());
  float* target = found.mutable_data_ptr<float>();
  walk(heads, TokenInputs(n, targets, temperature, softcap), PairFold(), {target, target + n},
       folded.mutable_data_ptr<float>());
  return at::cat({folded.slice(0, 0, 3), found.slice(0, 0, 1), folded.slice(0, 3, 6), found.slice(0, 1, 2),
                  folded.slice(0, 6, 9)});
}

at::Tensor mixture_stats(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                         const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight,
                         const OptionalTensor& teacher_bias, const OptionalTensor& rows, const at::Tensor& normalisers,
                         const OptionalTensor& temperature, double softcap, double beta, bool jsd, bool tv) {
  const std::vector<Head> heads =
      checked_pair(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, rows);
  const int64_t n = heads[0].tokens();
  check_matrix("normalisers", normalisers, 4, n);
  check_shared(temperature, n, softcap);
  TORCH_CHECK(beta >= 0 && beta <= 1, "beta is ", beta, ", needs a number in [0, 1]");
  at::Tensor out = at::empty({3, n}, normalisers.options());
  walk(heads, TokenInputs(n, std::nullopt, temperature, softcap), MixtureFold(normalisers, beta, jsd, tv), {},
       out.mutable_data_ptr<float>());
  return out;
}

}  // namespace sgcd
