// Attention of a few queries over keys and values that lie packed: what the kernels see, and the call.
#pragma once
#include <string>
#include <vector>

#include "matrix.h"

namespace fewbits {

// Neighbouring tokens of one sequence, packed or as plain numbers; channels are heads * width, head after head.
struct Segment {
  int64_t tokens = 0;
  const Coded* packed = nullptr;  // keys [channels, tokens], values [tokens, channels], with scales of their own for each row; null: plain
  const void* plain = nullptr;    // channels of a head are neighbours
  Number number = Number::f32;
  int64_t token_stride = 0, head_stride = 0;  // in numbers
};

struct Attention {
  int64_t sequences, heads, share, queries, width, tokens;  // `share` heads of queries read one head of keys; `width` channels of a head
  const void* query;                                       // [sequences, heads * share, queries, width]
  void* output;                                            // [sequences, queries, heads * share, width]
  Number number;
  float scale;
  const void* mask;    // null: every token is seen; else a number for each [sequence, query, token]
  bool additive;       // float32, added to the scores; else a byte, 0: not seen
  int64_t mask_sequence, mask_query;  // strides, in numbers; tokens are neighbours
  std::vector<std::vector<Segment>> keys, values;  // of each sequence, all its tokens in order

  int64_t rows() const { return share * queries; }  // queries that read one head
};

// What one thread takes: tokens of one segment of keys, under all heads.
struct Piece {
  int64_t sequence;
  const Segment* keys;
  int64_t first;  // token of the sequence
  int64_t at;     // token of the segment, a multiple of piece_tokens
  int64_t count;
};

constexpr int64_t piece_tokens = 512;

struct AttentionKernels {
  int64_t (*scratch_floats)(const Attention&);
  // Into partial [heads * rows, 2 + width]: the largest score, the sum of exp(score - largest), and values weighted with those.
  void (*attend)(const Attention&, const Piece&, float* partial, float* scratch);
  // The output of one head, from what its sequence's pieces gave, `stride` floats apart.
  void (*merge)(const Attention&, int64_t sequence, int64_t head, const float* partials, int64_t stride, int64_t pieces);
};

// Whether kernels read a matrix whose rows or columns are channels; others are decoded by the caller.
inline bool attends_packed(const Coded& w) {
  const auto own = [&w](const Values& values) { return values.kind == Values::dense && values.rows == w.rows; };
  const int64_t together = w.bits <= 4 ? 8 : 4;  // neighbours that share a scale
  return w.bits <= 8 && w.counts == Coded::from_middle && w.levels.kind == Values::none && own(w.scales) && (w.zeros.kind == Values::none || own(w.zeros)) && (w.groups == 1 || w.group % together == 0);
}

// Raises std::invalid_argument where the instruction set is not available.
const AttentionKernels& find_attention(const std::string& isa);
void attend(const std::string& isa, const Attention& attention, int threads);

}  // namespace fewbits
