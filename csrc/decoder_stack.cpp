#define FEWBITS_ISA portable
#include "decoder_stack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>

#include "decoder_parts.h"
#include "reader.h"
#include "room.h"
#include "runtime.h"

namespace fewbits {
namespace {

int64_t whole(int64_t bytes) { return whole_lines((bytes + 3) / 4); }  // floats

int64_t pieces_of(int64_t tokens) { return (tokens + piece_tokens - 1) / piece_tokens; }

// Attention of one token under one layer: a task is a head of keys and a piece of the tokens. Its queries are turned by each that reads them, the
// new key by the one that has the last piece; who is the last of a head's pieces joins them.
class LayerAttention {
 public:
  LayerAttention(const AttentionKernels& kernels, const DecoderLayer& layer, float scale, int64_t pieces, int threads)
      : kernels_(kernels), layer_(layer), pieces_(pieces), share_(layer.heads / layer.key_heads), arrived_(static_cast<size_t>(layer.key_heads)), own_(static_cast<size_t>(threads)) {
    for (Attention& own : own_) {
      own = Attention{};
      own.sequences = own.heads = own.queries = 1;
      own.share = share_;
      own.width = layer.width;
      own.number = layer.number;
      own.scale = scale;
      own.keys = own.values = {{Segment{0, nullptr, nullptr, layer.number, layer.width, 0}}};
    }
    scratch_each_ = whole_lines(kernels_.scratch_floats(own_[0]));
    query_each_ = whole(share_ * layer.width * size_of(layer.number));
    partial_each_ = whole_lines(share_ * (2 + layer.width));
  }

  int64_t floats() const { return (scratch_each_ + query_each_) * static_cast<int64_t>(own_.size()) + partial_each_ * pieces_ * layer_.key_heads; }

  void add_stage(std::vector<Stage>& stages, const Token& token, const Kept& kept, const BeforeAttention& before, void* attended, float* room) {
    stages.push_back({layer_.key_heads * pieces_, [=, &token, &kept](int64_t task, int worker) {
      const int64_t head = task / pieces_, piece = task % pieces_;
      float* own = room + worker * (scratch_each_ + query_each_);
      float* partials = room + static_cast<int64_t>(own_.size()) * (scratch_each_ + query_each_) + head * pieces_ * partial_each_;
      void* query = own + scratch_each_;
      turn_queries(before, token, head, query);
      if (piece == pieces_ - 1) append(before, token, kept, head);
      attend(token, kept, head, piece, query, partials, own, worker);
      std::atomic<int64_t>& arrived = arrived_[static_cast<size_t>(head)].pieces;
      if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < pieces_) return;
      arrived.store(0, std::memory_order_relaxed);  // for the next token
      Attention& job = own_[static_cast<size_t>(worker)];
      job.output = static_cast<char*>(attended) + head * share_ * layer_.width * size_of(layer_.number);
      kernels_.merge(job, 0, 0, partials, partial_each_, pieces_);
    }});
  }

 private:
  struct Count {
    std::atomic<int64_t> pieces{0};
  };

  void turn_queries(const BeforeAttention& before, const Token& token, int64_t head, void* query) const {
    const int64_t numbers = share_ * layer_.width, bytes = numbers * size_of(layer_.number);
    std::memcpy(query, static_cast<const char*>(before.query) + head * bytes, static_cast<size_t>(bytes));
    for_number(layer_.number, [&](auto type) {
      for (int64_t at = 0; at < numbers; at += layer_.width) {
        if (layer_.of_queries) normalize(type, *layer_.of_queries, query, query, at);
        rotate_head(type, query, at, token.cosine, token.sine, 0, layer_.width);
      }
    });
  }

  void append(const BeforeAttention& before, const Token& token, const Kept& kept, int64_t head) const {
    for_number(layer_.number, [&](auto type) {
      if (layer_.of_keys) normalize(type, *layer_.of_keys, before.key, before.key, head * layer_.width);
      rotate_head(type, before.key, head * layer_.width, token.cosine, token.sine, 0, layer_.width);
    });
    const int64_t bytes = layer_.width * size_of(layer_.number), to = (head * kept.room + token.before) * bytes;
    std::memcpy(static_cast<char*>(kept.keys) + to, static_cast<const char*>(before.key) + head * bytes, static_cast<size_t>(bytes));
    std::memcpy(static_cast<char*>(kept.values) + to, static_cast<const char*>(before.value) + head * bytes, static_cast<size_t>(bytes));
  }

  void attend(const Token& token, const Kept& kept, int64_t head, int64_t piece, const void* query, float* partials, float* scratch, int worker) {
    Attention& job = own_[static_cast<size_t>(worker)];
    const int64_t first = piece * piece_tokens, from = head * kept.room * layer_.width * size_of(layer_.number);
    job.query = query;
    job.tokens = token.before + 1;
    Segment &keys = job.keys[0][0], &values = job.values[0][0];
    keys.tokens = values.tokens = job.tokens;
    keys.plain = static_cast<const char*>(kept.keys) + from;
    values.plain = static_cast<const char*>(kept.values) + from;
    kernels_.attend(job, {0, &keys, first, first, std::min(piece_tokens, job.tokens - first)}, partials + piece * partial_each_, scratch);
  }

  const AttentionKernels& kernels_;
  const DecoderLayer& layer_;
  const int64_t pieces_, share_;
  int64_t scratch_each_ = 0, query_each_ = 0, partial_each_ = 0;
  std::vector<Count> arrived_;
  std::vector<Attention> own_;  // of each thread
};

}  // namespace

// Stages and the memory between them, for tokens of as many pieces.
class Stack::Plan {
 public:
  Plan(const std::string& isa, const Stack& stack, int64_t pieces, int threads, int digits)
      : isa_(isa), pieces_(pieces), threads_(threads), digits_(digits), kept_(stack.layers_.size()) {
    const Kernels& kernels = find_kernels(isa);
    const AttentionKernels& attention = find_attention(isa);
    int64_t most = 0;
    for (const DecoderLayer* layer : stack.layers_) {
      before_.emplace_back(kernels, *layer, 1, threads, digits);
      after_.emplace_back(kernels, *layer, 1, threads, digits);
      attention_.emplace_back(attention, *layer, stack.scale_, pieces, threads);
      most = std::max({most, before_.back().floats(), after_.back().floats(), attention_.back().floats()});
    }
    place(stack, most);
  }

  bool serves(const std::string& isa, int64_t pieces, int threads, int digits) const {
    return isa == isa_ && pieces == pieces_ && threads == threads_ && digits == digits_;
  }

  void run(const Token& token, const std::vector<Kept>& kept, int64_t bytes) {
    token_ = token;
    kept_ = kept;
    std::memcpy(states_, token.states, static_cast<size_t>(bytes));
    run_stages(threads_, stages_);
    if (!normed_) std::memcpy(token.outputs, states_, static_cast<size_t>(bytes));
    for (const BeforePart& part : before_) part.check();
    for (const AfterPart& part : after_) part.check();
  }

 private:
  void place(const Stack& stack, int64_t most) {
    const DecoderLayer& first = *stack.layers_[0];
    int64_t queries = 0, keys = 0;
    for (const DecoderLayer* layer : stack.layers_) queries = std::max(queries, layer->query.rows), keys = std::max(keys, layer->key.rows);
    const int64_t narrow = whole_lines(first.hidden), query = whole_lines(queries), key = whole_lines(keys);
    float* room = room_.floats(most + narrow + 2 * query + 2 * key);
    states_ = room + most;
    float* between = room + most + narrow;
    const BeforeAttention before{states_, nullptr, nullptr, 1, 1, between, between + 2 * query, between + 2 * query + key};
    void* attended = between + query;
    for (size_t i = 0; i < stack.layers_.size(); ++i) {
      before_[i].add_stages(stages_, before, room);
      attention_[i].add_stage(stages_, token_, kept_[i], before, attended, room);
      after_[i].add_stages(stages_, {attended, states_, states_, 1}, room);
    }
    normed_ = stack.norm_.has_value();
    if (!normed_) return;
    stages_.push_back({1, [this, norm = *stack.norm_, number = first.number](int64_t, int) {
      for_number(number, [&](auto type) { normalize(type, norm, states_, token_.outputs, 0); });
    }});
  }

  const std::string isa_;
  const int64_t pieces_;
  const int threads_, digits_;
  Token token_{};
  std::vector<Kept> kept_;
  Room room_;
  void* states_ = nullptr;
  bool normed_ = false;
  std::deque<BeforePart> before_;
  std::deque<AfterPart> after_;
  std::deque<LayerAttention> attention_;
  std::vector<Stage> stages_;
};

Stack::Stack(std::vector<const DecoderLayer*> layers, std::optional<Norm> norm, float scale) : layers_(std::move(layers)), norm_(norm), scale_(scale) {}
Stack::~Stack() = default;

void Stack::run(const std::string& isa, const Token& token, const std::vector<Kept>& kept, int threads, int digits) {
  threads = std::max(threads, 1);
  const int64_t pieces = pieces_of(token.before + 1), bytes = layers_[0]->hidden * size_of(layers_[0]->number);
  if (plan_ == nullptr || !plan_->serves(isa, pieces, threads, digits)) plan_.reset(new Plan(isa, *this, pieces, threads, digits));
  try {
    plan_->run(token, kept, bytes);
  } catch (...) {  // what a plan knows of broken matrices is for one token
    plan_.reset();
    throw;
  }
}

}  // namespace fewbits
