#include "topk.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "isa.h"
#include "parallel.h"
#include "score.h"
#include "walk.h"

namespace sgcd {
namespace {

constexpr int64_t kTiles = 4;           // of tokens that share a block of words
constexpr int64_t kListBytes = 4 << 20;  // of a thread
constexpr int64_t kSegment = 32 * kTile;  // words that are summed apart before they join the others
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Entry {
  float q, p;
  int32_t word;
};

// Of equal logits the earlier word: so the list does not depend on the order in which words come.
bool better(const Entry& a, const Entry& b) { return a.q > b.q || (a.q == b.q && a.word < b.word); }

// The best entries of one token so far, the worst of them in front.
class List {
 public:
  explicit List(int64_t size) : size_(size) { heap_.reserve(size); }

  // What q must reach to be looked at; NaN lets everything pass.
  float limit() const { return full() ? heap_.front().q : std::numeric_limits<float>::quiet_NaN(); }
  const std::vector<Entry>& entries() const { return heap_; }

  // Take `e` in if it is good enough, and leave in it what it pushed out, or a word of probability 0.
  bool exchange(Entry& e) {
    Entry out{kNone, kNone, -1};
    if (full()) {
      if (!better(e, heap_.front())) return false;
      std::pop_heap(heap_.begin(), heap_.end(), better);
      out = heap_.back();
      heap_.pop_back();
    }
    heap_.push_back(e);
    std::push_heap(heap_.begin(), heap_.end(), better);
    e = out;
    return true;
  }

 private:
  bool full() const { return static_cast<int64_t>(heap_.size()) == size_; }

  int64_t size_;
  std::vector<Entry> heap_;
};

// Statistics of some tiles of tokens: of all words, and of the tails.
class Sums {
 public:
  explicit Sums(int64_t tokens) : tokens_(tokens), data_(15 * tokens) {}

  void start() {
    for (int64_t field = 0; field < 15; field++) {
      const bool maximum = field == 0 || field == 3 || field == 9 || field == 12;
      std::fill_n(row(field), tokens_, maximum ? kLowest : 0.0f);
    }
  }
  float* row(int64_t field) { return data_.data() + field * tokens_; }
  PairStats pair(int64_t at) { return pair_at(data_.data() + at, tokens_); }
  HeadStats tail(int64_t head, int64_t at) { return head_at(row(9 + 3 * head) + at, tokens_); }
  void merge(Sums& other, const Folds& folds) {
    folds.merge_pair(pair(0), other.pair(0), tokens_);
    for (int64_t head = 0; head < 2; head++) folds.merge_head(tail(head, 0), other.tail(head, 0), tokens_);
  }

 private:
  int64_t tokens_;
  std::vector<float> data_;
};

struct Output {
  at::Tensor stats, logits, words;
};

// Some tiles of tokens against the whole vocabulary.
class Batch {
 public:
  Batch(const std::vector<Head>& heads, const TokenInputs& inputs, int64_t first, int64_t tiles, int64_t k)
      : heads_(heads),
        inputs_(inputs),
        first_(first),
        tiles_(tiles),
        total_(tiles * kTile),
        segment_(tiles * kTile),
        lists_(tiles * kTile, List(k)),
        limits_(tiles * kTile, std::numeric_limits<float>::quiet_NaN()),
        targets_(2 * tiles * kTile, 0.0f),
        z_(2 * kTile * kTile) {
    for (const Head& head : heads) {
      packed_.emplace_back(head.token_tile_bytes() * tiles);
      words_.emplace_back(head.words_bytes(kTile));
      for (int64_t t = 0; t < tiles; t++)
        head.pack_token_tile(first + t * kTile, packed_.back().data() + t * head.token_tile_bytes());
    }
  }

  void run() {
    total_.start();
    const int64_t vocab = heads_[0].vocab();
    for (int64_t start = 0; start < vocab; start += kSegment) {
      segment_.start();
      for (int64_t word = start; word < std::min(start + kSegment, vocab); word += kTile) fold_words(word);
      total_.merge(segment_, folds_);
    }
  }

  void write(Output& out) {
    const int64_t n = out.stats.size(1), count = std::min(tiles_ * kTile, n - first_), k = out.words.size(1);
    const float* fields[15] = {total_.row(0), total_.row(1), total_.row(2),  targets_.data(), total_.row(3),
                               total_.row(4), total_.row(5), targets_.data() + tiles_ * kTile, total_.row(6),
                               total_.row(7), total_.row(8), total_.row(9),  total_.row(10),   total_.row(12),
                               total_.row(13)};
    for (int64_t field = 0; field < 15; field++)
      std::copy_n(fields[field], count, out.stats.mutable_data_ptr<float>() + field * n + first_);
    for (int64_t t = 0; t < count; t++) {
      int64_t at = (first_ + t) * k;
      for (const Entry& e : lists_[t].entries()) {
        out.logits.mutable_data_ptr<float>()[at] = e.p;
        out.logits.mutable_data_ptr<float>()[n * k + at] = e.q;
        out.words.mutable_data_ptr<int64_t>()[at++] = e.word;
      }
    }
  }

 private:
  void fold_words(int64_t word) {
    const int64_t count = std::min<int64_t>(kTile, heads_[0].vocab() - word);
    Words words[2];
    for (size_t h = 0; h < 2; h++) {
      const bool shared = h == 1 && heads_[1].same_weight(heads_[0]);
      words[h] = shared ? words[0] : heads_[h].words(word, count, words_[h].data());
    }
    for (int64_t tile = 0; tile < tiles_; tile++) fold_tile(words, word, static_cast<int>(count), tile);
  }

  void fold_tile(const Words* words, int64_t word, int count, int64_t tile) {
    const int64_t at = tile * kTile;
    float *z_p = z_.data(), *z_q = z_.data() + kTile * kTile, *z[2] = {z_p, z_q};
    for (size_t h = 0; h < 2; h++) {
      const Head& head = heads_[h];
      head.multiply_tile(words[h], 0, count, first_ + at, packed_[h].data() + tile * head.token_tile_bytes(), z[h]);
      folds_.finish(z[h], count, inputs_.finish(head, first_ + at, word));
    }
    folds_.fold_pair(z_p, z_q, count, segment_.pair(at));
    take_out(z_p, z_q, word, count, at);
    folds_.fold_head(z_p, count, segment_.tail(0, at));
    folds_.fold_head(z_q, count, segment_.tail(1, at));
  }

  // Leave in the tile what now belongs to the tails: words that entered a list change places with those that left it.
  void take_out(float* z_p, float* z_q, int64_t word, int count, int64_t at) {
    int32_t observed[kTile];
    for (int i = 0; i < kTile; i++) {
      const uint32_t local = static_cast<uint32_t>(inputs_.target[first_ + at + i] - word);
      observed[i] = local < static_cast<uint32_t>(count) ? static_cast<int32_t>(local) : -1;
      if (observed[i] < 0) continue;
      const int64_t cell = local * kTile + i;
      targets_[at + i] = z_p[cell];
      targets_[tiles_ * kTile + at + i] = z_q[cell];
      if (!exchange(z_p[cell], z_q[cell], word + local, at + i)) z_p[cell] = z_q[cell] = kNone;
    }
    for (int w = 0; w < count; w++) {
      float* q = z_q + w * kTile;
      int some = 0;
      for (int i = 0; i < kTile; i++) some |= !(q[i] < limits_[at + i]);
      for (int i = 0; some && i < kTile; i++)
        if (!(q[i] < limits_[at + i]) && observed[i] != w) exchange(z_p[w * kTile + i], q[i], word + w, at + i);
    }
  }

  bool exchange(float& p, float& q, int64_t word, int64_t token) {
    Entry e{q, p, static_cast<int32_t>(word)};
    if (!lists_[token].exchange(e)) return false;
    limits_[token] = lists_[token].limit();
    const bool observed = e.word == inputs_.target[first_ + token];  // a bucket of its own, not the tail
    p = observed ? kNone : e.p;
    q = observed ? kNone : e.q;
    return true;
  }

  const std::vector<Head>& heads_;
  const TokenInputs& inputs_;
  const Folds& folds_ = *cpu_isa().folds;
  int64_t first_, tiles_;
  Sums total_, segment_;
  std::vector<List> lists_;
  std::vector<float> limits_, targets_, z_;
  std::vector<std::vector<char>> packed_, words_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> pair_topk(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& teacher_hidden,
    const at::Tensor& teacher_weight, const OptionalTensor& teacher_bias, const OptionalTensor& rows,
    const at::Tensor& targets, const OptionalTensor& temperature, double softcap, int64_t k) {
  const std::vector<Head> heads =
      checked_pair(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, rows);
  const int64_t n = heads[0].tokens();
  check_tokens("targets", targets, at::kLong, n);
  check_shared(temperature, n, softcap);
  TORCH_CHECK_VALUE(k >= 1 && k <= heads[0].vocab(), "k is ", k, ", needs an integer in [1, ", heads[0].vocab(), "]");
  const TokenInputs inputs(n, targets, temperature, softcap);
  const auto floats = hidden.options().dtype(at::kFloat);
  Output out{at::empty({15, n}, floats), at::empty({2, n, k}, floats), at::empty({n, k}, targets.options())};
  const int64_t tiles = (n + kTile - 1) / kTile, threads = at::get_num_threads();
  int64_t batch = std::clamp<int64_t>(kListBytes / (kTile * k * static_cast<int64_t>(sizeof(Entry))), 1, kTiles);
  batch = std::min(batch, std::max<int64_t>(1, (tiles + threads - 1) / threads));
  share((tiles + batch - 1) / batch, [&](auto next) {
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t first = task * batch;
      Batch tokens(heads, inputs, first * kTile, std::min(batch, tiles - first), k);
      tokens.run();
      tokens.write(out);
    }
    release_multiplier();
  });
  return {out.stats, out.logits, out.words};
}

}  // namespace sgcd
