// A product of two thin factors, entry by entry times a sign. Weights are made a few rows and a panel of columns at a time, in the first
// cache, and multiplied with all vectors there. Included after an instruction set's lanes.h.
#pragma once
#include "grid.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace signed_product {

constexpr int together = 3;  // blocks whose sums do not wait for each other, and whose signs come in one word
constexpr int64_t rows_together = 4, panel_blocks = 30;  // vectors of lanes of a panel

static inline int64_t blocks(const Coded& w) { return rounded_up(ceiling(w.columns, lanes), together); }  // some of zeros at the end
static inline int64_t padded_vectors(int64_t count) { return count == 1 ? 1 : rounded_up(count, tile_vectors); }

// The right factor [block, rank, lanes], then the inputs [vector, columns], both padded by zeros.
static int64_t prepared_floats(const Product& product) {
  const Coded& w = *product.matrix;
  return blocks(w) * lanes * (w.rank + padded_vectors(product.vectors) + 1);
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  const int64_t padded = blocks(w) * lanes, there = vector < product.vectors ? w.columns : 0;
  float* inputs = room + padded * w.rank;
  read_numbers(product.inputs, vector * w.columns, product.number, there, inputs + vector * padded);
  for (int64_t c = there; c < padded; ++c) inputs[vector * padded + c] = 0.0f;
  if (vector != 0) return;
  float* row = inputs + padded * padded_vectors(product.vectors);
  for (int64_t k = 0; k < w.rank; ++k) {
    read_numbers(w.right, k * w.columns, w.number, w.columns, row);
    for (int64_t c = w.columns; c < padded; ++c) row[c] = 0.0f;
    for (int64_t block = 0; block < blocks(w); ++block) store(room + (block * w.rank + k) * lanes, load(row + block * lanes));
  }
}

static int64_t scratch_floats(const Coded& w, int64_t vectors) {
  return rows_together * (2 * w.rank + padded_vectors(vectors) + panel_blocks * lanes) + 16;
}

// The signs of some blocks from `bit` on, from the highest bit of a word down; 1 for minus. No byte from `end` on is read.
static inline uint64_t minus_signs(const uint8_t* signs, int64_t bit, const uint8_t* end) {
  const uint8_t* from = signs + bit / 8;
  uint64_t word = 0;
  if (from + 8 <= end) std::memcpy(&word, from, 8);
  else if (from < end) std::memcpy(&word, from, static_cast<size_t>(end - from));
  return ~__builtin_bswap64(word) << (bit % 8);
}

// Weights of some rows and a run of blocks, a multiple of those taken together, into `to [rows, panel]`.
template <int Rows>
static void make_weights(const Coded& w, const float* right, int64_t row, const float* left, int64_t first, int64_t last, float* to) {
  static_assert(together * lanes + 7 <= 64, "a word holds the signs that are taken from it");
  const uint8_t* end = w.codes + w.code_bytes;
  const int64_t step = w.rank * lanes;
  for (int64_t block = first; block < last; block += together) {
    Floats sums[together][Rows];
    for (int b = 0; b < together; ++b) for (int r = 0; r < Rows; ++r) sums[b][r] = zeros();
    const float* from = right + block * step;
    const float* factors = left;
    for (int64_t k = 0; k < w.rank; ++k, from += lanes, factors += Rows) {
      Floats there[together];
#pragma GCC unroll 4
      for (int b = 0; b < together; ++b) there[b] = load(from + b * step);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Floats factor = spread(factors[r]);
#pragma GCC unroll 4
        for (int b = 0; b < together; ++b) sums[b][r] = multiply_add(factor, there[b], sums[b][r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const uint64_t minus = minus_signs(w.codes, (row + r) * w.columns + block * lanes, end);
      float* out = to + (r * panel_blocks + block - first) * lanes;
#pragma GCC unroll 4
      for (int b = 0; b < together; ++b) store(out + b * lanes, flip(sums[b][r], static_cast<uint32_t>(minus >> (64 - lanes * (b + 1)))));
    }
  }
}

// Weights of a panel times a tile of vectors, added to `sums`, `stride` apart for each row.
template <int Rows, int Vectors>
static void multiply_panel(const float* weights, const float* inputs, int64_t padded, int64_t count, float* sums, int64_t stride) {
  Floats found[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) found[r][v] = zeros();
  for (int64_t block = 0; block < count; ++block) {
    for (int v = 0; v < Vectors; ++v) {
      const Floats input = load(inputs + v * padded + block * lanes);
      for (int r = 0; r < Rows; ++r) found[r][v] = multiply_add(load(weights + (r * panel_blocks + block) * lanes), input, found[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) sums[r * stride + v] += sum(found[r][v]);
}

template <int Rows>
static void multiply_rows(const Product& product, const float* prepared, int64_t row, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t padded = blocks(w) * lanes, vectors = padded_vectors(product.vectors);
  const float* inputs = prepared + padded * w.rank;
  float* weights = scratch;
  float* sums = weights + Rows * panel_blocks * lanes;
  float* left = sums + Rows * vectors;
  read_numbers(w.left, row * w.rank, w.number, Rows * w.rank, left + Rows * w.rank);
  for (int64_t k = 0; k < w.rank; ++k) for (int r = 0; r < Rows; ++r) left[k * Rows + r] = left[(Rows + r) * w.rank + k];
  for (int64_t i = 0; i < Rows * vectors; ++i) sums[i] = 0.0f;
  for (int64_t first = 0; first < blocks(w); first += panel_blocks) {
    const int64_t last = least(first + panel_blocks, blocks(w));
    make_weights<Rows>(w, prepared, row, left, first, last, weights);
    if (vectors == 1) {
      multiply_panel<Rows, 1>(weights, inputs + first * lanes, padded, last - first, sums, vectors);
      continue;
    }
    for (int64_t v = 0; v < vectors; v += tile_vectors) {
      multiply_panel<Rows, tile_vectors>(weights, inputs + v * padded + first * lanes, padded, last - first, sums + v, vectors);
    }
  }
  for (int64_t v = 0; v < product.vectors; ++v) {
    for (int r = 0; r < Rows; ++r) put_number(product.outputs, v * w.rows + row + r, product.number, sums[r * vectors + v]);
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  int64_t row = first;
  for (; row + rows_together <= last; row += rows_together) multiply_rows<rows_together>(product, prepared, row, scratch);
  for (; row < last; ++row) multiply_rows<1>(product, prepared, row, scratch);
}

}  // namespace signed_product
}  // namespace FEWBITS_ISA
}  // namespace fewbits
