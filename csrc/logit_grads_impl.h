// Gradients of the losses with respect to a tile of logits.
#pragma once

#include "bf16_impl.h"
#include "mixture_impl.h"
#include "tile_kernels.h"
#include "vec.h"

namespace sgcd {
namespace {

constexpr float kFloor = -1e4f;  // e^kFloor is 0, and 0 times it is 0 where 0 times -inf would be NaN

// z - (m + ln l), with the log-sum-exp in two numbers
inline Vec log_prob(const float* z, Vec lse, Vec lse_low) { return Vec::load(z) - lse - lse_low; }

// p (scale - d_entropy (ln p + entropy)); the caller sees to the target.
void logprob_grad(float* z, int count, const LogprobGrad& g) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z += Vec::width) {
    const Vec lse = Vec::load(g.lse + i), low = Vec::load(g.lse_low + i), scale = Vec::load(g.scale + i);
    const Vec entropy = g.d_entropy ? Vec::load(g.entropy + i) : Vec(0.0f);
    const Vec d_entropy = g.d_entropy ? Vec::load(g.d_entropy + i) : Vec(0.0f);
    for (int v = 0; v < count; v++) {
      const Vec log_p = max(Vec(kFloor), log_prob(z + v * kTile, lse, low)), p = exp(log_p);
      const Vec slope = g.d_entropy ? scale - d_entropy * (log_p + entropy) : scale;
      (p * slope).store(z + v * kTile);
    }
  }
}

void cached_logprob_grad(const uint16_t* e, int64_t ld, int count, const float* m, const LogprobGrad& g, float* dz) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width) {
    const Vec log_factor = log_prob(m + i, Vec::load(g.lse + i), Vec::load(g.lse_low + i));
    const Vec factor = exp(min(Vec(0.0f), log_factor)) * Vec::load(g.scale + i);
    for (int v = 0; v < count; v++) (load_bf16(e + v * ld + i) * factor).store(dz + v * kTile + i);
  }
}

void distill_grad(float* z_p, const float* z_q, int count, const DistillGrad& g) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z_p += Vec::width, z_q += Vec::width) {
    const Vec lse_p = Vec::load(g.lse_p + i), low_p = Vec::load(g.lse_p_low + i);
    const Vec lse_q = Vec::load(g.lse_q + i), low_q = Vec::load(g.lse_q_low + i);
    const Vec expected_log_ratio = Vec::load(g.expected_log_ratio + i), d_loss = Vec::load(g.d_loss + i);
    for (int v = 0; v < count; v++) {
      const Vec log_p = log_prob(z_p + v * kTile, lse_p, low_p), log_q = log_prob(z_q + v * kTile, lse_q, low_q);
      const Vec p = exp(log_p);
      Vec dz;
      if (g.kind == kForwardKl) {
        // Where one of them is near 1, p - q would lose 1 - p and 1 - q.
        const auto near_one = greater(max(log_p, log_q), Vec(-0.5f));
        dz = where(near_one, expm1(log_p) - expm1(log_q), p - exp(log_q));
      } else if (g.kind == kReverseKl) {
        const Vec gap = where(greater(p, Vec(0.0f)), log_p - log_q, Vec(0.0f));
        dz = p * (gap - expected_log_ratio);
        dz = where(equal(expected_log_ratio, Vec(__builtin_inff())), Vec(0.0f), dz);  // inf - inf is no gradient
      } else {
        Vec to_p, to_q;
        mixture_ratios(max(Vec(kFloor), log_p), log_q, g.beta, to_p, to_q);
        dz = p * (to_p - expected_log_ratio) * Vec(1.0f - g.beta);
      }
      (dz * d_loss).store(z_p + v * kTile);
    }
  }
}

}  // namespace
}  // namespace sgcd
