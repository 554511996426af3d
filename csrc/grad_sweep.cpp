#include "grad_sweep.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "grad_plan.h"
#include "grad_workspace.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace sgcd {
namespace {

constexpr int64_t kBatch = 2;  // tiles of tokens per task, which share the weight rows of a step

// Constants of a sweep.
struct Sweep {
  const std::vector<Head>& heads;
  const TokenInputs& inputs;
  const GradFormula& formula;
  const CachedTiles& cached;
  const GradNeeds needs;
  const WeightT weight_t;
  const GradPlan plan;

  const Head& head() const { return heads[0]; }
  Math math() const { return heads[0].math(); }
};

// The part of a call that is processed at one time: one vocab chunk and one group of tokens.
struct Part {
  int64_t vocab_id, vocab_count;
  int64_t token, tokens;

  int64_t tiles() const { return tokens / kTile; }
};

struct Results {
  at::Tensor weight, bias;
};

WeightT weight_t_of(Math math) {
  if (!has_transposed_products(math)) return WeightT::kTransposed;
  return math == Math::kFloat ? WeightT::kInPlace : WeightT::kInterleaved;
}

GradPlan plan_sweep(const std::vector<Head>& heads, GradNeeds needs, const CachedTiles& cached,
                    at::ScalarType hidden_type) {
  const Head& head = heads[0];
  int64_t packed_tile_bytes = 0;
  for (const Head& each : heads) packed_tile_bytes += each.packed_tile_bytes();
  return plan_grad({
      .tokens = head.tokens(),
      .vocab = head.vocab(),
      .width = head.width(),
      .depth = head.depth(),
      .element_size = element_size(head.math()),
      .hidden_grad_size = static_cast<int64_t>(at::elementSize(hidden_type)),
      .packed_tile_bytes = packed_tile_bytes,
      .cached_tokens = cached.tokens(),
      .weight_t = weight_t_of(head.math()),
      .needs_hidden = needs.hidden,
      .needs_weight = needs.weight,
      .needs_bias = needs.bias,
  });
}

// dZ at a vocab id of the chunk, the first of a block, and a token of the group: in the cached tile where there is one.
TileRows dz_rows(const Sweep& sweep, const GradWorkspace& workspace, const Part& part, int64_t offset, int64_t token) {
  const int64_t cached = std::clamp<int64_t>(sweep.cached.tokens() - part.token, 0, part.tokens);
  if (token < cached) return sweep.cached.rows((part.vocab_id + offset) / kTile, part.token + token);
  return workspace.dz(offset, token - cached);
}

void pack_tokens(const Sweep& sweep, const GradWorkspace& workspace, const Part& part) {
  parallel_tasks(part.tiles(), [&](auto next) {
    for (int64_t tile; (tile = next()) >= 0;) {
      const int64_t token = part.token + tile * kTile;
      for (size_t h = 0; h < sweep.heads.size(); h++)
        sweep.heads[h].pack_token_tile(token, workspace.packed_tile(h, tile));
      if (sweep.needs.weight) sweep.head().pack_token_rows(token, workspace.token_rows(tile), sweep.plan.group * kTile);
    }
  });
}

// Copy W^T of one block of the chunk that begins at `chunk`, if the products read a copy.
void copy_weight_t(const Sweep& sweep, const GradWorkspace& workspace, int64_t chunk, int64_t block) {
  const int64_t offset = block * kTile, vocab_id = chunk + offset;
  const int64_t count = std::min<int64_t>(kTile, sweep.head().vocab() - vocab_id);
  if (!workspace.copies_weight_t() || count <= 0) return;
  if (sweep.weight_t == WeightT::kInterleaved) {
    sweep.head().interleave_weight_rows(vocab_id, count, workspace.interleaved_weight(offset),
                                        workspace.interleaved_ld());
  } else {
    sweep.head().transpose_weight_rows(vocab_id, count, round_up(count, 2), workspace.transposed_weight(offset),
                                       workspace.transposed_ld());
  }
}

// One tile of a chunk: its first vocab id and token in the chunk and the group, and how many vocab ids it has.
struct Tile {
  int64_t offset, tile;
  int64_t count;
};

// dZ of a tile of z [3, kTile, kTile] scratch; `rows` are the weight's from `skip` rows before the tile on.
void compute_dz(const Sweep& sweep, const GradWorkspace& workspace, const Part& part, const Tile& at,
                const WeightRows* rows, int64_t skip, float* z) {
  const int64_t token = part.token + at.tile * kTile, vocab_id = part.vocab_id + at.offset;
  const bool cached = token < sweep.cached.tokens();
  const int count = static_cast<int>(at.count);
  float* logits = z + 2 * kTile * kTile;  // what the backward of a softcap reads
  if (cached && sweep.cached.holds_exponentials()) {
    sweep.formula.cached_to_grad(sweep.cached, z, count, vocab_id, token);
  } else {
    float* tiles[2] = {z, z + kTile * kTile};
    if (cached) {
      sweep.cached.load(vocab_id / kTile, token, count, z);
    } else {
      for (size_t h = 0; h < sweep.heads.size(); h++) {
        const Head& head = sweep.heads[h];
        head.multiply_tile(rows[h], skip, at.count, token, workspace.packed_tile(h, at.tile), tiles[h]);
        tile_kernels().transform_logits(tiles[h], count, sweep.inputs.transform(head, token, vocab_id));
      }
    }
    if (sweep.inputs.softcap != 0) std::memcpy(logits, z, at.count * kTile * sizeof(float));
    sweep.formula.logits_to_grad(tiles, count, vocab_id, token);
  }
  tile_kernels().transform_backward(z, logits, count, sweep.inputs.transform(sweep.head(), token, vocab_id));
}

void sum_over_tokens(const float* dz, int64_t count, float* out) {
  for (int64_t v = 0; v < count; v++) {
    float sums[8] = {};
    for (int i = 0; i < kTile; i++) sums[i % 8] += dz[v * kTile + i];
    out[v] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
}

// Store dZ of a tile for the products: packed in `packed_dz` for W^T dZ, and in rows for dZ X.
void store_dz(const Sweep& sweep, const GradWorkspace& workspace, const Part& part, const Tile& at, const float* dz,
              char* packed_dz) {
  const int count = static_cast<int>(at.count);
  const int64_t size = element_size(sweep.math());
  if (sweep.needs.bias) sum_over_tokens(dz, at.count, workspace.bias_grad_part(at.tile, at.offset));
  const TileRows rows = sweep.needs.weight ? dz_rows(sweep, workspace, part, at.offset, at.tile * kTile) : TileRows{};
  if (sweep.math() == Math::kBf16) {
    tile_kernels().round_tile(dz, count, reinterpret_cast<uint16_t*>(rows.data), rows.ld,
                              reinterpret_cast<uint16_t*>(packed_dz));
    return;
  }
  std::memcpy(packed_dz, dz, at.count * kTile * sizeof(float));
  for (int64_t v = 0; rows.data && v < at.count; v++)
    std::memcpy(rows.data + v * rows.ld * size, dz + v * kTile, kTile * sizeof(float));
}

// dX^T of a tile of tokens += W^T dZ of the `count` vocab ids of the chunk from `offset` on.
void add_hidden_grad(const Sweep& sweep, const GradWorkspace& workspace, const Part& part, int64_t split, int64_t tile,
                     int64_t offset, int64_t count, const WeightRows& rows, const char* packed_dz) {
  const Math math = sweep.math();
  const int64_t width = sweep.head().width(), depth = math == Math::kBf16 ? round_up(count, 2) : count;
  const int64_t live = sweep.head().live_columns(part.token + tile * kTile);
  float* sum = workspace.hidden_grad(split, part.token / kTile + tile);
  if (sweep.weight_t == WeightT::kInPlace) {
    multiply_transposed(math, width, live, depth, rows.data, rows.ld, packed_dz, kTile, sum, kTile, true);
    return;
  }
  if (sweep.weight_t == WeightT::kInterleaved) {
    multiply_transposed(math, width, live, depth, workspace.interleaved_weight(offset), workspace.interleaved_ld(),
                        packed_dz, kTile, sum, kTile, true);
    return;
  }
  const char* weight_t = workspace.transposed_weight(offset);
  const int64_t ld = workspace.transposed_ld();
  for (int64_t h = 0; h < width; h += kTile)
    multiply(math, std::min<int64_t>(kTile, width - h), live, depth, weight_t + h * ld * element_size(math), ld,
             packed_dz, kTile, sum + h * kTile, kTile, true);
}

// The first step: dZ of a chunk and a group, and its contribution to hidden's gradient.
void sweep_tokens(const Sweep& sweep, const GradWorkspace& workspace, const Part& part) {
  const int64_t tiles = part.tiles(), threads = at::get_num_threads(), step = sweep.plan.step;
  const int64_t splits = sweep.plan.vocab_splits, steps = ceil_div(part.vocab_count, step);
  const int64_t batch = std::clamp<int64_t>(tiles * splits / (4 * threads), 1, kBatch);
  const int64_t batches = ceil_div(tiles, batch);
  const bool reads_weight =
      (sweep.weight_t == WeightT::kInPlace && sweep.needs.hidden) || part.token + part.tokens > sweep.cached.tokens();
  const int64_t row_bytes = kTile * element_size(sweep.math());  // of dZ
  parallel_tasks(batches * splits, [&](auto next) {
    const at::Tensor z = at::empty({3, kTile, kTile}, at::kFloat);
    const at::Tensor packed_dz = allocate_bytes(step * row_bytes);
    std::vector<at::Tensor> scratch;
    scratch.reserve(sweep.heads.size());
    for (const Head& head : sweep.heads) scratch.push_back(allocate_bytes(head.weight_rows_bytes(step)));
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t split = task / batches, first = task % batches * batch;
      const int64_t end = std::min((split + 1) * steps / splits * step, part.vocab_count);
      for (int64_t start = split * steps / splits * step; start < end; start += step) {
        const int64_t stop = std::min(start + step, part.vocab_count);
        WeightRows rows[2];
        for (size_t h = 0; h < sweep.heads.size() && reads_weight; h++)
          rows[h] = sweep.heads[h].weight_rows(part.vocab_id + start, stop - start, bytes_of(scratch[h]));
        for (int64_t tile = first; tile < std::min(first + batch, tiles); tile++) {
          for (int64_t offset = start; offset < stop; offset += kTile) {
            const Tile at{offset, tile, std::min<int64_t>(kTile, stop - offset)};
            float* dz = z.mutable_data_ptr<float>();
            compute_dz(sweep, workspace, part, at, rows, offset - start, dz);
            store_dz(sweep, workspace, part, at, dz, bytes_of(packed_dz) + (offset - start) * row_bytes);
          }
          if (sweep.needs.hidden)
            add_hidden_grad(sweep, workspace, part, split, tile, start, stop - start, rows[0], bytes_of(packed_dz));
        }
      }
    }
    release_multiplier();
  });
}

// Round dW [count, padded H] into the weight's gradient.
void write_weight_grad(const Sweep& sweep, const float* sum, int64_t vocab_id, int64_t count, const at::Tensor& out) {
  const int64_t width = sweep.head().width();
  for (int64_t v = vocab_id; v < vocab_id + count; v++, sum += sweep.plan.padded_width) {
    if (out.scalar_type() == at::kBFloat16) {
      tile_kernels().round_row(sum, width, static_cast<uint16_t*>(out.mutable_data_ptr()) + v * width);
    } else {
      std::memcpy(out.mutable_data_ptr<float>() + v * width, sum, width * sizeof(float));
    }
  }
}

// dW [count, padded H] (+)= dZ X over the group's tokens.
void add_weight_grad(const Sweep& sweep, const GradWorkspace& workspace, const Part& part, int64_t offset,
                     int64_t count, float* sum) {
  const int64_t columns = sweep.plan.padded_width;
  const int64_t live = std::min(part.tokens, round_up(sweep.head().tokens() - part.token, 2));  // dZ of others is 0
  for (int64_t t = 0, depth; t < live; t += depth) {
    const TileRows rows = dz_rows(sweep, workspace, part, offset, t);
    depth = std::min({kDzTokens, rows.tokens, live - t});
    for (int64_t c = 0; c < columns; c += kTile)
      multiply(sweep.math(), count, kTile, depth, rows.data, rows.ld, workspace.token_rows(t, c), kTile, sum + c,
               columns, part.token + t > 0);
  }
}

void add_bias_grad(const GradWorkspace& workspace, const Part& part, int64_t offset, int64_t count, float* out) {
  for (int64_t tile = 0; tile < part.tiles(); tile++) {
    const float* part_sum = workspace.bias_grad_part(tile, offset);
    for (int64_t v = 0; v < count; v++) out[v] += part_sum[v];
  }
}

// The second step: the contribution of dZ of a chunk and a group to the gradients of weight and bias. After a chunk's
// last group its W^T is no longer needed, and the next chunk's is copied here, which saves a barrier.
void sweep_vocab(const Sweep& sweep, const GradWorkspace& workspace, const Part& part, const Results& results) {
  const bool last = part.token + part.tokens >= sweep.plan.padded_tokens;
  if (!sweep.needs.weight && !sweep.needs.bias && !last) return;
  parallel_tasks(ceil_div(part.vocab_count, kTile), [&](auto next) {
    at::Tensor own;  // sums of a thread, if they need not persist between groups
    if (sweep.needs.weight && !workspace.has_weight_grad_sums())
      own = at::empty({kTile, sweep.plan.padded_width}, at::kFloat);
    for (int64_t block; (block = next()) >= 0;) {
      const int64_t offset = block * kTile, count = std::min<int64_t>(kTile, part.vocab_count - offset);
      if (last) copy_weight_t(sweep, workspace, part.vocab_id + sweep.plan.chunk, block);
      if (sweep.needs.bias)
        add_bias_grad(workspace, part, offset, count, results.bias.mutable_data_ptr<float>() + part.vocab_id + offset);
      if (!sweep.needs.weight) continue;
      float* sum = own.defined() ? own.mutable_data_ptr<float>() : workspace.weight_grad_sum(offset);
      add_weight_grad(sweep, workspace, part, offset, count, sum);
      if (last) write_weight_grad(sweep, sum, part.vocab_id + offset, count, results.weight);
    }
    release_multiplier();
  });
}

void sweep_all(const Sweep& sweep, const GradWorkspace& workspace, const Results& results) {
  const GradPlan& plan = sweep.plan;
  const int64_t vocab = sweep.head().vocab();
  parallel_tasks(ceil_div(std::min(plan.chunk, vocab), kTile), [&](auto next) {
    for (int64_t block; (block = next()) >= 0;) copy_weight_t(sweep, workspace, 0, block);
  });
  for (int64_t vocab_id = 0; vocab_id < vocab; vocab_id += plan.chunk) {
    for (int64_t token = 0; token < plan.padded_tokens; token += plan.group) {
      const Part part{.vocab_id = vocab_id,
                      .vocab_count = std::min(plan.chunk, vocab - vocab_id),
                      .token = token,
                      .tokens = std::min(plan.group, plan.padded_tokens - token)};
      if (vocab_id == 0 || !plan.one_group()) pack_tokens(sweep, workspace, part);
      sweep_tokens(sweep, workspace, part);
      sweep_vocab(sweep, workspace, part, results);
    }
  }
}

// Hidden's gradient, from dX^T [splits, tiles, H, kTile], which is overwritten.
template <class Out>
void write_hidden_grad(const Sweep& sweep, const GradWorkspace& workspace, Out* out) {
  const int64_t n = sweep.head().tokens(), width = sweep.head().width();
  parallel_tasks(ceil_div(n, kTile), [&](auto next) {
    for (int64_t tile; (tile = next()) >= 0;) {
      float* sum = workspace.hidden_grad(0, tile);
      for (int64_t split = 1; split < sweep.plan.vocab_splits; split++) {
        const float* more = workspace.hidden_grad(split, tile);
        for (int64_t i = 0; i < width * kTile; i++) sum[i] += more[i];
      }
      for (int64_t t = 0; t < std::min<int64_t>(kTile, n - tile * kTile); t++) {
        Out* row = out + (tile * kTile + t) * width;
        for (int64_t k = 0; k < width; k++) row[k] = sum[k * kTile + t];
      }
    }
  });
}

at::Tensor hidden_grad(const Sweep& sweep, const GradWorkspace& workspace, at::ScalarType type) {
  at::Tensor out = allocate({sweep.head().tokens(), sweep.head().width()}, type);
  if (type == at::kBFloat16) {
    write_hidden_grad(sweep, workspace, out.mutable_data_ptr<at::BFloat16>());
  } else {
    write_hidden_grad(sweep, workspace, out.mutable_data_ptr<float>());
  }
  return out;
}

Grads no_tokens(const HeadArgs& args, GradNeeds needs, at::ScalarType hidden_type) {
  const auto zeros = [&](bool need, at::IntArrayRef sizes, at::ScalarType type) {
    return need ? at::zeros(sizes, args.hidden.options().dtype(type)) : at::Tensor();
  };
  return {zeros(needs.hidden, {0, args.weight.size(1)}, hidden_type),
          zeros(needs.weight, args.weight.sizes(), grad_type(args.weight)),
          zeros(needs.bias, {args.weight.size(0)}, at::kFloat)};
}

}  // namespace

void GradFormula::cached_to_grad(const CachedTiles&, float*, int, int64_t, int64_t) const {
  TORCH_INTERNAL_ASSERT(false, "this formula has no gradient of cached tiles");
}

Grads grad_sweep(const std::vector<Head>& heads, const HeadArgs& args, const TokenInputs& inputs,
                 const GradFormula& formula, GradNeeds needs, const CachedTiles& cached) {
  const at::ScalarType hidden_type = needs.hidden_fp32 ? at::kFloat : grad_type(args.hidden);
  if (heads[0].tokens() == 0) return no_tokens(args, needs, hidden_type);
  const Sweep sweep{.heads = heads,
                    .inputs = inputs,
                    .formula = formula,
                    .cached = cached,
                    .needs = needs,
                    .weight_t = weight_t_of(heads[0].math()),
                    .plan = plan_sweep(heads, needs, cached, hidden_type)};
  Results results;
  if (needs.weight) {
    const auto options = args.weight.options().dtype(grad_type(args.weight));
    results.weight = cached.tokens() ? cached.weight_grad() : allocate(args.weight.sizes(), options);
  }
  if (needs.bias) results.bias = at::zeros({heads[0].vocab()}, at::kFloat);
  GradWorkspace workspace(heads, sweep.plan, needs);
  sweep_all(sweep, workspace, results);
  workspace.release_buffers();  // to make room for hidden's gradient
  return {needs.hidden ? hidden_grad(sweep, workspace, hidden_type) : at::Tensor(), results.weight, results.bias};
}

}  // namespace sgcd
