// What an instruction set offers: codes in fixed point where that serves, in floats elsewhere, and the other forms of matrices.
// Included once by each instruction set, after its lanes.h.
#pragma once
#include "additions.h"
#include "feedback.h"
#include "gram.h"
#include "kernels.h"
#include "mixed_groups.h"
#include "rotation.h"
#include "signed_product.h"
#include "vectors.h"
#ifdef FEWBITS_FIXED
#include "fixed.h"
#include "ternary.h"
#endif
#ifdef FEWBITS_LINES  // where an instruction set has products of codes in lines
#include FEWBITS_LINES
#endif
#ifdef FEWBITS_TABLES  // and of what is looked up in tables
#include "avx512vnni/sum_lines.h"
#include "avx512vnni/words.h"
#endif

namespace fewbits {
namespace FEWBITS_ISA {
namespace chosen {

static int64_t prepared_floats(const Product& product) {
  const Coded& w = *product.matrix;
#ifdef FEWBITS_TABLES
  if (word_tables::serves(w, product.vectors)) return word_tables::prepared_floats(product);
#endif
  if (w.form == Coded::vectors) return vectors::prepared_floats(product);
  if (w.form == Coded::signed_product) return signed_product::prepared_floats(product);
  if (w.form == Coded::mixed) return mixed_groups::prepared_floats(product);
  if (w.form != Coded::packed) return additions::prepared_floats(product);
#ifdef FEWBITS_TABLES
  if (sum_lines::serves(w, product.vectors)) return sum_lines::prepared_floats(product);
#endif
#ifdef FEWBITS_LINES
  if (lines::serves(w)) return lines::prepared_floats(product);
#endif
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) return ternary::prepared_floats(w, ternary::make_plan(w, product.vectors, product.digits));
  fixed::Plan plan;
  if (fixed::make_plan(w, product.vectors, product.digits, plan)) return fixed::prepared_floats(w, plan);
#endif
  return FEWBITS_ISA::prepared_floats(product);
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
#ifdef FEWBITS_TABLES
  if (word_tables::serves(w, product.vectors)) return word_tables::prepare(product, vector, room);
#endif
  if (w.form == Coded::vectors) return vectors::prepare(product, vector, room);
  if (w.form == Coded::signed_product) return signed_product::prepare(product, vector, room);
  if (w.form == Coded::mixed) return mixed_groups::prepare(product, vector, room);
  if (w.form != Coded::packed) return additions::prepare(product, vector, room);
#ifdef FEWBITS_TABLES
  if (sum_lines::serves(w, product.vectors)) return sum_lines::prepare(product, vector, room);
#endif
#ifdef FEWBITS_LINES
  if (lines::serves(w)) return lines::prepare(product, vector, room);
#endif
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) return ternary::prepare(product, ternary::make_plan(w, product.vectors, product.digits), vector, room);
  fixed::Plan plan;
  if (fixed::make_plan(w, product.vectors, product.digits, plan)) return fixed::prepare(product, plan, vector, room);
#endif
  FEWBITS_ISA::prepare(product, vector, room);
}

// Bytes of sixteen rows of what may lie in lines.
static int64_t bytes_of_lines(const Values& values, int bits) { return values.lines ? rounded_up(line_rows * row_bytes_of(values, bits), 64) : 0; }
static int64_t bytes_of_lines(const Coded& w) {
  return w.lines ? rounded_up(line_rows * w.row_bytes, 64) + bytes_of_lines(w.scales, w.bits) + bytes_of_lines(w.zeros, w.bits) : 0;
}

// For products and for decoding.
static int64_t scratch_floats(const Coded& w, int64_t vectors) {
  if (w.form == Coded::vectors) return vectors::scratch_floats(w);
  if (w.form == Coded::signed_product) return signed_product::scratch_floats(w, vectors);
  if (w.form == Coded::mixed) return mixed_groups::scratch_floats(w);
  if (w.form != Coded::packed) return additions::scratch_floats(w);
  const int64_t floats = FEWBITS_ISA::scratch_floats(w, vectors) + bytes_of_lines(w) / 4;
#ifdef FEWBITS_TABLES
  if (sum_lines::serves(w, vectors)) return floats + sum_lines::scratch_floats(w);
#endif
#ifdef FEWBITS_LINES
  if (lines::serves(w)) return floats + lines::scratch_floats(w);
#endif
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) return floats + ternary::scratch_floats(w);
  fixed::Plan plan;
  if (fixed::make_plan(w, vectors, 3, plan)) return floats + fixed::scratch_floats(w, plan);
#endif
  return floats;
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch);

// Brings sixteen rows of what lies in lines into rows, in `room`; where row 0 would be.
static const uint8_t* bring_into_rows(const void* lines, int64_t row_bytes, int64_t item, int64_t row, uint8_t*& room) {
  const uint8_t* found = room - row * row_bytes;
  for (int64_t r = 0; r < line_rows; ++r) take_from_lines(lines, row_bytes, item, row + r, room + r * row_bytes);
  room += rounded_up(line_rows * row_bytes, 64);
  return found;
}

// Products of what lies in lines that no kernel of these reads.
static void multiply_from_lines(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  for (int64_t row = first; row < last; row += line_rows) {
    Coded rows = w;
    rows.lines = false;
    uint8_t* room = reinterpret_cast<uint8_t*>(scratch);
    rows.codes = bring_into_rows(w.codes, w.row_bytes, word_of(w), row, room);
    rows.code_bytes = (row + line_rows) * w.row_bytes;
    for (Values* values : {&rows.scales, &rows.zeros}) {
      if (!values->lines) continue;
      values->data = bring_into_rows(values->data, row_bytes_of(*values, w.bits), item_of(*values), row, room);
      values->lines = false;
    }
    Product some = product;
    some.matrix = &rows;
    multiply(some, prepared, row, row + line_rows, reinterpret_cast<float*>(room));
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
#ifdef FEWBITS_TABLES
  if (word_tables::serves(w, product.vectors)) return word_tables::multiply(product, prepared, first, last, scratch);
#endif
  if (w.form == Coded::vectors) return vectors::multiply(product, prepared, first, last, scratch);
  if (w.form == Coded::signed_product) return signed_product::multiply(product, prepared, first, last, scratch);
  if (w.form == Coded::mixed) return mixed_groups::multiply(product, prepared, first, last, scratch);
  if (w.form != Coded::packed) return additions::multiply(product, prepared, first, last, scratch);
#ifdef FEWBITS_TABLES
  if (sum_lines::serves(w, product.vectors)) return sum_lines::multiply(product, prepared, first, last, scratch);
#endif
#ifdef FEWBITS_LINES
  if (lines::serves(w)) return lines::multiply(product, prepared, first, last, scratch);
#endif
  if (w.lines) return multiply_from_lines(product, prepared, first, last, scratch);
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) {
    return ternary::multiply(product, ternary::make_plan(w, product.vectors, product.digits), prepared, first, last, scratch);
  }
  fixed::Plan plan;
  if (fixed::make_plan(w, product.vectors, product.digits, plan)) return fixed::multiply(product, plan, prepared, first, last, scratch);
#endif
  FEWBITS_ISA::multiply(product, prepared, first, last, scratch);
}

#ifdef FEWBITS_TABLES
static int64_t parts(const Product& product) {
  const Coded& w = *product.matrix;
  return word_tables::serves(w, product.vectors) ? word_tables::parts(product) : sum_lines::serves(w, product.vectors) ? sum_lines::parts(product) : 0;
}

static void make_part(const Product& product, int64_t part, float* room) {
  const auto make = product.matrix->form == Coded::vectors ? word_tables::make_part : sum_lines::make_part;
  make(product, part, room);
}
#endif

#ifdef FEWBITS_LINES
static bool reads_lines(const Coded& w) {
#ifdef FEWBITS_TABLES
  if (sum_lines::serves(w, 1) || word_tables::serves(w, 1)) return true;
#endif
  return lines::serves(w);
}
#endif

static const GramKernels* find_gram(Number number) {
  static constexpr GramKernels made = gram::make_kernels<gram::Floats32>();
  return number == Number::f32 ? &made : nullptr;
}

}  // namespace chosen

constexpr Kernels make_kernels(const char* name, const Panels* (*panels)(const Product&) = nullptr,
                               const GramKernels* (*gram)(Number) = chosen::find_gram) {
  Kernels made{};
  made.name = name, made.panels = panels;
  made.prepared_floats = chosen::prepared_floats, made.prepare = chosen::prepare, made.padded_vectors = padded_vectors;
  made.scratch_floats = chosen::scratch_floats, made.multiply = chosen::multiply, made.decode = decode;
  made.feed_back = feed_back, made.rotate = rotate, made.gram = gram;
#ifdef FEWBITS_TABLES
  made.parts = chosen::parts, made.make_part = chosen::make_part;
#endif
#ifdef FEWBITS_LINES
  made.reads_lines = chosen::reads_lines;
#endif
  return made;
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
