// Codes of two widths in one matrix: a bit for each group of a row says of which. A row is decoded into the cache and multiplied there with
// all vectors. Included after kernels.h.
#pragma once
#include "kernels.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace mixed_groups {

static inline int64_t padded_columns(const Coded& w) { return rounded_up(w.columns, lanes); }

static int64_t prepared_floats(const Product& product) { return padded_columns(*product.matrix) * product.vectors; }

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  if (vector >= product.vectors) return;
  float* to = room + vector * padded_columns(w);
  read_numbers(product.inputs, vector * w.columns, product.number, w.columns, to);
  for (int64_t c = w.columns; c < padded_columns(w); ++c) to[c] = 0.0f;
}

// Weights, codes of both widths a byte each, scales and zero points of a row, and what reading them takes.
static int64_t scratch_floats(const Coded& w) {
  const int64_t inner = values_floats(w.scales), zero = values_floats(w.zeros);
  return padded_columns(w) + rounded_up(w.columns + 32, 16) / 4 + 2 * (w.groups + lanes) + (inner > zero ? inner : zero) + 2 * lanes;
}

// Returns whether the row has as many wide groups as every row must have.
static bool decode_mixed_row(const Coded& w, int64_t row, float* out, float* scratch) {
  const int64_t narrow_count = (w.groups - w.wide_groups) * w.group, wide_count = w.wide_groups * w.group;
  uint8_t* narrow = reinterpret_cast<uint8_t*>(scratch);
  uint8_t* wide = narrow + rounded_up(narrow_count, 8);
  float* scales = scratch + rounded_up(w.columns + 32, 16) / 4;
  float* zeros = scales + w.groups + lanes;
  float* rest = zeros + w.groups + lanes;
  const uint8_t* flags = w.flags + row * ((w.groups + 7) / 8);
  int64_t found = 0;
  for (int64_t g = 0; g < w.groups; ++g) found += flags[g / 8] >> (g % 8) & 1;
  if (found != w.wide_groups) return false;
  unpack(w.codes + row * w.row_bytes, w.bits, narrow_count, narrow);
  unpack(w.wide + row * w.wide_row_bytes, w.wide_bits, wide_count, wide);
  read_values(w.scales, w.bits, row, scales, rest);
  read_values(w.zeros, w.bits, row, zeros, rest);
  for (int64_t g = 0; g < w.groups; ++g, out += w.group) {
    uint8_t*& codes = flags[g / 8] >> (g % 8) & 1 ? wide : narrow;
    const float zero = zeros[g], scale = scales[g];
    for (int64_t c = 0; c < w.group; ++c) out[c] = (static_cast<float>(codes[c]) - zero) * scale;
    codes += w.group;
  }
  return true;
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t padded = padded_columns(w);
  for (int64_t c = w.columns; c < padded; ++c) scratch[c] = 0.0f;
  for (int64_t row = first; row < last; ++row) {
    if (!decode_mixed_row(w, row, scratch, scratch + padded)) return product.broken->store(true);
    for (int64_t v = 0; v < product.vectors; ++v) {
      put_number(product.outputs, v * w.rows + row, product.number, dot(scratch, prepared + v * padded, padded));
    }
  }
}

}  // namespace mixed_groups
}  // namespace FEWBITS_ISA
}  // namespace fewbits
