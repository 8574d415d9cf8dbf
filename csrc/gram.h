// Sums of products of features' pairs, for any instruction set. Included after its lanes.h.
//
// A word of 32 bits holds one token of a feature, or two. Inputs lie `[blocks of tokens, panels, words, features of a panel]`. Two panels
// meet in a square of sums, a strip of whose rows is held in registers while a block passes: a word of every feature of the one panel,
// two registers, times a word of each feature of the strip. Sums begin anew at every block, so that many tokens lose little to rounding.
#pragma once
#include "gram_job.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace gram {

constexpr int64_t width = 2 * lanes;
constexpr int strip = lanes >= 16 ? 8 : 4;                // whose sums fit the registers
constexpr int64_t block_words = lanes >= 16 ? 128 : 256;  // of a panel, which stay in the first cache
constexpr int64_t group_panels = 4;                       // that meet such a block, and stay in the second cache themselves
constexpr int64_t most_blocks = 1024 / block_words;       // that are laid out at a time

// A word is one float32.
struct Floats32 {
  static constexpr int64_t per_word = 1;
  static inline Floats add(Floats sums, uint32_t a, const uint32_t* b) {
    return multiply_add(spread(as_float(a)), load(reinterpret_cast<const float*>(b)), sums);
  }
  static inline void pack(const Gram& gram, int64_t token, int64_t feature, int64_t count, uint32_t* to) {
    std::memcpy(to, static_cast<const float*>(gram.inputs) + token * gram.features + feature, static_cast<size_t>(count) * 4);
  }
};

template <class Kind>
constexpr int64_t block_tokens = block_words * Kind::per_word;

static inline int64_t panels_of(const Gram& gram) { return (gram.features + width - 1) / width; }

template <class Kind>
static int64_t words_of(int64_t tokens) {
  return (tokens + Kind::per_word - 1) / Kind::per_word;
}

template <class Kind>
static int64_t prepared_words(const Gram& gram) {
  return words_of<Kind>(gram.tokens) * panels_of(gram) * width;
}

template <class Kind>
static int64_t words_in(const Gram& gram, int64_t block) {
  const int64_t left = gram.tokens - block * block_tokens<Kind>;
  return words_of<Kind>(left < block_tokens<Kind> ? left : block_tokens<Kind>);
}

template <class Kind>
static int64_t place_of(const Gram& gram, int64_t block, int64_t panel) {
  return (block * block_words * panels_of(gram) + panel * words_in<Kind>(gram, block)) * width;
}

template <class Kind>
static void prepare(const Gram& gram, int64_t block, uint32_t* room) {
  const int64_t words = words_in<Kind>(gram, block);
  for (int64_t k = 0; k < words; ++k) {
    const int64_t token = block * block_tokens<Kind> + k * Kind::per_word;
    for (int64_t panel = 0; panel < panels_of(gram); ++panel) {
      uint32_t* to = room + place_of<Kind>(gram, block, panel) + k * width;
      const int64_t left = gram.features - panel * width;
      if (left >= width) {
        Kind::pack(gram, token, panel * width, width, to);
      } else {
        Kind::pack(gram, token, panel * width, left, to);
        std::memset(to + left, 0, static_cast<size_t>(width - left) * 4);
      }
    }
  }
}

template <class Kind>
static inline void add_strip(const uint32_t* a, const uint32_t* b, int64_t words, float* square) {
  Floats low[strip], high[strip];
  for (int r = 0; r < strip; ++r) low[r] = high[r] = zeros();
  for (int64_t k = 0; k < words; ++k, a += width, b += width) {
#pragma GCC unroll 8
    for (int r = 0; r < strip; ++r) {
      low[r] = Kind::add(low[r], a[r], b);
      high[r] = Kind::add(high[r], a[r], b + lanes);
    }
  }
  for (int r = 0; r < strip; ++r) {
    float* row = square + r * width;
    store(row, FEWBITS_ISA::add(load(row), low[r]));
    store(row + lanes, FEWBITS_ISA::add(load(row + lanes), high[r]));
  }
}

// Squares on the diagonal are added whole.
static void add_square(const Gram& gram, const float* square, int64_t first, int64_t other) {
  const int64_t left = gram.features - other, count = left < width ? left : width;
  for (int64_t r = 0; r < width && first + r < gram.features; ++r) {
    float* to = gram.sums + (first + r) * gram.features + other;
    for (int64_t c = 0; c < count; ++c) to[c] += square[r * width + c];
  }
}

template <class Kind>
static void add(const Gram& gram, const uint32_t* prepared, int64_t group) {
  alignas(64) float squares[group_panels][width * width];
  const int64_t panels = panels_of(gram), blocks = (gram.tokens + block_tokens<Kind> - 1) / block_tokens<Kind>, first = group * group_panels;
  for (int64_t other = first; other < panels; ++other) {
    const int64_t last = other + 1 < first + group_panels ? other + 1 : first + group_panels;
    std::memset(squares, 0, sizeof squares);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t words = words_in<Kind>(gram, block);
      const uint32_t* b = prepared + place_of<Kind>(gram, block, other);
      for (int64_t panel = first; panel < last; ++panel) {
        const uint32_t* a = prepared + place_of<Kind>(gram, block, panel);
        for (int64_t r = 0; r < width; r += strip) add_strip<Kind>(a + r, b, words, squares[panel - first] + r * width);
      }
    }
    for (int64_t panel = first; panel < last; ++panel) add_square(gram, squares[panel - first], panel * width, other * width);
  }
}

template <class Kind>
constexpr GramKernels make_kernels() {
  return {block_tokens<Kind>, group_panels * width, most_blocks * block_tokens<Kind>, prepared_words<Kind>, prepare<Kind>, add<Kind>};
}

}  // namespace gram
}  // namespace FEWBITS_ISA
}  // namespace fewbits
