// The table of tile kernels for whatever `Vec` is here. Included once by each tile_kernels_<isa>.cpp, which defines
// SGCD_TILE_KERNELS, the name of the function that gives it, and SGCD_NAME.
#pragma once

#include "bf16_impl.h"
#include "logit_grads_impl.h"
#include "logit_transform_impl.h"
#include "mixture_impl.h"
#include "online_softmax_impl.h"
#include "tile_kernels.h"

namespace sgcd {
namespace {

constexpr TileKernels kTileKernels{
    .name = SGCD_NAME,
    .transform_logits = transform_logits,
    .transform_backward = transform_backward,
    .update_head = update_head,
    .update_pair = update_pair,
    .update_head_and_cache = update_head_and_cache,
    .merge_head = merge_head,
    .merge_pair = merge_pair,
    .add_mixture = add_mixture,
    .logprob_grad = logprob_grad,
    .distill_grad = distill_grad,
    .cached_logprob_grad = cached_logprob_grad,
    .round_tile = round_tile,
    .round_row = round_row,
};

}  // namespace

const TileKernels* SGCD_TILE_KERNELS() { return &kTileKernels; }

}  // namespace sgcd
