// Attention over packed keys and values, over an instruction set's lanes. Included once by each, after its lanes.h.
//
// Keys lie channel by channel, and lanes hold neighbouring tokens; values lie token by token, and lanes hold neighbouring channels.
// Both come down to one step: blocks of lanes of codes, each times a vector of multipliers for each query, added up in place.
// The multipliers are query * scale, or weight * scale, so that a code costs one mask, one conversion and a multiply-add a query.
// Zero points cost one product a group. A code that is masked but not shifted is the code times a power of two, undone at the end.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "attention_lanes.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace attention {

constexpr int64_t panel = 64;           // blocks of lanes whose multipliers stay in the first cache
constexpr int row_tile = 4;             // queries that share the unpacking of a code
constexpr int64_t score_stride = piece_tokens + places * lanes + lanes;

// ---- scratch ------------------------------------------------------------------------------------------------------------

// How values of a head meet the lanes: slices of at most a block of channels, several tokens beside one another where they are short.
struct ValuePlan {
  int64_t slices, used;    // `used` lanes of a slice's token, the others padding
  int64_t token_lanes;     // a power of two
  int64_t tokens, tile;    // tokens of a block, and of a panel
  int64_t slice_channels, slice_bytes, token_bytes;  // of one token: stored, and with padding
};

static ValuePlan plan_values(int bits, int64_t width) {
  ValuePlan plan{};
  const int64_t each = codes_of_lane(bits), block = each * lanes;
  plan.slices = ceiling(width, block);
  plan.slice_channels = least(width, block);
  plan.used = ceiling(plan.slice_channels, each);
  plan.token_lanes = 1;
  while (plan.token_lanes < plan.used) plan.token_lanes *= 2;
  plan.tokens = lanes / plan.token_lanes;
  plan.tile = panel * plan.tokens;
  plan.slice_bytes = plan.slice_channels * bits / 8;
  plan.token_bytes = plan.token_lanes * each * bits / 8;
  return plan;
}

// Where the groups of a head's slice are, and how its lanes take them: `near` of them for a token, a power of two.
struct SliceGroups {
  int64_t first, touched, near;
  int32_t scale_picks[lanes], token_picks[lanes], near_tokens[lanes];
};

struct Scratch {
  float *query, *scores, *scales, *shifts, *bias, *words, *by, *sums;  // of keys, and of both
  float *stage, *grid, *grid_shifts, *near, *near_shifts, *weighted, *weighted_bias, *plain;  // of values
  SliceGroups* slice;
};

static int64_t widest_grid(const Attention& a) {
  int64_t most = 0;
  for (const auto& segments : a.values) {
    for (const Segment& segment : segments) {
      if (segment.packed != nullptr) most = std::max(most, least(plan_values(segment.packed->bits, a.width).tile, piece_tokens) * segment.packed->groups);
    }
  }
  return most;
}

static int64_t lay_out(const Attention& a, float* base, Scratch* scratch) {
  int64_t used = 0;
  const auto take = [&](float*& place, int64_t floats) {
    if (base != nullptr) place = base + used;
    used += rounded_up(floats + lanes, 16);
  };
  const int64_t rows = a.heads * a.rows(), slices = ceiling(a.width, 4 * lanes);
  const int64_t groups = piece_tokens / 4 + 2 + 2 * lanes, grid = widest_grid(a);
  take(scratch->query, rows * a.width);
  take(scratch->scores, rows * score_stride);
  take(scratch->scales, a.width * groups);
  take(scratch->shifts, groups);
  take(scratch->bias, a.rows() * groups);
  take(scratch->words, panel * lanes);
  take(scratch->by, panel * row_tile * lanes);
  take(scratch->sums, places * row_tile * lanes);
  take(scratch->stage, a.heads * slices * (panel * lanes + 4) + 16);
  take(scratch->grid, grid);
  take(scratch->grid_shifts, grid);
  take(scratch->near, panel * lanes);
  take(scratch->near_shifts, panel * lanes);
  take(scratch->weighted, rows * slices * places * lanes);
  take(scratch->weighted_bias, rows * slices * lanes);
  take(scratch->plain, panel * rounded_up(a.width, lanes));
  float* slice = nullptr;
  take(slice, a.heads * slices * static_cast<int64_t>(sizeof(SliceGroups) / 4));
  scratch->slice = reinterpret_cast<SliceGroups*>(slice);
  return used;
}

static int64_t scratch_floats(const Attention& a) {
  Scratch scratch;
  return lay_out(a, nullptr, &scratch);
}

}  // namespace attention
}  // namespace FEWBITS_ISA
}  // namespace fewbits

#include "attention_plain.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace attention {

// ---- keys ---------------------------------------------------------------------------------------------------------------

// The tokens of a piece under one head.
struct Keys {
  const Coded& w;
  int64_t row, width;           // first channel, channels
  int64_t at, count;            // tokens
  int64_t group;                // the first one's
  int64_t stride;               // of scales and bias
  const float *scales, *bias;   // [width, stride], [rows, stride]
};

static inline int64_t group_of(const Coded& w, int64_t place) { return w.groups == 1 ? 0 : place / w.group; }

// Lanes of a block from place `first` on, to groups counted from that of `first`.
static inline void pick_groups(const Coded& w, int64_t first, int32_t* picks) {
  const int64_t each = codes_of_lane(w.bits), inside = w.groups == 1 ? 0 : first % w.group;
  for (int lane = 0; lane < lanes; ++lane) picks[lane] = w.groups == 1 ? 0 : static_cast<int32_t>((inside + lane * each) / w.group);
}

template <int Bits>
static inline Words safe_words(const uint8_t* from, const uint8_t* end) {
  constexpr int64_t read = (lanes / 4 - 1) * (Bits <= 4 ? 4 * Bits : 2 * Bits) + 16;
  if (from + read <= end) return words<Bits>(from);
  uint8_t copy[read] = {};
  if (from < end) std::memcpy(copy, from, static_cast<size_t>(end - from));
  return words<Bits>(copy);
}

template <int Bits, int Rows>
static void score_rows(const Keys& k, const float* query, const float* bias, float* scores, const Scratch& s) {
  constexpr int held = Bits <= 4 ? 8 : 4;
  constexpr int64_t block = held * lanes;
  const uint8_t* end = k.w.codes + k.w.code_bytes;
  const int64_t next = k.row + 2 * k.width <= k.w.rows ? k.width * k.w.row_bytes : 0;
  for (int64_t done = 0; done < k.count; done += block) {
    const int64_t token = k.at + done, group = group_of(k.w, token) - k.group;
    int32_t picks[lanes];
    pick_groups(k.w, token, picks);
    for (int i = 0; i < held * Rows; ++i) store(s.sums + i * lanes, zeros());
    for (int64_t first = 0; first < k.width; first += panel) {
      const int64_t count = least(panel, k.width - first);
      const uint8_t* codes = k.w.codes + (k.row + first) * k.w.row_bytes + token / 8 * Bits;
      for (int64_t c = 0; c < count; ++c, codes += k.w.row_bytes) {
        __builtin_prefetch(codes + next, 0, 2);  // rows are far apart: the next head's is asked for while this one is computed with
        const Words word = safe_words<Bits>(codes, end);
        std::memcpy(s.words + c * lanes, &word, sizeof word);
        const Floats scale = permute(k.scales + (first + c) * k.stride + group, picks);
        for (int r = 0; r < Rows; ++r) store(s.by + (c * Rows + r) * lanes, multiply(spread(query[r * k.width + first + c]), scale));
      }
      accumulate<Bits, Rows>(s.words, s.by, count, s.sums);
    }
    for (int r = 0; r < Rows; ++r) {
      const Floats shift = permute(bias + r * k.stride + group, picks);
      Floats found[held];
      for (int i = 0; i < held; ++i) found[i] = multiply_add(load(s.sums + (i * Rows + r) * lanes), spread(unfold(Bits, i)), -shift);
      put_in_order<held>(found, scores + r * score_stride + done);
    }
  }
}

using ScoreRows = void (*)(const Keys&, const float*, const float*, float*, const Scratch&);

template <int Bits>
static ScoreRows score_rows_of(int64_t rows) {
  constexpr ScoreRows found[row_tile] = {score_rows<Bits, 1>, score_rows<Bits, 2>, score_rows<Bits, 3>, score_rows<Bits, 4>};
  return found[rows - 1];
}

static void score_packed(const Attention& a, const Piece& piece, int64_t head, const float* query, float* scores, const Scratch& s) {
  constexpr ScoreRows (*find[8])(int64_t) = {score_rows_of<1>, score_rows_of<2>, score_rows_of<3>, score_rows_of<4>,
                                             score_rows_of<5>, score_rows_of<6>, score_rows_of<7>, score_rows_of<8>};
  const Coded& w = *piece.keys->packed;
  const int64_t first = group_of(w, piece.at), groups = group_of(w, piece.at + piece.count - 1) - first + 1, stride = rounded_up(groups, lanes) + lanes;
  for (int64_t i = 0; i < a.rows() * stride; ++i) s.bias[i] = 0.0f;
  for (int64_t g = groups; g < stride; ++g) s.shifts[g] = 0.0f;
  for (int64_t c = 0; c < a.width; ++c) {
    float* scales = s.scales + c * stride;
    read_grid(w, (head * a.width + c) * w.groups + first, groups, scales, s.shifts);
    for (int64_t g = groups; g < stride; ++g) scales[g] = s.shifts[g] = 0.0f;
    for (int64_t r = 0; r < a.rows(); ++r) {
      const Floats by = spread(query[r * a.width + c]);
      for (int64_t g = 0; g < groups; g += lanes) store(s.bias + r * stride + g, multiply_add(by, load(s.shifts + g), load(s.bias + r * stride + g)));
    }
  }
  const Keys keys{w, head * a.width, a.width, piece.at, piece.count, first, stride, s.scales, s.bias};
  for (int64_t r = 0; r < a.rows(); r += row_tile) {
    find[w.bits - 1](least(row_tile, a.rows() - r))(keys, query + r * a.width, s.bias + r * stride, scores + r * score_stride, s);
  }
}

// Scores to weights exp(score - largest); the largest and the sum go to partial[0] and [1].
static void weigh(const Attention& a, const Piece& piece, int64_t row, float* scores, float* partial) {
  const int64_t padded = rounded_up(piece.count, lanes);
  if (a.mask != nullptr) {
    const int64_t at = piece.sequence * a.mask_sequence + row % a.queries * a.mask_query + piece.first;
    for (int64_t t = 0; t < piece.count; ++t) {
      if (a.additive) scores[t] += static_cast<const float*>(a.mask)[at + t];
      else if (static_cast<const uint8_t*>(a.mask)[at + t] == 0) scores[t] = -INFINITY;
    }
  }
  for (int64_t t = piece.count; t < score_stride; ++t) scores[t] = -INFINITY;
  Floats most = load(scores);
  for (int64_t t = lanes; t < padded; t += lanes) most = larger(load(scores + t), most);
  const float top = largest(most);
  const Floats from = spread(top == -INFINITY ? 0.0f : top);
  Floats total = zeros();
  for (int64_t t = 0; t < padded; t += lanes) {
    const Floats weight = exponential(load(scores + t) - from);
    store(scores + t, weight);
    total = add(total, weight);
  }
  for (int64_t t = padded; t < score_stride; ++t) scores[t] = 0.0f;
  partial[0] = top;
  partial[1] = sum(total);
}

// ---- values -------------------------------------------------------------------------------------------------------------

// Tokens `at` to `at + count` of packed values, whose weights begin at `weights`.
struct ValueRun {
  const Coded& w;
  const ValuePlan plan;
  int64_t at, count;
};

template <int Bytes>
static void stage_rows(const ValueRun& v, int64_t parts, uint8_t* stage, int64_t stage_each) {
  for (int64_t t = 0; t < v.count; ++t) {
    const uint8_t* from = v.w.codes + (v.at + t) * v.w.row_bytes;
    uint8_t* to = stage + t * v.plan.token_bytes;
    for (int64_t part = 0; part < parts; ++part, from += Bytes, to += stage_each) std::memcpy(to, from, Bytes);
  }
}

// Codes of all heads, head after head and without what lies between, so that memory is read in its order.
static void stage_codes(const Attention& a, const ValueRun& v, uint8_t* stage, int64_t stage_each) {
  const ValuePlan& plan = v.plan;
  const uint8_t* end = v.w.codes + v.w.code_bytes;
  const int64_t last = a.width * v.w.bits / 8 - (plan.slices - 1) * plan.slice_bytes, parts = a.heads * plan.slices;  // bytes of a head's last slice
  if (last == plan.slice_bytes && last == 16) return stage_rows<16>(v, parts, stage, stage_each);
  if (last == plan.slice_bytes && last == 32) return stage_rows<32>(v, parts, stage, stage_each);
  if (last == plan.slice_bytes && last == 64) return stage_rows<64>(v, parts, stage, stage_each);
  for (int64_t t = 0; t < v.count; ++t) {
    const uint8_t* from = v.w.codes + (v.at + t) * v.w.row_bytes;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t bytes = part % plan.slices == plan.slices - 1 ? last : plan.slice_bytes;
      uint8_t* to = stage + part * stage_each + t * plan.token_bytes;
      if (from + rounded_up(bytes, 16) <= end) {
        for (int64_t i = 0; i < bytes; i += 16) std::memcpy(to + i, from + i, 16);  // what is past the token is written over by the next
      } else {
        std::memcpy(to, from, static_cast<size_t>(bytes));
      }
      from += bytes;
    }
  }
}

static SliceGroups slice_groups(const Attention& a, const ValueRun& v, int64_t head, int64_t slice) {
  SliceGroups found;
  const ValuePlan& plan = v.plan;
  const int64_t each = codes_of_lane(v.w.bits), channel = head * a.width + slice * plan.slice_channels;
  const int64_t used = ceiling(least(plan.slice_channels, a.width - slice * plan.slice_channels), each);
  found.first = group_of(v.w, channel);
  found.touched = group_of(v.w, channel + (used - 1) * each) - found.first + 1;
  found.near = 1;
  while (found.near < found.touched) found.near *= 2;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t token = lane / plan.token_lanes, inside = least(lane % plan.token_lanes, used - 1);
    found.token_picks[lane] = static_cast<int32_t>(token);
    found.scale_picks[lane] = static_cast<int32_t>(token * found.near + group_of(v.w, channel + inside * each) - found.first);
    found.near_tokens[lane] = static_cast<int32_t>(lane / found.near);
  }
  return found;
}

template <int Bits, int Rows>
static void add_values(const ValueRun& v, const SliceGroups& groups, const uint8_t* stage, const float* weights, float* sums, float* bias, const Scratch& s) {
  constexpr int64_t bytes = (Bits <= 4 ? 8 : 4) * lanes / 8 * Bits;
  const int64_t blocks = ceiling(v.count, v.plan.tokens);
  for (int64_t block = 0; block < blocks; ++block) {
    const Words word = words<Bits>(stage + block * bytes);
    std::memcpy(s.words + block * lanes, &word, sizeof word);
    const int64_t token = block * v.plan.tokens;
    const Floats scale = permute(s.near + token * groups.near, groups.scale_picks);
    for (int r = 0; r < Rows; ++r) {
      store(s.by + (block * Rows + r) * lanes, multiply(permute(weights + r * score_stride + token, groups.token_picks), scale));
    }
  }
  accumulate<Bits, Rows>(s.words, s.by, blocks, sums);
  for (int64_t at = 0; at < v.count * groups.near; at += lanes) {
    const Floats shift = load(s.near_shifts + at);
    for (int r = 0; r < Rows; ++r) {
      const Floats weight = permute(weights + r * score_stride + at / groups.near, groups.near_tokens);
      store(bias + r * lanes, multiply_add(weight, shift, load(bias + r * lanes)));
    }
  }
}

using AddValues = void (*)(const ValueRun&, const SliceGroups&, const uint8_t*, const float*, float*, float*, const Scratch&);

template <int Bits>
static AddValues add_values_of(int64_t rows) {
  constexpr AddValues found[row_tile] = {add_values<Bits, 1>, add_values<Bits, 2>, add_values<Bits, 3>, add_values<Bits, 4>};
  return found[rows - 1];
}

static void add_tile(const Attention& a, const ValueRun& v, const SliceGroups* slice, const float* weights, const Scratch& s) {
  constexpr AddValues (*find[8])(int64_t) = {add_values_of<1>, add_values_of<2>, add_values_of<3>, add_values_of<4>,
                                             add_values_of<5>, add_values_of<6>, add_values_of<7>, add_values_of<8>};
  const int64_t rows = a.rows(), slices = v.plan.slices, stage_each = panel * lanes * 4 + 16;
  uint8_t* stage = reinterpret_cast<uint8_t*>(s.stage);
  stage_codes(a, v, stage, stage_each);
  read_grid(v.w, v.at * v.w.groups, v.count * v.w.groups, s.grid, s.grid_shifts);
  for (int64_t part = 0; part < a.heads * slices; ++part) {
    const int64_t head = part / slices;
    const SliceGroups& groups = slice[part];
    for (int64_t t = 0; t < v.count && groups.near == 1; ++t) {
      s.near[t] = s.grid[t * v.w.groups + groups.first];
      s.near_shifts[t] = s.grid_shifts[t * v.w.groups + groups.first];
    }
    for (int64_t t = 0; t < v.count && groups.near > 1; ++t) {
      for (int64_t g = 0; g < groups.near; ++g) {
        const int64_t from = t * v.w.groups + groups.first + g;
        s.near[t * groups.near + g] = g < groups.touched ? s.grid[from] : 0.0f;
        s.near_shifts[t * groups.near + g] = g < groups.touched ? s.grid_shifts[from] : 0.0f;
      }
    }
    const int64_t filled = v.count * groups.near;
    for (int64_t i = filled; i < filled + lanes; ++i) s.near[i] = s.near_shifts[i] = 0.0f;
    for (int64_t r = 0; r < rows; r += row_tile) {
      const int64_t at = part * rows + r;
      find[v.w.bits - 1](least(row_tile, rows - r))(v, groups, stage + part * stage_each, weights + (head * rows + r) * score_stride,
                                                    s.weighted + at * places * lanes, s.weighted_bias + at * lanes, s);
    }
  }
}

// Adds what has been weighted to out [heads * rows, width].
static void finish_values(const Attention& a, const ValueRun& v, const SliceGroups* slice, const Scratch& s, float* partial) {
  const int64_t rows = a.rows(), slices = v.plan.slices, each = codes_of_lane(v.w.bits);
  for (int64_t part = 0; part < a.heads * slices; ++part) {
    const int64_t head = part / slices, begin = part % slices * v.plan.slice_channels, channels = least(v.plan.slice_channels, a.width - begin);
    const SliceGroups& groups = slice[part];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t tile = r / row_tile * row_tile, together = least(row_tile, rows - tile);
      const float* sums = s.weighted + (part * rows + tile) * places * lanes + (r - tile) * lanes;
      const float* bias = s.weighted_bias + (part * rows + r) * lanes;
      float* out = partial + (head * rows + r) * (2 + a.width) + 2 + begin;
      float shifts[lanes] = {}, of_lane[lanes] = {}, channels_of[places * lanes];
      for (int lane = 0; lane < lanes; ++lane) shifts[lane % groups.near] += bias[lane];
      for (int64_t lane = 0; lane < v.plan.token_lanes; ++lane) of_lane[lane] = shifts[groups.scale_picks[lane]];
      Floats found[places];
      for (int64_t i = 0; i < each; ++i) found[i] = multiply_add(load(sums + i * together * lanes), spread(unfold(v.w.bits, i)), -load(of_lane));
      if (each == 8) put_in_order<8>(found, channels_of);
      else put_in_order<4>(found, channels_of);
      for (int64_t token = 0; token < v.plan.tokens; ++token) {
        const float* from = channels_of + token * v.plan.token_lanes * each;
        for (int64_t c = 0; c < channels; ++c) out[c] += from[c];
      }
    }
  }
}

static void add_packed(const Attention& a, const Coded& w, int64_t at, int64_t count, const float* weights, float* partial, const Scratch& s) {
  const ValuePlan plan = plan_values(w.bits, a.width);
  const int64_t rows = a.heads * plan.slices * a.rows();
  for (int64_t i = 0; i < rows * places * lanes; ++i) s.weighted[i] = 0.0f;
  for (int64_t i = 0; i < rows * lanes; ++i) s.weighted_bias[i] = 0.0f;
  for (int64_t part = 0; part < a.heads * plan.slices; ++part) s.slice[part] = slice_groups(a, {w, plan, at, count}, part / plan.slices, part % plan.slices);
  for (int64_t done = 0; done < count; done += plan.tile) add_tile(a, {w, plan, at + done, least(plan.tile, count - done)}, s.slice, weights + done, s);
  finish_values(a, {w, plan, at, count}, s.slice, s, partial);
}

// ---- a piece, and all of them -------------------------------------------------------------------------------------------

static void attend(const Attention& a, const Piece& piece, float* partial, float* scratch) {
  Scratch s;
  lay_out(a, scratch, &s);
  const int64_t rows = a.rows(), all = a.heads * rows;
  read_numbers(a.query, a.number, piece.sequence * all * a.width, all * a.width, a.sequences * all * a.width, s.query);
  for (int64_t i = 0; i < all * a.width; ++i) s.query[i] *= a.scale;
  for (int64_t head = 0; head < a.heads; ++head) {
    float* scores = s.scores + head * rows * score_stride;
    const float* query = s.query + head * rows * a.width;
    if (piece.keys->packed != nullptr) score_packed(a, piece, head, query, scores, s);
    else score_plain(a, piece, head, query, scores, s);
    for (int64_t r = 0; r < rows; ++r) weigh(a, piece, r, scores + r * score_stride, partial + (head * rows + r) * (2 + a.width));
  }
  for (int64_t row = 0; row < all; ++row) for (int64_t c = 0; c < a.width; ++c) partial[row * (2 + a.width) + 2 + c] = 0.0f;
  int64_t first = 0;  // token of the sequence
  for (const Segment& segment : a.values[static_cast<size_t>(piece.sequence)]) {
    const int64_t from = std::max(first, piece.first), to = least(first + segment.tokens, piece.first + piece.count);
    if (from < to) {
      const float* weights = s.scores + (from - piece.first);
      if (segment.packed != nullptr) add_packed(a, *segment.packed, from - first, to - from, weights, partial, s);
      else add_plain(a, segment, from - first, to - from, weights, partial, s);
    }
    first += segment.tokens;
  }
}

static void merge(const Attention& a, int64_t sequence, int64_t head, const float* partials, int64_t stride, int64_t pieces) {
  const int64_t each = 2 + a.width, queries_heads = a.heads * a.share;
  for (int64_t r = 0; r < a.rows(); ++r) {
    const float* first = partials + (head * a.rows() + r) * each;
    float top = -INFINITY, total = 0.0f;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const float most = first[piece * stride];
      if (most > top || most != most) top = most;  // what is no number stays
    }
    const int64_t at = ((sequence * a.queries + r % a.queries) * queries_heads + head * a.share + r / a.queries) * a.width;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      if (top != -INFINITY) total += first[piece * stride + 1] * std::exp(first[piece * stride] - top);
    }
    for (int64_t from = 0; from < a.width; from += 64) {
      const int64_t count = least(64, a.width - from);
      float found[64] = {};
      for (int64_t piece = 0; piece < pieces && top != -INFINITY; ++piece) {
        const float weight = std::exp(first[piece * stride] - top);
        for (int64_t c = 0; c < count; ++c) found[c] += weight * first[piece * stride + 2 + from + c];
      }
      // Where no token is seen there is nothing to attend to: 0, as torch has it.
      for (int64_t c = 0; c < count; ++c) put_number(a.output, at + from + c, a.number, total == 0.0f ? 0.0f : found[c] / total);
    }
  }
}

constexpr AttentionKernels make_kernels() { return {scratch_floats, attend, merge}; }

}  // namespace attention
}  // namespace FEWBITS_ISA
}  // namespace fewbits
