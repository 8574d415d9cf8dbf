#define FEWBITS_ISA portable
#include "decoder_step.h"

#include <algorithm>
#include <cmath>

#include "room.h"
#include "rounding.h"

namespace fewbits {
namespace {

thread_local Room room;
constexpr int64_t heads_of_task = 8;

// Memory for some numbers of up to 32 bits each.
int64_t floats_for(int64_t tokens, int64_t numbers) { return whole_lines(tokens * numbers); }

template <typename Any>
float mean_of_squares(Any type, const void* numbers, int64_t at, int64_t count) {
  float parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      const float value = read_number(type, numbers, at + i + lane);
      parts[lane] += value * value;
    }
  }
  double sum = 0;
  for (; i < count; ++i) sum += static_cast<double>(read_number(type, numbers, at + i)) * read_number(type, numbers, at + i);
  for (const float part : parts) sum += part;
  return static_cast<float>(sum / static_cast<double>(count));
}

// `norm.size` numbers from place `at` on of one array to the same place of another, which may be it.
template <typename Any>
void normalize(Any type, const Norm& norm, const void* from, void* to, int64_t at) {
  const float factor = 1.0f / std::sqrt(mean_of_squares(type, from, at, norm.size) + norm.epsilon);
  for (int64_t i = 0; i < norm.size; ++i) {
    const float value = rounded(type, read_number(type, from, at + i) * factor);
    write_number(type, read_number(type, norm.weight, i) * value, to, at + i);
  }
}

// Turns the pairs of a head's channels, one of either half, by the angles of its position.
template <typename Any>
void rotate_head(Any type, void* head, int64_t at, const void* cosine, const void* sine, int64_t angle, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; ++c) {
    const float low = read_number(type, head, at + c), high = read_number(type, head, at + half + c);
    const auto times = [&](float value, const void* factors, int64_t place) { return rounded(type, value * read_number(type, factors, angle + place)); };
    write_number(type, times(low, cosine, c) + times(-high, sine, c), head, at + c);
    write_number(type, times(high, cosine, half + c) + times(low, sine, half + c), head, at + half + c);
  }
}

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
  return stage_of_rows({&sum}, rows_of_task(sum.rows, threads), [=, &products, &sum, &layer](size_t, int64_t first, int64_t last, int worker) {
    products.multiply(0, first, last, outputs, scratch + worker * products.scratch_floats());
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t at = token * sum.rows + first;
      for_number(layer.number, [&](auto type) { add_numbers(type, before, layer.number, at, last - first, outputs, at); });
    }
  });
}

// The rows of gate and of up that belong together, and what is made of them, in the place of up.
Stage stage_of_gates(const Products& products, const DecoderLayer& layer, void* gate, void* up, int64_t tokens, int threads, float* scratch) {
  return stage_of_rows({&layer.gate}, rows_of_task(layer.between, threads), [=, &products, &layer](size_t, int64_t first, int64_t last, int worker) {
    float* own = scratch + worker * products.scratch_floats();
    products.multiply(0, first, last, gate, own);
    products.multiply(1, first, last, up, own);
    for_number(layer.number, [&](auto type) {
      for (int64_t token = 0; token < tokens; ++token) activate(type, gate, up, token * layer.between + first, last - first);
    });
  });
}

}  // namespace

void before_attention(const Kernels& kernels, const DecoderLayer& layer, const BeforeAttention& job, int threads, int digits) {
  threads = std::max(threads, 1);
  const std::vector<const Sum*> sums{&layer.query, &layer.key, &layer.value};
  Products products(kernels, sums, job.tokens, layer.number, digits);
  const int64_t each = products.scratch_floats();
  float* scratch = room.floats(each * threads + products.floats() + floats_for(job.tokens, layer.hidden));
  float* normalized = scratch + each * threads;
  products.place(normalized + floats_for(job.tokens, layer.hidden));
  std::vector<Stage> stages{stage_of_norm(products, layer.before_attention, layer.number, job.states, normalized, job.tokens)};
  products.add_inner_stages(stages, threads, scratch);
  const int64_t rows = rows_of_task(layer.query.rows + 2 * layer.key.rows, threads);
  stages.push_back(stage_of_rows(sums, rows, [&](size_t sum, int64_t first, int64_t last, int worker) {
    void* outputs[] = {job.query, job.key, job.value};
    products.multiply(sum, first, last, outputs[sum], scratch + worker * each);
  }));
  stages.push_back(stage_of_heads(layer, job));
  run_stages(threads, stages);
  products.check();
}

void after_attention(const Kernels& kernels, const DecoderLayer& layer, const AfterAttention& job, int threads, int digits) {
  threads = std::max(threads, 1);
  Products output(kernels, {&layer.output}, job.tokens, layer.number, digits), wide(kernels, {&layer.gate, &layer.up}, job.tokens, layer.number, digits),
      down(kernels, {&layer.down}, job.tokens, layer.number, digits);
  Products* all[] = {&output, &wide, &down};
  int64_t each = 0, floats = 0;
  for (const Products* products : all) each = std::max(each, products->scratch_floats()), floats += products->floats();
  const int64_t narrow = floats_for(job.tokens, layer.hidden), middle = floats_for(job.tokens, layer.between);
  float* scratch = room.floats(each * threads + floats + 2 * narrow + 2 * middle);
  float *states = scratch + each * threads, *normalized = states + narrow, *gate = normalized + narrow, *up = gate + middle, *place = up + middle;
  for (Products* products : all) products->place(place), place += products->floats();

  std::vector<Stage> stages{{output.padded_vectors(), [&](int64_t token, int) { output.prepare(job.attended, token); }}};
  output.add_inner_stages(stages, threads, scratch);
  stages.push_back(stage_of_residual(output, layer.output, layer, job.states, states, job.tokens, threads, scratch));
  stages.push_back(stage_of_norm(wide, layer.before_mlp, layer.number, states, normalized, job.tokens));
  wide.add_inner_stages(stages, threads, scratch);
  stages.push_back(stage_of_gates(wide, layer, gate, up, job.tokens, threads, scratch));
  stages.push_back({down.padded_vectors(), [&](int64_t token, int) { down.prepare(up, token); }});
  down.add_inner_stages(stages, threads, scratch);
  stages.push_back(stage_of_residual(down, layer.down, layer, states, job.outputs, job.tokens, threads, scratch));
  run_stages(threads, stages);
  for (const Products* products : all) products->check();
}

}  // namespace fewbits
