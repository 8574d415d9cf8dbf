#define FEWBITS_ISA portable
#include "decoder_step.h"

#include <algorithm>

#include "decoder_parts.h"
#include "room.h"

namespace fewbits {
namespace {

thread_local Room room;
constexpr int64_t heads_of_task = 8;

// Memory for some numbers of up to 32 bits each.
int64_t floats_for(int64_t tokens, int64_t numbers) { return whole_lines(tokens * numbers); }

// exp(x), to 2 units in the last place; what is below -87 counts as -87, what is above 88 as 88.
inline float exponential(float x) {
  constexpr float magic = 12582912.0f;
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + magic, count = shifted - magic;
  const float rest = (x - count * 0.693145752f) - count * 1.42860677e-6f;
  float found = ((1.0f / 5040 * rest + 1.0f / 720) * rest + 1.0f / 120) * rest + 1.0f / 24;  // written out: so compilers take lanes of it
  found = (((found * rest + 1.0f / 6) * rest + 0.5f) * rest + 1.0f) * rest + 1.0f;
  return as_float(as_bits(found) + (as_bits(shifted) << 23));
}

// gate * sigmoid(gate), rounded, times up, which it is written over.
template <typename Any>
void activate(Any type, const void* gate, void* up, int64_t at, int64_t count) {
  for (int64_t i = at; i < at + count; ++i) {
    const float value = read_number(type, gate, i);
    const float active = rounded(type, value / (1.0f + exponential(-value)));
    write_number(type, active * read_number(type, up, i), up, i);
  }
}

// The heads of queries and of keys, some at a time, with their norms and turned by their positions.
Stage stage_of_heads(const DecoderLayer& layer, const BeforeAttention& job) {
  const int64_t heads = layer.heads + layer.key_heads, tasks = (heads + heads_of_task - 1) / heads_of_task;
  return {job.tokens * tasks, [=, &layer, &job](int64_t task, int) {
    const int64_t token = task / tasks, first = task % tasks * heads_of_task, angle = token % job.positions * layer.width;
    for_number(layer.number, [&](auto type) {
      for (int64_t head = first; head < std::min(first + heads_of_task, heads); ++head) {
        const bool asks = head < layer.heads;
        const std::optional<Norm>& norm = asks ? layer.of_queries : layer.of_keys;
        void* to = asks ? job.query : job.key;
        const int64_t at = (token * (asks ? layer.heads : layer.key_heads) + (asks ? head : head - layer.heads)) * layer.width;
        if (norm) normalize(type, *norm, to, to, at);
        rotate_head(type, to, at, job.cosine, job.sine, angle, layer.width);
      }
    });
  }};
}

// Vectors that are normalized, and then made ready for products.
Stage stage_of_norm(const Products& products, const Norm& norm, Number number, const void* states, void* normalized, int64_t tokens) {
  return {products.padded_vectors(), [=, &products, &norm](int64_t token, int) {
    if (token < tokens) for_number(number, [&](auto type) { normalize(type, norm, states, normalized, token * norm.size); });
    products.prepare(normalized, token);
  }};
}

// Rows of a layer that outputs are added to what came in.
Stage stage_of_residual(const Products& products, const Sum& sum, const DecoderLayer& layer, const void* before, void* outputs, int64_t tokens, int threads, float* scratch) {
  return stage_of_rows({&sum}, threads, [=, &products, &sum, &layer](size_t, int64_t first, int64_t last, int worker) {
    products.multiply(0, first, last, outputs, scratch + worker * products.scratch_floats());
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t at = token * sum.rows + first;
      for_number(layer.number, [&](auto type) { add_numbers(type, before, layer.number, at, last - first, outputs, at); });
    }
  });
}

// The rows of gate and of up that belong together, and what is made of them, in the place of up.
Stage stage_of_gates(const Products& products, const DecoderLayer& layer, void* gate, void* up, int64_t tokens, int threads, float* scratch) {
  return stage_of_rows({&layer.gate}, threads, [=, &products, &layer](size_t, int64_t first, int64_t last, int worker) {
    float* own = scratch + worker * products.scratch_floats();
    products.multiply(0, first, last, gate, own);
    products.multiply(1, first, last, up, own);
    for_number(layer.number, [&](auto type) {
      for (int64_t token = 0; token < tokens; ++token) activate(type, gate, up, token * layer.between + first, last - first);
    });
  });
}

}  // namespace

BeforePart::BeforePart(const Kernels& kernels, const DecoderLayer& layer, int64_t tokens, int threads, int digits)
    : layer_(layer), sums_{&layer.query, &layer.key, &layer.value}, products_(kernels, sums_, tokens, layer.number, digits), tokens_(tokens), threads_(std::max(threads, 1)) {}

int64_t BeforePart::floats() const { return products_.scratch_floats() * threads_ + products_.floats() + floats_for(tokens_, layer_.hidden); }

void BeforePart::add_stages(std::vector<Stage>& stages, const BeforeAttention& job, float* room) {
  const int64_t each = products_.scratch_floats();
  float* normalized = room + each * threads_;
  products_.place(normalized + floats_for(tokens_, layer_.hidden));
  stages.push_back(stage_of_norm(products_, layer_.before_attention, layer_.number, job.states, normalized, tokens_));
  products_.add_stages(stages, threads_, room);
  stages.push_back(stage_of_rows(sums_, threads_, [=](size_t sum, int64_t first, int64_t last, int worker) {
    void* outputs[] = {job.query, job.key, job.value};
    products_.multiply(sum, first, last, outputs[sum], room + worker * each);
  }));
}

AfterPart::AfterPart(const Kernels& kernels, const DecoderLayer& layer, int64_t tokens, int threads, int digits)
    : layer_(layer),
      output_(kernels, {&layer.output}, tokens, layer.number, digits),
      wide_(kernels, {&layer.gate, &layer.up}, tokens, layer.number, digits),
      down_(kernels, {&layer.down}, tokens, layer.number, digits),
      tokens_(tokens),
      threads_(std::max(threads, 1)) {}

int64_t AfterPart::scratch_floats() const { return std::max({output_.scratch_floats(), wide_.scratch_floats(), down_.scratch_floats()}); }

int64_t AfterPart::floats() const {
  const int64_t between = 2 * floats_for(tokens_, layer_.hidden) + 2 * floats_for(tokens_, layer_.between);
  return scratch_floats() * threads_ + output_.floats() + wide_.floats() + down_.floats() + between;
}

void AfterPart::add_stages(std::vector<Stage>& stages, const AfterAttention& job, float* room) {
  const int64_t narrow = floats_for(tokens_, layer_.hidden), middle = floats_for(tokens_, layer_.between);
  float *states = room + scratch_floats() * threads_, *normalized = states + narrow, *gate = normalized + narrow, *up = gate + middle, *place = up + middle;
  for (Products* products : {&output_, &wide_, &down_}) products->place(place), place += products->floats();
  stages.push_back({output_.padded_vectors(), [this, job](int64_t token, int) { output_.prepare(job.attended, token); }});
  output_.add_stages(stages, threads_, room);
  stages.push_back(stage_of_residual(output_, layer_.output, layer_, job.states, states, tokens_, threads_, room));
  stages.push_back(stage_of_norm(wide_, layer_.before_mlp, layer_.number, states, normalized, tokens_));
  wide_.add_stages(stages, threads_, room);
  stages.push_back(stage_of_gates(wide_, layer_, gate, up, tokens_, threads_, room));
  stages.push_back({down_.padded_vectors(), [this, up](int64_t token, int) { down_.prepare(up, token); }});
  down_.add_stages(stages, threads_, room);
  stages.push_back(stage_of_residual(down_, layer_.down, layer_, states, job.outputs, tokens_, threads_, room));
}

void AfterPart::check() const {
  for (const Products* products : {&output_, &wide_, &down_}) products->check();
}

void before_attention(const Kernels& kernels, const DecoderLayer& layer, const BeforeAttention& job, int threads, int digits) {
  BeforePart part(kernels, layer, job.tokens, threads, digits);
  std::vector<Stage> stages;
  part.add_stages(stages, job, room.floats(part.floats()));
  stages.push_back(stage_of_heads(layer, job));
  run_stages(threads, stages);
  part.check();
}

void after_attention(const Kernels& kernels, const DecoderLayer& layer, const AfterAttention& job, int threads, int digits) {
  AfterPart part(kernels, layer, job.tokens, threads, digits);
  std::vector<Stage> stages;
  part.add_stages(stages, job, room.floats(part.floats()));
  run_stages(threads, stages);
  part.check();
}

}  // namespace fewbits
