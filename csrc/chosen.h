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
#include "avx512vnni/row_levels.h"
#include "avx512vnni/signed_lines.h"
#include "avx512vnni/sum_lines.h"
#include "avx512vnni/words.h"
#endif

namespace fewbits {
namespace FEWBITS_ISA {
namespace chosen {

constexpr int most_digits = 3;  // of inputs

// How products with a matrix are computed: inputs are made ready one by one, then rows are multiplied.
struct Way {
  int64_t (*prepared_floats)(const Product&);
  void (*prepare)(const Product&, int64_t vector, float* room);
  int64_t (*scratch_floats)(const Coded&, int64_t vectors);
  void (*multiply)(const Product&, const float* prepared, int64_t first, int64_t last, float* scratch);
  int64_t (*parts)(const Product&) = nullptr;
  void (*make_part)(const Product&, int64_t part, float* room) = nullptr;
};

#ifdef FEWBITS_FIXED
static fixed::Plan fixed_plan(const Product& product) {
  fixed::Plan plan;
  fixed::make_plan(*product.matrix, product.vectors, product.digits, plan);
  return plan;
}

static ternary::Plan ternary_plan(const Product& product) { return ternary::make_plan(*product.matrix, product.vectors, product.digits); }
#endif

// Of codes that lie by rows, or are brought there.
static Way find_way_by_rows(const Coded& w, int64_t vectors, int digits) {
  if (w.form == Coded::signed_product) {
    return {signed_product::prepared_floats, signed_product::prepare, signed_product::scratch_floats, signed_product::multiply};
  }
#ifdef FEWBITS_TABLES
  if (row_levels::serves(w, vectors, digits)) {
    return {row_levels::prepared_floats, row_levels::prepare, [](const Coded&, int64_t) -> int64_t { return 0; }, row_levels::multiply};
  }
#endif
#ifdef FEWBITS_FIXED
  fixed::Plan plan;
  if (ternary::serves(w)) {
    return {[](const Product& product) { return ternary::prepared_floats(*product.matrix, ternary_plan(product)); },
            [](const Product& product, int64_t vector, float* room) { ternary::prepare(product, ternary_plan(product), vector, room); },
            [](const Coded& w, int64_t) { return ternary::scratch_floats(w); },
            [](const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
              ternary::multiply(product, ternary_plan(product), prepared, first, last, scratch);
            }};
  }
  if (fixed::make_plan(w, vectors, digits, plan)) {
    return {[](const Product& product) { return fixed::prepared_floats(*product.matrix, fixed_plan(product)); },
            [](const Product& product, int64_t vector, float* room) { fixed::prepare(product, fixed_plan(product), vector, room); },
            [](const Coded& w, int64_t vectors) {
              fixed::Plan plan;
              fixed::make_plan(w, vectors, most_digits, plan);
              return fixed::scratch_floats(w, plan);
            },
            [](const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
              fixed::multiply(product, fixed_plan(product), prepared, first, last, scratch);
            }};
  }
#endif
  return {FEWBITS_ISA::prepared_floats, FEWBITS_ISA::prepare, [](const Coded&, int64_t) -> int64_t { return 0; }, FEWBITS_ISA::multiply};
}

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
    find_way_by_rows(rows, product.vectors, product.digits).multiply(some, prepared, row, row + line_rows, reinterpret_cast<float*>(room));
  }
}

static Way find_way(const Coded& w, int64_t vectors, int digits) {
#ifdef FEWBITS_TABLES
  if (word_tables::serves(w, vectors)) {
    return {word_tables::prepared_floats, word_tables::prepare, [](const Coded& w, int64_t) { return vectors::scratch_floats(w); },
            word_tables::multiply, word_tables::parts, word_tables::make_part};
  }
#endif
  if (w.form == Coded::vectors) {
    return {vectors::prepared_floats, vectors::prepare, [](const Coded& w, int64_t) { return vectors::scratch_floats(w); }, vectors::multiply};
  }
  if (w.form == Coded::mixed) {
    return {mixed_groups::prepared_floats, mixed_groups::prepare, [](const Coded& w, int64_t) { return mixed_groups::scratch_floats(w); },
            mixed_groups::multiply};
  }
  if (w.form == Coded::plain || w.form == Coded::sparse) {
    return {additions::prepared_floats, additions::prepare, [](const Coded& w, int64_t) { return additions::scratch_floats(w); },
            additions::multiply};
  }
#ifdef FEWBITS_TABLES
  if (signed_lines::serves(w, vectors, digits)) {
    return {signed_lines::prepared_floats, signed_lines::prepare, [](const Coded& w, int64_t) { return signed_lines::scratch_floats(w); },
            signed_lines::multiply, signed_lines::parts, signed_lines::make_part};
  }
  if (sum_lines::serves(w, vectors)) {
    return {sum_lines::prepared_floats, sum_lines::prepare, [](const Coded& w, int64_t) { return sum_lines::scratch_floats(w); },
            sum_lines::multiply, sum_lines::parts, sum_lines::make_part};
  }
#endif
#ifdef FEWBITS_LINES
  if (lines::serves(w)) {
    return {lines::prepared_floats, lines::prepare, [](const Coded& w, int64_t) { return lines::scratch_floats(w); }, lines::multiply};
  }
#endif
  Way way = find_way_by_rows(w, vectors, digits);
  if (w.lines) way.multiply = multiply_from_lines;
  return way;
}

static Way find_way(const Product& product) { return find_way(*product.matrix, product.vectors, product.digits); }

static int64_t prepared_floats(const Product& product) { return find_way(product).prepared_floats(product); }

static void prepare(const Product& product, int64_t vector, float* room) {
  find_way(product).prepare(product, vector, room);
}

static int64_t parts(const Product& product) {
  const Way way = find_way(product);
  return way.parts == nullptr ? 0 : way.parts(product);
}

static void make_part(const Product& product, int64_t part, float* room) {
  find_way(product).make_part(product, part, room);
}

// Bytes of sixteen rows of what may lie in lines.
static int64_t bytes_of_lines(const Values& values, int bits) { return values.lines ? rounded_up(line_rows * row_bytes_of(values, bits), 64) : 0; }
static int64_t bytes_of_lines(const Coded& w) {
  return w.lines && w.form != Coded::vectors ? rounded_up(line_rows * w.row_bytes, 64) + bytes_of_lines(w.scales, w.bits) + bytes_of_lines(w.zeros, w.bits) : 0;
}

// For products whatever inputs' digits, and where codes can be decoded, for that too.
static int64_t scratch_floats(const Coded& w, int64_t vectors) {
  int64_t own = w.form == Coded::vectors ? vectors::decode_floats(w) : 0;
  for (int digits = 1; digits <= most_digits; ++digits) {
    const int64_t one = find_way(w, vectors, digits).scratch_floats(w, vectors);
    own = one > own ? one : own;
  }
  return own + bytes_of_lines(w) / 4 + (w.form == Coded::packed ? FEWBITS_ISA::scratch_floats(w, vectors) : 0);
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  find_way(product).multiply(product, prepared, first, last, scratch);
}

static void decode(const Coded& w, int64_t first, int64_t last, void* out, Number number, float* scratch) {
  (w.form == Coded::vectors ? vectors::decode : FEWBITS_ISA::decode)(w, first, last, out, number, scratch);
}

#ifdef FEWBITS_LINES
static bool reads_lines(const Coded& w) {
#ifdef FEWBITS_TABLES
  if (sum_lines::serves(w, 1) || signed_lines::serves(w, 1, most_digits) || word_tables::serves(w, 1)) return true;
#endif
  return lines::serves(w);
}
#endif

// With eight lanes and more: `scalar`, which has four, takes twice as long as torch does.
static const GramKernels* find_gram(Number number) {
  if constexpr (lanes >= 8) {
    static constexpr GramKernels made = gram::make_kernels<gram::Floats32>();
    if (number == Number::f32) return &made;
  }
  return (void)number, nullptr;
}

}  // namespace chosen

constexpr Kernels make_kernels(const char* name, const Panels* (*panels)(const Product&) = nullptr,
                               const GramKernels* (*gram)(Number) = chosen::find_gram) {
  Kernels made{};
  made.name = name, made.panels = panels;
  made.prepared_floats = chosen::prepared_floats, made.prepare = chosen::prepare, made.padded_vectors = padded_vectors;
  made.scratch_floats = chosen::scratch_floats, made.multiply = chosen::multiply, made.decode = chosen::decode;
  made.parts = chosen::parts, made.make_part = chosen::make_part;
  made.feed_back = feed_back, made.rotate = rotate, made.gram = gram;
#ifdef FEWBITS_LINES
  made.reads_lines = chosen::reads_lines;
#endif
  return made;
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
