// What a decoder layer of the Llama kind computes for a few tokens, but its attention: what comes before it in one call, what comes after in another.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "sum.h"

namespace fewbits {

// x / sqrt(mean(x^2) + epsilon), rounded, times the weight [size], rounded.
struct Norm {
  const void* weight = nullptr;
  int64_t size = 0;
  float epsilon = 0;
};

// Numbers of norms, states and outputs are of one type.
struct DecoderLayer {
  Sum query, key, value, output, gate, up, down;
  Norm before_attention, before_mlp;
  std::optional<Norm> of_queries, of_keys;  // of each head
  int64_t hidden = 0, heads = 0, key_heads = 0, width = 0, between = 0;  // width of a head; numbers between gate, up and down
  Number number = Number::f32;
};

struct BeforeAttention {
  const void* states;        // [tokens, hidden]
  const void *cosine, *sine;  // [positions, width]
  int64_t tokens, positions;  // token t is at position t modulo positions
  void *query, *key, *value;  // [tokens, heads * width]; of keys and values, key_heads
};

struct AfterAttention {
  const void *attended, *states;  // [tokens, heads * width]; [tokens, hidden], the layer's input
  void* outputs;                  // [tokens, hidden]
  int64_t tokens;
};

// The stages of either part, for whoever runs them among others. They read a job's arrays, and use `room` of `floats()`, each time that they run;
// layer and part stay where they are until then.
class BeforePart {
 public:
  BeforePart(const Kernels& kernels, const DecoderLayer& layer, int64_t tokens, int threads, int digits);
  int64_t floats() const;
  void add_stages(std::vector<Stage>& stages, const BeforeAttention& job, float* room);  // up to queries, keys and values, which are not turned yet
  void check() const { products_.check(); }

 private:
  const DecoderLayer& layer_;
  const std::vector<const Sum*> sums_;
  Products products_;
  const int64_t tokens_;
  const int threads_;
};

class AfterPart {
 public:
  AfterPart(const Kernels& kernels, const DecoderLayer& layer, int64_t tokens, int threads, int digits);
  int64_t floats() const;
  void add_stages(std::vector<Stage>& stages, const AfterAttention& job, float* room);
  void check() const;

 private:
  int64_t scratch_floats() const;

  const DecoderLayer& layer_;
  Products output_, wide_, down_;
  const int64_t tokens_;
  const int threads_;
};

void before_attention(const Kernels& kernels, const DecoderLayer& layer, const BeforeAttention& job, int threads, int digits);
void after_attention(const Kernels& kernels, const DecoderLayer& layer, const AfterAttention& job, int threads, int digits);

}  // namespace fewbits
