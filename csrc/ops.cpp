// The operators for Python, torch.ops.sgcd_kernels.*: their schemas, and the bundling of their arguments.
#include <torch/library.h>

#include <array>
#include <string>

#include "args.h"
#include "grad_ops.h"
#include "isa.h"
#include "spans.h"
#include "stats.h"
#include "topk.h"

namespace {

using at::Tensor;
using Optional = const sgcd::OptionalTensor&;

std::string cpu_isa() { return sgcd::cpu_isa().name; }

Tensor head_stats(const Tensor& hidden, const Tensor& weight, Optional bias, Optional rows, const Tensor& targets,
                  Optional temperature, double softcap) {
  return sgcd::head_stats({hidden, weight, bias, rows, temperature, softcap}, targets);
}

std::tuple<Tensor, std::vector<Tensor>> head_stats_cached(const Tensor& hidden, const Tensor& weight, Optional bias,
                                                          Optional rows, const Tensor& targets, Optional temperature,
                                                          double softcap, bool weight_grad) {
  return sgcd::head_stats_cached({hidden, weight, bias, rows, temperature, softcap}, targets, weight_grad);
}

Tensor pair_stats(const Tensor& hidden, const Tensor& weight, Optional bias, const Tensor& teacher_hidden,
                  const Tensor& teacher_weight, Optional teacher_bias, Optional rows, const Tensor& targets,
                  Optional temperature, double softcap) {
  return sgcd::pair_stats({{hidden, weight, bias, rows, temperature, softcap},
                           {teacher_hidden, teacher_weight, teacher_bias, rows, temperature, softcap}},
                          targets);
}

std::tuple<Tensor, Tensor, Tensor> pair_topk(const Tensor& hidden, const Tensor& weight, Optional bias,
                                             const Tensor& teacher_hidden, const Tensor& teacher_weight,
                                             Optional teacher_bias, Optional rows, const Tensor& targets,
                                             Optional temperature, double softcap, int64_t k) {
  return sgcd::pair_topk({{hidden, weight, bias, rows, temperature, softcap},
                          {teacher_hidden, teacher_weight, teacher_bias, rows, temperature, softcap}},
                         targets, k);
}

Tensor mixture_stats(const Tensor& hidden, const Tensor& weight, Optional bias, const Tensor& teacher_hidden,
                     const Tensor& teacher_weight, Optional teacher_bias, Optional rows, const Tensor& normalisers,
                     Optional temperature, double softcap, double beta, bool jsd, bool tv) {
  return sgcd::mixture_stats({{hidden, weight, bias, rows, temperature, softcap},
                              {teacher_hidden, teacher_weight, teacher_bias, rows, temperature, softcap}},
                             {normalisers, beta, jsd, tv});
}

sgcd::Grads logprob_grads(const Tensor& hidden, const Tensor& weight, Optional bias, Optional rows,
                          const Tensor& targets, Optional temperature, double softcap, const Tensor& lse,
                          Optional lse_low, const Tensor& scale, const Tensor& d_logp, Optional entropy,
                          Optional d_entropy, std::array<bool, 3> needs, bool hidden_grad_fp32,
                          std::vector<Tensor> cached) {
  return sgcd::logprob_grads({hidden, weight, bias, rows, temperature, softcap},
                             {targets, lse, lse_low, scale, d_logp, entropy, d_entropy},
                             {needs[0], needs[1], needs[2], hidden_grad_fp32}, std::move(cached));
}

sgcd::Grads distill_grads(const Tensor& hidden, const Tensor& weight, Optional bias, const Tensor& teacher_hidden,
                          const Tensor& teacher_weight, Optional teacher_bias, Optional rows, Optional temperature,
                          double softcap, const Tensor& lse, const Tensor& lse_low, const Tensor& teacher_lse,
                          const Tensor& teacher_lse_low, const Tensor& expected_log_ratio, const Tensor& d_loss,
                          double beta, int64_t kind, std::array<bool, 3> needs) {
  return sgcd::distill_grads({{hidden, weight, bias, rows, temperature, softcap},
                              {teacher_hidden, teacher_weight, teacher_bias, rows, temperature, softcap}},
                             {lse, lse_low, teacher_lse, teacher_lse_low, expected_log_ratio, d_loss, beta, kind},
                             {needs[0], needs[1], needs[2]});
}

}  // namespace

TORCH_LIBRARY(sgcd_kernels, m) {
  m.def("cpu_isa() -> str", cpu_isa);
  m.def(
      "head_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, Tensor? temperature, "
      "float softcap) -> Tensor");
  m.def(
      "head_stats_cached(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, "
      "Tensor? temperature, float softcap, bool weight_grad) -> (Tensor, Tensor[])");
  m.def(
      "pair_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
      "Tensor? teacher_bias, Tensor? rows, Tensor targets, Tensor? temperature, float softcap) -> Tensor");
  m.def(
      "pair_topk(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
      "Tensor? teacher_bias, Tensor? rows, Tensor targets, Tensor? temperature, float softcap, int k) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "mixture_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
      "Tensor? teacher_bias, Tensor? rows, Tensor normalisers, Tensor? temperature, float softcap, float beta, "
      "bool jsd, bool tv) -> Tensor");
  m.def(
      "logprob_grads(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, Tensor? temperature, "
      "float softcap, Tensor lse, Tensor? lse_low, Tensor scale, Tensor d_logp, Tensor? entropy, Tensor? d_entropy, "
      "bool[3] needs, "
      "bool hidden_grad_fp32, Tensor[] cached) -> (Tensor, Tensor, Tensor)");
  m.def(
      "distill_grads(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
      "Tensor? teacher_bias, Tensor? rows, Tensor? temperature, float softcap, Tensor lse, Tensor lse_low, "
      "Tensor teacher_lse, Tensor teacher_lse_low, Tensor expected_log_ratio, Tensor d_loss, float beta, int kind, "
      "bool[3] needs) -> (Tensor, Tensor, Tensor)");
  m.def(
      "find_spans(Tensor u, Tensor entropy, Tensor? turns, Tensor eligible, Tensor cu_seqlens, float start, "
      "float reset, int patience, float entropy_ratio, float entropy_margin) -> Tensor");
  m.def("order_statistics(Tensor x, Tensor eligible, Tensor cu_seqlens, Tensor low, Tensor high) -> Tensor");
}

TORCH_LIBRARY_IMPL(sgcd_kernels, CPU, m) {
  m.impl("head_stats", head_stats);
  m.impl("head_stats_cached", head_stats_cached);
  m.impl("pair_stats", pair_stats);
  m.impl("pair_topk", pair_topk);
  m.impl("mixture_stats", mixture_stats);
  m.impl("logprob_grads", logprob_grads);
  m.impl("distill_grads", distill_grads);
  m.impl("find_spans", sgcd::find_spans);
  m.impl("order_statistics", sgcd::order_statistics);
}
