// Attention over packed and plain keys and values, against softmax in float64.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "compare.h"
#include "matrices.h"

namespace comparison {

namespace {

using fewbits::Attention;
using fewbits::Segment;

constexpr double attention_limit = 2e-7;  // of tests/kernels/test_attention.py, and of the same: (1 + a score's terms) times the values' reach
constexpr int packed_group = 8;           // channels or tokens that share a scale, at least

struct Case {
  int64_t sequences, heads, share, queries, width;
  int bits;
  int64_t group;
  std::vector<int64_t> keys, values;  // tokens of each segment; the last is plain
  Number number;
  int mask;  // none, bytes, numbers
};

// Keys or values of one sequence, with what they are.
struct Side {
  std::list<Matrix> matrices;
  Memory memory;
  std::vector<Segment> segments;
  std::vector<double> numbers;  // [tokens, heads * width]
  double reach = 0.0;
};

void add_packed(Random& random, const Case& asked, int64_t tokens, bool keys, Side& side) {
  const int64_t channels = asked.heads * asked.width;
  Matrix& matrix = side.matrices.emplace_back();
  const Zeros zeros = random.below(3) == 0 ? Zeros::none : Zeros::numbers;
  const Number number = std::vector<Number>{Number::f32, Number::f16, Number::bf16}[static_cast<size_t>(random.below(3))];
  make_packed(random, {asked.bits, keys ? channels : tokens, keys ? tokens : channels, asked.group, Scales::numbers, zeros, Levels::none, number}, matrix);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      side.numbers.push_back(matrix.weights[static_cast<size_t>(keys ? channel * tokens + token : token * channels + channel)]);
    }
  }
  side.reach = std::max(side.reach, *std::max_element(matrix.reach.begin(), matrix.reach.end()));
  Segment segment;
  segment.tokens = tokens;
  segment.packed = &matrix.coded;
  side.segments.push_back(segment);
}

void add_plain(Random& random, const Case& asked, int64_t tokens, Side& side) {
  const int64_t channels = asked.heads * asked.width;
  uint8_t* data = side.memory.take<uint8_t>(tokens * channels * size_of(asked.number));
  for (int64_t i = 0; i < tokens * channels; ++i) {
    put_number(data, i, asked.number, random.between(-1, 1));
    side.numbers.push_back(number_at(data, i, asked.number));
  }
  side.reach = std::max(side.reach, 1.0);
  Segment segment;
  segment.tokens = tokens;
  segment.plain = data;
  segment.number = asked.number;
  segment.token_stride = channels, segment.head_stride = asked.width;
  side.segments.push_back(segment);
}

void make_side(Random& random, const Case& asked, const std::vector<int64_t>& lengths, bool keys, Side& side) {
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (i + 1 == lengths.size()) add_plain(random, asked, lengths[i], side);
    else add_packed(random, asked, lengths[i], keys, side);
  }
}

struct Row {
  int64_t sequence, head, query;  // a head of queries
};

// One query's output, compared with what it must be.
void compare_row(const Attention& a, const Side& keys, const Side& values, const Row& row, const std::string& where, Count& count) {
  const int64_t channels = a.heads * a.width, heads = a.heads * a.share, shared = row.head / a.share * a.width;
  const int64_t at = ((row.sequence * heads + row.head) * a.queries + row.query) * a.width, out = ((row.sequence * a.queries + row.query) * heads + row.head) * a.width;
  std::vector<double> weights(static_cast<size_t>(a.tokens));
  double reach = 0.0, top = -INFINITY, total = 0.0;
  for (int64_t c = 0; c < a.width; ++c) reach += std::fabs(number_at(a.query, at + c, a.number)) * keys.reach * a.scale;
  for (int64_t t = 0; t < a.tokens; ++t) {
    double score = 0.0;
    for (int64_t c = 0; c < a.width; ++c) score += number_at(a.query, at + c, a.number) * a.scale * keys.numbers[static_cast<size_t>(t * channels + shared + c)];
    const int64_t place = row.sequence * a.mask_sequence + row.query * a.mask_query + t;
    if (a.mask != nullptr && a.additive) score += static_cast<const float*>(a.mask)[place];
    else if (a.mask != nullptr && static_cast<const uint8_t*>(a.mask)[place] == 0) score = -INFINITY;
    weights[static_cast<size_t>(t)] = score, top = std::max(top, score);
  }
  for (double& weight : weights) total += weight = top == -INFINITY ? 0.0 : std::exp(weight - top);
  for (int64_t c = 0; c < a.width; ++c) {
    double expected = 0.0;
    for (int64_t t = 0; t < a.tokens; ++t) expected += weights[static_cast<size_t>(t)] * values.numbers[static_cast<size_t>(t * channels + shared + c)];
    expected = total == 0.0 ? 0.0 : expected / total;
    const double limit = attention_limit * (1 + reach) * values.reach + rounding(a.number) * std::fabs(expected) + 1e-7;
    count.look(number_at(a.output, out + c, a.number) - expected, limit, where);
  }
}

const void* make_mask(Random& random, const Attention& a, int kind, Memory& memory) {
  const int64_t size = a.sequences * a.queries * a.tokens;
  if (kind == 0) return nullptr;
  if (kind == 1) {
    uint8_t* mask = memory.take<uint8_t>(size);
    for (int64_t i = 0; i < size; ++i) mask[i] = random.below(4) != 0 && i >= a.tokens;  // the first query sees nothing
    return mask;
  }
  float* mask = memory.take<float>(size);
  for (int64_t i = 0; i < size; ++i) mask[i] = random.below(4) == 0 ? -INFINITY : static_cast<float>(random.between(-2, 2));
  return mask;
}

void compare_case(const std::string& isa, const Case& asked, Random& random, Count& count) {
  Memory memory;
  Attention a{};
  a.sequences = asked.sequences, a.heads = asked.heads, a.share = asked.share, a.queries = asked.queries, a.width = asked.width;
  for (const int64_t tokens : asked.keys) a.tokens += tokens;
  a.number = asked.number;
  a.scale = static_cast<float>(0.2 / std::sqrt(static_cast<double>(a.width)));
  const int64_t size = a.sequences * a.heads * a.rows() * a.width;
  uint8_t* query = memory.take<uint8_t>(size * size_of(a.number));
  for (int64_t i = 0; i < size; ++i) put_number(query, i, a.number, random.between(-1, 1));
  a.query = query;
  a.output = memory.take<uint8_t>(size * size_of(a.number));
  a.mask = make_mask(random, a, asked.mask, memory);
  a.additive = asked.mask == 2;
  a.mask_sequence = a.queries * a.tokens, a.mask_query = a.tokens;
  std::list<Side> keys, values;
  for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
    make_side(random, asked, asked.keys, true, keys.emplace_back());
    make_side(random, asked, asked.values, false, values.emplace_back());
    a.keys.push_back(keys.back().segments), a.values.push_back(values.back().segments);
  }
  const std::string where = isa + " attends: bits " + std::to_string(asked.bits) + ", width " + std::to_string(a.width) + ", group " + std::to_string(asked.group) +
                            ", share " + std::to_string(a.share) + ", queries " + std::to_string(a.queries) + ", mask " + std::to_string(asked.mask);
  begin(where);
  fewbits::attend(isa, a, 2);
  auto of_keys = keys.begin(), of_values = values.begin();
  for (int64_t sequence = 0; sequence < a.sequences; ++sequence, ++of_keys, ++of_values) {
    for (int64_t head = 0; head < a.heads * a.share; ++head) {
      for (int64_t q = 0; q < a.queries; ++q) compare_row(a, *of_keys, *of_values, {sequence, head, q}, where, count);
    }
  }
  ++count.attended;
}

}  // namespace

void compare_attention(const std::string& isa, Count& count) {
  Random random(41);
  const std::vector<std::vector<int64_t>> lengths[] = {{{77, 9}, {83, 3}}, {{530, 29}, {500, 59}}, {{40, 101, 1}, {65, 70, 7}}, {{1, 1}, {1, 1}}};
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int64_t width : {8, 32, 40, 64, 96, 128}) {
      for (const int64_t group : {packed_group, 3 * packed_group, 64, 1000}) {
        const auto& both = lengths[random.below(4)];
        const Number number = random.below(3) == 0 ? Number::f16 : random.maybe() ? Number::bf16 : Number::f32;
        const int mask = static_cast<int>(random.below(3));
        const Case asked{1 + random.below(2), 1 + random.below(2), 1 + random.below(6), 1 + random.below(3), width, bits, group, both[0], both[1], number, mask};
        compare_case(isa, asked, random, count);
      }
    }
  }
}

}  // namespace comparison
