// Products of signs times thin factors, where signs lie in lines: no weight is made. Outputs are the sum over the ranks of a column of the left
// factor times what signs make of the inputs times a row of the right one. So signs meet as many vectors as there are ranks, by tables of sums.
#pragma once
#include "sum_lines.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace signed_lines {

constexpr int64_t strip_rows = 128;  // whose signs stay in the second cache while each rank's tables are there

// Signs of some rows, or of all, as codes by themselves.
static Coded signs_of(const Coded& w, int64_t row, int64_t rows) {
  Coded signs;
  signs.bits = 1, signs.counts = Coded::as_signs, signs.lines = true;
  signs.codes = w.codes + row * w.row_bytes, signs.row_bytes = w.row_bytes, signs.code_bytes = rows * w.row_bytes;
  signs.rows = rows, signs.columns = signs.group = w.columns, signs.groups = 1;
  return signs;
}

// Whether there is room for the tables, and they take less than making weights, which vectors share. Times are relative, as measured: of a row
// and a vector with tables for each rank, which are made in the time of so many rows; of a row with weights for itself, for each rank and vector.
static bool serves(const Coded& w, int64_t vectors, int digits) {
  constexpr int64_t making = 512, looking_up[] = {5, 7, 10}, row = 90, of_rank = 31, of_vector = 38;
  if (w.form != Coded::signed_product || !w.lines || !sum_lines::serves(signs_of(w, 0, w.rows), w.rank * vectors)) return false;
  return (w.rows + making) * w.rank * vectors * looking_up[digits - 1] < w.rows * (row + of_rank * w.rank + of_vector * vectors);
}

static Product product_of(const Product& product, const Coded& signs) { return {&signs, nullptr, nullptr, 1, Number::f32, product.digits}; }

// How the memory of the inputs is divided, in numbers of 32 bits: for each vector and rank what its product with the signs reads; then the inputs.
struct Plan {
  int64_t each, inputs, floats;

  explicit Plan(const Product& product) {
    const Coded &w = *product.matrix, signs = signs_of(w, 0, w.rows);
    each = rounded_up(sum_lines::prepared_floats(product_of(product, signs)), lanes);
    inputs = product.vectors * w.rank * each;
    floats = inputs + product.vectors * w.columns;
  }
};

static int64_t prepared_floats(const Product& product) { return Plan(product).floats; }

static void prepare(const Product& product, int64_t vector, float* room) {
  const int64_t columns = product.matrix->columns;
  if (vector >= product.vectors) return;
  read_numbers(product.inputs, vector * columns, product.number, columns, room + Plan(product).inputs + vector * columns);
}

static int64_t parts(const Product& product) { return product.vectors * product.matrix->rank; }

// The tables of a vector and a rank. Bits of a byte are columns from the last to the first, so that inputs are reversed by eights.
static void make_part(const Product& product, int64_t part, float* room) {
  const Coded &w = *product.matrix, signs = signs_of(w, 0, w.rows);
  const Plan plan(product);
  const float* inputs = room + plan.inputs + part / w.rank * w.columns;
  float* values = room + part * plan.each;  // where tables will be, which are no smaller
  read_numbers(w.right, part % w.rank * w.columns, w.number, w.columns, values);
  const __m512i order = _mm512_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8);
  for (int64_t c = 0; c < w.columns; c += lanes) store(values + c, _mm512_permutexvar_ps(order, multiply(load(inputs + c), load(values + c))));
  Product some = product_of(product, signs);
  some.inputs = values;
  sum_lines::prepare(some, 0, values);
  for (int64_t i = 0; i < sum_lines::parts(some); ++i) sum_lines::make_part(some, i, values);
}

static inline int64_t padded_rank(const Coded& w) { return rounded_up(w.rank, line_rows); }

// What signs make of each rank, the left factor rank by rank, and room to bring it there.
static int64_t scratch_floats(const Coded& w) {
  return w.rank * strip_rows + padded_rank(w) * (strip_rows + line_rows) + sum_lines::scratch_floats(signs_of(w, 0, w.rows));
}

// The left factor of some rows, whole sixteens of them, as `[rank, strip]`.
static void turn_left(const Coded& w, int64_t first, int64_t rows, float* turned, float* room) {
  const int64_t rank = padded_rank(w);
  for (int64_t row = 0; row < rows; row += line_rows) {
    for (int64_t r = 0; r < line_rows; ++r) {
      read_numbers(w.left, (first + row + r) * w.rank, w.number, w.rank, room + r * rank);
      for (int64_t k = w.rank; k < rank; ++k) room[r * rank + k] = 0.0f;
    }
    transpose_words(reinterpret_cast<const uint32_t*>(room), rank, rank, reinterpret_cast<uint32_t*>(turned + row), strip_rows);
  }
}

// Rows first to last, whole sixteens of them.
static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const Plan plan(product);
  float *found = scratch, *left = found + w.rank * strip_rows, *room = left + padded_rank(w) * strip_rows;
  float* rest = room + padded_rank(w) * line_rows;
  for (int64_t row = first; row < last; row += strip_rows) {
    const int64_t rows = least(strip_rows, last - row);
    const Coded signs = signs_of(w, row, rows);
    turn_left(w, row, rows, left, room);
    for (int64_t v = 0; v < product.vectors; ++v) {
      for (int64_t k = 0; k < w.rank; ++k) {
        Product some = product_of(product, signs);
        some.outputs = found + k * strip_rows;
        sum_lines::multiply(some, prepared + (v * w.rank + k) * plan.each, 0, rows, rest);
      }
      for (int64_t at = 0; at < rows; at += line_rows) {
        Floats total = zeros();
        for (int64_t k = 0; k < w.rank; ++k) total = multiply_add(load(left + k * strip_rows + at), load(found + k * strip_rows + at), total);
        put_sixteen(product, v * w.rows + row + at, 0xffff, total);
      }
    }
  }
}

}  // namespace signed_lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits
