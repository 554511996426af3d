// The mixture of two distributions: ratios to it, and the sums that need both normalisers first.
#pragma once

#include "tile_kernels.h"
#include "vec.h"

namespace sgcd {
namespace {

// ln(p / mixture) and ln(q / mixture) of the mixture beta q + (1 - beta) p. ln p - ln q is clamped at 80 nats: beyond
// that the smaller of p and q adds nothing to any sum. If both are 0 the ratios are not used.
inline void mixture_ratios(Vec log_p, Vec log_q, float beta, Vec& to_p, Vec& to_q) {
  const Vec infinity(-__builtin_inff());
  Vec delta = log_p - log_q;
  delta = where(equal(log_p, infinity), where(equal(log_q, infinity), Vec(0.0f), delta), delta);
  delta = max(Vec(-80.0f), min(Vec(80.0f), delta));
  to_p = Vec(0.0f) - log1p(Vec(beta) * expm1(Vec(0.0f) - delta));
  to_q = Vec(0.0f) - log1p(Vec(1.0f - beta) * expm1(delta));
}

void add_mixture(const float* z_p, const float* z_q, int count, const MixtureStats& sums) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z_p += Vec::width, z_q += Vec::width) {
    const Vec m_p = Vec::load(sums.m_p + i), log_l_p = Vec::load(sums.log_l_p + i);
    const Vec m_q = Vec::load(sums.m_q + i), log_l_q = Vec::load(sums.log_l_q + i);
    Vec jsd(0.0f), tv(0.0f), expected_log_ratio(0.0f);
    for (int v = 0; v < count; v++) {
      // Subtract m and ln l one by one: at large logits a rounded lse would cost digits.
      const Vec log_p = Vec::load(z_p + v * kTile) - m_p - log_l_p, log_q = Vec::load(z_q + v * kTile) - m_q - log_l_q;
      const Vec p = exp(log_p), q = exp(log_q);
      tv = tv + abs(p - q);
      if (sums.jsd || sums.expected_log_ratio) {
        Vec to_p, to_q;
        mixture_ratios(log_p, log_q, sums.beta, to_p, to_q);
        expected_log_ratio = expected_log_ratio + p * to_p;
        jsd = jsd + (Vec(1.0f - sums.beta) * (p * to_p) + Vec(sums.beta) * (q * to_q));
      }
    }
    if (sums.tv) accumulate(sums.tv + i, tv * Vec(0.5f));
    if (sums.jsd) accumulate(sums.jsd + i, jsd);
    if (sums.expected_log_ratio) accumulate(sums.expected_log_ratio + i, expected_log_ratio);
  }
}

}  // namespace
}  // namespace sgcd
