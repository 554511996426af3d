#include "topk.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "isa.h"
#include "parallel.h"
#include "stats.h"
#include "token_inputs.h"

namespace sgcd {
namespace {

constexpr int64_t kTiles = 4;             // of tokens that share a block of weight rows
constexpr int64_t kListBytes = 4 << 20;   // of a thread
constexpr int64_t kSegment = 32 * kTile;  // vocab ids that are summed apart before they join the others
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Entry {
  float q, p;  // the teacher's and the student's logit
  int32_t vocab_id;
};

// Of equal logits the lower id: so the list does not depend on the order in which entries come.
bool better(const Entry& a, const Entry& b) { return a.q > b.q || (a.q == b.q && a.vocab_id < b.vocab_id); }

// The best entries of one token so far, as a heap with the worst of them in front.
class TopList {
 public:
  explicit TopList(int64_t size) : size_(size) { heap_.reserve(size); }

  // What q must reach to be considered; NaN lets everything pass.
  float limit() const { return full() ? heap_.front().q : std::numeric_limits<float>::quiet_NaN(); }
  const std::vector<Entry>& entries() const { return heap_; }

  // Insert `entry` if it is good enough, and replace it by what it displaced, or by an entry of probability 0.
  bool exchange(Entry& entry) {
    Entry out{kNone, kNone, -1};
    if (full()) {
      if (!better(entry, heap_.front())) return false;
      std::pop_heap(heap_.begin(), heap_.end(), better);
      out = heap_.back();
      heap_.pop_back();
    }
    heap_.push_back(entry);
    std::push_heap(heap_.begin(), heap_.end(), better);
    entry = out;
    return true;
  }

 private:
  bool full() const { return static_cast<int64_t>(heap_.size()) == size_; }

  int64_t size_;
  std::vector<Entry> heap_;
};

// Statistics of some tiles of tokens, in arrays one after the other: nine of all vocab ids, then three of each tail.
class Statistics {
 public:
  explicit Statistics(int64_t tokens) : tokens_(tokens), data_(kArrays * tokens) {}

  void init() {
    std::fill(data_.begin(), data_.end(), 0.0f);
    for (const HeadStats& stats : {pair(0).p, pair(0).q, student_tail(0), teacher_tail(0)}) clear(stats, tokens_);
  }
  PairStats pair(int64_t token) { return pair_stats_at(data_.data() + token, tokens_); }
  HeadStats student_tail(int64_t token) { return head_stats_at(data_.data() + 9 * tokens_ + token, tokens_); }
  HeadStats teacher_tail(int64_t token) { return head_stats_at(data_.data() + 12 * tokens_ + token, tokens_); }
  void merge(Statistics& other) {
    tile_kernels().merge_pair(pair(0), other.pair(0), tokens_);
    tile_kernels().merge_head(student_tail(0), other.student_tail(0), tokens_);
    tile_kernels().merge_head(teacher_tail(0), other.teacher_tail(0), tokens_);
  }

 private:
  static constexpr int64_t kArrays = 15;
  int64_t tokens_;
  std::vector<float> data_;
};

struct Output {
  at::Tensor stats, logits, vocab_ids;
};

// Some tiles of tokens against the whole vocabulary.
class TokenBatch {
 public:
  TokenBatch(const std::vector<Head>& heads, const TokenInputs& inputs, int64_t first, int64_t tiles, int64_t k)
      : heads_(heads),
        inputs_(inputs),
        first_(first),
        tiles_(tiles),
        total_(tiles * kTile),
        segment_(tiles * kTile),
        lists_(tiles * kTile, TopList(k)),
        limits_(tiles * kTile, std::numeric_limits<float>::quiet_NaN()),
        target_p_(tiles * kTile, 0.0f),
        target_q_(tiles * kTile, 0.0f),
        z_p_(kTile * kTile),
        z_q_(kTile * kTile) {
    for (const Head& head : heads) {
      packed_.emplace_back(head.packed_tile_bytes() * tiles);
      scratch_.emplace_back(head.weight_rows_bytes(kTile));
      for (int64_t t = 0; t < tiles; t++)
        head.pack_token_tile(first + t * kTile, packed_.back().data() + t * head.packed_tile_bytes());
    }
  }

  void sweep() {
    total_.init();
    const int64_t vocab = heads_[0].vocab();
    for (int64_t start = 0; start < vocab; start += kSegment) {
      segment_.init();
      const int64_t stop = std::min(start + kSegment, vocab);
      for (int64_t vocab_id = start; vocab_id < stop; vocab_id += kTile) sweep_block(vocab_id);
      total_.merge(segment_);
    }
  }

  void write(Output& out) {
    const int64_t n = out.stats.size(1), k = out.vocab_ids.size(1);
    const int64_t count = std::min(tiles_ * kTile, n - first_);
    const PairStats all = total_.pair(0);
    const HeadStats tail_p = total_.student_tail(0), tail_q = total_.teacher_tail(0);
    const float* fields[] = {all.p.m,     all.p.rest, all.p.s,          target_p_.data(), all.q.m,
                             all.q.rest,  all.q.s,    target_q_.data(), all.a_p,          all.a_q,
                             all.overlap, tail_p.m,   tail_p.rest,      tail_q.m,         tail_q.rest};
    float* stats = out.stats.mutable_data_ptr<float>() + first_;
    for (const float* field : fields) {
      std::copy_n(field, count, stats);
      stats += n;
    }
    float* logits = out.logits.mutable_data_ptr<float>();
    int64_t* vocab_ids = out.vocab_ids.mutable_data_ptr<int64_t>();
    for (int64_t t = 0; t < count; t++) {
      int64_t at = (first_ + t) * k;
      for (const Entry& e : lists_[t].entries()) {
        logits[at] = e.p;
        logits[n * k + at] = e.q;
        vocab_ids[at++] = e.vocab_id;
      }
    }
  }

 private:
  void sweep_block(int64_t vocab_id) {
    const int64_t count = std::min<int64_t>(kTile, heads_[0].vocab() - vocab_id);
    WeightRows rows[2];
    for (size_t h = 0; h < 2; h++) {
      const bool shared = h == 1 && heads_[1].same_weight(heads_[0]);
      rows[h] = shared ? rows[0] : heads_[h].weight_rows(vocab_id, count, scratch_[h].data());
    }
    for (int64_t tile = 0; tile < tiles_; tile++) update_tile(rows, vocab_id, static_cast<int>(count), tile);
  }

  void update_tile(const WeightRows* rows, int64_t vocab_id, int count, int64_t tile) {
    const int64_t local = tile * kTile, token = first_ + local;
    float* z[2] = {z_p_.data(), z_q_.data()};
    for (size_t h = 0; h < 2; h++) {
      const Head& head = heads_[h];
      head.multiply_tile(rows[h], 0, count, token, packed_[h].data() + tile * head.packed_tile_bytes(), z[h]);
      tile_kernels().transform_logits(z[h], count, inputs_.transform(head, token, vocab_id));
    }
    tile_kernels().update_pair(z[0], z[1], count, segment_.pair(local));
    leave_tails(vocab_id, count, local);
    tile_kernels().update_head(z[0], count, segment_.student_tail(local));
    tile_kernels().update_head(z[1], count, segment_.teacher_tail(local));
  }

  // Leave in the tile what now belongs to the tails: entries that enter a list change places with those that leave it.
  void leave_tails(int64_t vocab_id, int count, int64_t token) {
    int32_t target_row[kTile];  // in the tile, or -1
    for (int i = 0; i < kTile; i++) {
      const uint32_t row = static_cast<uint32_t>(inputs_.target[first_ + token + i] - vocab_id);
      target_row[i] = row < static_cast<uint32_t>(count) ? static_cast<int32_t>(row) : -1;
      if (target_row[i] < 0) continue;
      float &p = z_p_[row * kTile + i], &q = z_q_[row * kTile + i];
      target_p_[token + i] = p;
      target_q_[token + i] = q;
      if (!exchange(p, q, vocab_id + row, token + i)) p = q = kNone;
    }
    for (int v = 0; v < count; v++) {
      float *p = z_p_.data() + v * kTile, *q = z_q_.data() + v * kTile;
      const float* limits = limits_.data() + token;
      int some = 0;
      for (int i = 0; i < kTile; i++) some |= !(q[i] < limits[i]);
      for (int i = 0; some && i < kTile; i++) {
        if (!(q[i] < limits[i]) && target_row[i] != v) exchange(p[i], q[i], vocab_id + v, token + i);
      }
    }
  }

  bool exchange(float& p, float& q, int64_t vocab_id, int64_t token) {
    Entry entry{q, p, static_cast<int32_t>(vocab_id)};
    if (!lists_[token].exchange(entry)) return false;
    limits_[token] = lists_[token].limit();
    const bool is_target = entry.vocab_id == inputs_.target[first_ + token];  // a bucket of its own, not the tail
    p = is_target ? kNone : entry.p;
    q = is_target ? kNone : entry.q;
    return true;
  }

  const std::vector<Head>& heads_;
  const TokenInputs& inputs_;
  int64_t first_, tiles_;
  Statistics total_, segment_;
  std::vector<TopList> lists_;
  std::vector<float> limits_, target_p_, target_q_, z_p_, z_q_;
  std::vector<std::vector<char>> packed_, scratch_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> pair_topk(const PairArgs& args, const at::Tensor& targets, int64_t k) {
  const std::vector<Head> heads = checked_heads(args);
  const int64_t n = heads[0].tokens();
  check_tokens("targets", targets, at::kLong, n);
  check_transform(args.student, n);
  TORCH_CHECK_VALUE(k >= 1 && k <= heads[0].vocab(), "k is ", k, ", needs an integer in [1, ", heads[0].vocab(), "]");
  const TokenInputs inputs(n, targets, args.student);
  const auto floats = args.student.hidden.options().dtype(at::kFloat);
  Output out{at::empty({15, n}, floats), at::empty({2, n, k}, floats), at::empty({n, k}, targets.options())};
  const int64_t tiles = ceil_div(n, kTile), threads = at::get_num_threads();
  int64_t batch = std::clamp<int64_t>(kListBytes / (kTile * k * static_cast<int64_t>(sizeof(Entry))), 1, kTiles);
  batch = std::min(batch, std::max<int64_t>(1, ceil_div(tiles, threads)));
  parallel_tasks(ceil_div(tiles, batch), [&](auto next) {
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t first = task * batch;
      TokenBatch tokens(heads, inputs, first * kTile, std::min(batch, tiles - first), k);
      tokens.sweep();
      tokens.write(out);
    }
    release_multiplier();
  });
  return {out.stats, out.logits, out.vocab_ids};
}

}  // namespace sgcd
