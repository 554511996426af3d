// The logit transform, + bias, softcap, / temperature, and its backward.
#pragma once

#include "tile_kernels.h"
#include "vec.h"

namespace sgcd {
namespace {

void transform_logits(float* z, int count, const LogitTransform& t) {
  if (!t.bias && t.softcap == 0 && !t.temperature) return;
  const Vec cap(t.softcap);
  for (int v = 0; v < count; v++) {
    const Vec bias(t.bias ? t.bias[v] : 0.0f);
    for (int i = 0; i < kTile; i += Vec::width) {
      Vec x = Vec::load(z + v * kTile + i) + bias;
      if (t.softcap != 0) x = cap * tanh(x / cap);
      if (t.temperature) x = x / Vec::load(t.temperature + i);
      x.store(z + v * kTile + i);
    }
  }
}

void transform_backward(float* dz, const float* z, int count, const LogitTransform& t) {
  if (t.softcap == 0 && !t.temperature) return;
  const Vec cap(t.softcap);
  for (int v = 0; v < count; v++) {
    for (int i = 0; i < kTile; i += Vec::width) {
      const Vec temperature = t.temperature ? Vec::load(t.temperature + i) : Vec(1.0f);
      Vec x = Vec::load(dz + v * kTile + i);
      if (t.softcap != 0) {
        const Vec y = Vec::load(z + v * kTile + i) * temperature / cap;
        x = x * (Vec(1.0f) - y * y);
      }
      (x / temperature).store(dz + v * kTile + i);
    }
  }
}

}  // namespace
}  // namespace sgcd
