// Keys and values that are plain numbers: some tokens of a head at a time are made float32, and met by all queries that share them. Included
// by attention_kernels.h.
#pragma once

namespace fewbits {
namespace FEWBITS_ISA {
namespace attention {

constexpr int64_t together = 4;  // tokens whose scores, or lanes of channels whose sums, are made side by side

// Plain numbers of one head, as float32 [count up to a multiple of `together`, width up to whole lanes], padded with zeros.
static void read_plain(const Attention& a, const Segment& segment, int64_t head, int64_t at, int64_t count, float* out) {
  const int64_t padded = rounded_up(a.width, lanes), all = (segment.tokens - 1) * segment.token_stride + (a.heads - 1) * segment.head_stride + a.width;
  for (int64_t t = 0; t < count; ++t) {
    float* to = out + t * padded;
    read_numbers(segment.plain, segment.number, (at + t) * segment.token_stride + head * segment.head_stride, a.width, all, to);
    for (int64_t c = a.width; c < padded; ++c) to[c] = 0.0f;
  }
  for (int64_t i = count * padded; i < rounded_up(count, together) * padded; ++i) out[i] = 0.0f;
}

// Scores of one query with `count` tokens, up to a multiple of `together`.
static inline void score_tile(const float* query, int64_t width, const float* keys, int64_t count, float* scores) {
  const int64_t padded = rounded_up(width, lanes), whole = width / lanes * lanes;
  for (int64_t t = 0; t < count; t += together) {
    const float* k = keys + t * padded;
    Floats total[together] = {zeros(), zeros(), zeros(), zeros()};
    for (int64_t c = 0; c < whole; c += lanes) {
      const Floats q = load(query + c);
      for (int i = 0; i < together; ++i) total[i] = multiply_add(q, load(k + i * padded + c), total[i]);
    }
    sum_four(total[0], total[1], total[2], total[3], scores + t);
    for (int64_t c = whole; c < width; ++c) for (int i = 0; i < together; ++i) scores[t + i] += query[c] * k[i * padded + c];
  }
}

static void score_plain(const Attention& a, const Piece& piece, int64_t head, const float* query, float* scores, const Scratch& s) {
  for (int64_t done = 0; done < piece.count; done += panel) {
    const int64_t count = least(panel, piece.count - done);
    read_plain(a, *piece.keys, head, piece.at + done, count, s.plain);
    for (int64_t r = 0; r < a.rows(); ++r) score_tile(query + r * a.width, a.width, s.plain, count, scores + r * score_stride + done);
  }
}

// Adds the values of `tokens` tokens times their weights to `count` channels, which take so many lanes.
template <int Blocks>
static inline void add_channels(const float* weights, const float* values, int64_t padded, int64_t tokens, int64_t count, float* out) {
  Floats total[Blocks];
  for (int i = 0; i < Blocks; ++i) total[i] = zeros();
  for (int64_t t = 0; t < tokens; ++t) {
    const Floats weight = spread(weights[t]);
    for (int i = 0; i < Blocks; ++i) total[i] = multiply_add(weight, load(values + t * padded + i * lanes), total[i]);
  }
  float found[Blocks * lanes];
  for (int i = 0; i < Blocks; ++i) store(found + i * lanes, total[i]);
  for (int64_t c = 0; c < count; ++c) out[c] += found[c];
}

static void add_plain(const Attention& a, const Segment& segment, int64_t at, int64_t count, const float* weights, float* partial, const Scratch& s) {
  const int64_t padded = rounded_up(a.width, lanes), wide = together * lanes;
  for (int64_t head = 0; head < a.heads; ++head) {
    for (int64_t done = 0; done < count; done += panel) {
      const int64_t tokens = least(panel, count - done);
      read_plain(a, segment, head, at + done, tokens, s.plain);
      for (int64_t r = 0; r < a.rows(); ++r) {
        const float* weight = weights + (head * a.rows() + r) * score_stride + done;
        float* out = partial + (head * a.rows() + r) * (2 + a.width) + 2;
        int64_t c = 0;
        for (; c + wide <= padded; c += wide) add_channels<together>(weight, s.plain + c, padded, tokens, least(wide, a.width - c), out + c);
        for (; c < a.width; c += lanes) add_channels<1>(weight, s.plain + c, padded, tokens, least(lanes, a.width - c), out + c);
      }
    }
  }
}

}  // namespace attention
}  // namespace FEWBITS_ISA
}  // namespace fewbits
