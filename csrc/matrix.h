// What the kernels see: pointers, sizes and how numbers are written. No torch, no Python.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fewbits {

enum class Number : int { f32 = 0, f16 = 1, bf16 = 2 };

struct Coded;

// In the place of a width of codes: a byte holds five of them, of three values, as the digits of a number to the base of three, the first
// column's the lowest. What is 243 or more counts as 243 less.
constexpr int base_three = 9;

constexpr int64_t packed_bytes(int64_t columns, int bits) { return bits == base_three ? (columns + 4) / 5 : (columns * bits + 7) / 8; }

// The code in the middle of all.
constexpr float middle_code(int bits) { return bits == base_three ? 1.0f : static_cast<float>(1 << (bits - 1)); }

// A small table of real numbers [rows, columns] beside the codes: scales, zero points, offsets or levels. One row serves all rows; or one a run of
// neighbouring rows, whose ends are told.
struct Values {
  enum Kind : int {
    none = 0,    // nothing stored
    dense = 1,   // numbers of type `number`
    packed = 2,  // unsigned integers of the codes' width, packed as the codes are
    coded = 3,   // a coded matrix of its own: the second level of a two-level grid
    table = 4,   // bytes that look their value up in `lookup[256]`
    signs = 5,     // in a layout, before offsets: of codes that count as signs
    runs = 6,      // in a layout: numbers, of each run of rows its own, which are `dense` once they are read
    minimums = 7,  // in a layout, before offsets: of codes that count from zero
  };
  Kind kind = none;
  Number number = Number::f32;
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  const float* lookup = nullptr;
  const Coded* inner = nullptr;
  const int64_t* ends = nullptr;  // [rows], ascending: the row behind each run; nullptr where rows are not in runs
  bool lines = false;             // sixteen rows at a time: number after number of each of them, or byte after byte where they are packed
};

// Bytes of a row of numbers; of packed ones of a width of `bits`.
constexpr int64_t row_bytes_of(const Values& values, int bits) {
  if (values.kind == Values::packed) return (values.columns * bits + 7) / 8;
  return values.columns * (values.kind == Values::table ? 1 : values.number == Number::f32 ? 4 : 2);
}

// Bytes of a row that lie together where it lies in lines.
constexpr int64_t item_of(const Values& values) {
  return values.kind == Values::packed || values.kind == Values::table ? 1 : values.number == Number::f32 ? 4 : 2;
}

// A matrix [rows, columns] of packed codes: value = (code - zero) * scale, levels[code] * scale, code * scale + offset, or
// (2 code - 1) * scale + offset.
// Every row is a little-endian bit stream that begins at a byte; `group` neighbouring columns share a scale.
//
// Where they are `lines`, the rows' words of 32 bits lie sixteen rows at a time: word 0 of each of them, then word 1 of each; ternary codes
// whose rows are not of whole words by halves of words. So do numbers that each row has for itself.
//
// Or, for what is added to such a matrix: numbers as they are in the place of the codes (`plain`), or the entries of compressed
// sparse rows, their columns in `indices` and each row's beginning in `pointers` (`sparse`).
//
// Or codewords (`vectors`): `unit` neighbouring numbers of a row, or of a column where `transposed`, are the sum of a codeword of each of
// `books` codebooks `[books, entries, unit]`, which are in `indices`; scales are one for each row of codes. Where they are `lines`, codes are
// bytes, and of every 64 rows of codes the first codes lie side by side, then the second ones; rows that are left lie behind, one after another.
//
// Or the product of two thin factors, `left [rows, rank]` and `right [rank, columns]`, entry by entry times a sign (`signed_product`): codes
// are one stream of bits over the whole matrix, 1 for plus, the first entry the highest bit of its byte. Where they are `lines`, rows are of whole
// words, which lie as those of packed codes do.
//
// Or groups of two widths (`mixed`): `flags`, one bit a group, say which are of `wide_bits`, in every row equally many. The codes of a row's
// narrow groups lie one behind the other, and in `wide` those of the others.
struct Coded {
  enum Form : int { packed = 0, plain = 1, sparse = 2, vectors = 3, signed_product = 4, mixed = 5 };
  Form form = packed;
  Number number = Number::f32;  // of plain numbers, sparse entries, codebooks and factors
  const void* indices = nullptr;
  int64_t index_bytes = 0;
  const int32_t* pointers = nullptr;
  int64_t entries = 0;  // of sparse rows, or of a codebook
  int64_t unit = 0, books = 0;
  const void *left = nullptr, *right = nullptr;
  int64_t rank = 0;
  const uint8_t *wide = nullptr, *flags = nullptr;
  int wide_bits = 0;
  int64_t wide_groups = 0, wide_row_bytes = 0;
  bool transposed = false;
  bool lines = false;
  const uint8_t* codes = nullptr;
  int64_t code_bytes = 0;
  int64_t row_bytes = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int bits = 0;
  int64_t group = 0;
  int64_t groups = 0;
  int64_t level_groups = 0;  // 1: one codebook for a row's groups; else one for each group
  // Which code stands for zero where no zero points are stored: the middle one, 0, or none, as codes are 0 and 1 for -1 and 1.
  // `zeros` are zero points with the first, and offsets with the others: they are added to what codes are scaled to.
  enum Counts : int { from_middle = 0, from_zero = 1, as_signs = 2 };
  Counts counts = from_middle;
  Values levels, scales, zeros;
};

// value = (code - zero) * step * scale + offset, whatever codes count from.
constexpr float zero_of(const Coded& w) { return w.counts == Coded::from_middle ? middle_code(w.bits) : w.counts == Coded::as_signs ? 0.5f : 0.0f; }
constexpr float step_of(const Coded& w) { return w.counts == Coded::as_signs ? 2.0f : 1.0f; }
constexpr bool has_zero_points(const Coded& w) { return w.counts == Coded::from_middle && w.zeros.kind != Values::none; }
constexpr bool has_offsets(const Coded& w) { return w.counts != Coded::from_middle && w.zeros.kind != Values::none; }

// outputs[vectors, rows] = inputs[vectors, columns] * matrix^T, both of type `number`.
struct Product {
  const Coded* matrix;
  const void* inputs;
  void* outputs;
  int64_t vectors;
  Number number;
  int digits = 3;  // of 8 bits, that an input may be rounded to where kernels compute in fixed point
  std::atomic<bool>* broken = nullptr;  // set where a sparse matrix points outside of itself
  Number given = Number::f32;   // what inputs were before they were made ready, where kernels of one vector make use of it
  const float* base = nullptr;  // [vectors, rows], where there is one: what products are added to before they are rounded, by plain numbers and sparse rows
};

struct FeedBack;  // feedback_job.h
struct Rotation;  // rotation_job.h
struct Panels;    // panels.h
struct GramKernels;  // gram_job.h

// What one instruction set offers. Every function works on a range and on memory it is handed, so that threads share nothing.
struct Kernels {
  const char* name;
  int64_t (*prepared_floats)(const Product&);                   // room for the inputs in the kernel's order
  void (*prepare)(const Product&, int64_t vector, float* room);  // one input vector (0 <= vector < padded_vectors)
  int64_t (*padded_vectors)(int64_t vectors);
  int64_t (*parts)(const Product&);                               // of what is made of the inputs once they are ready; mostly none
  void (*make_part)(const Product&, int64_t part, float* room);
  int64_t (*scratch_floats)(const Coded&, int64_t vectors);  // room that a thread needs for itself
  void (*multiply)(const Product&, const float* prepared, int64_t first, int64_t last, float* scratch);
  void (*decode)(const Coded&, int64_t first, int64_t last, void* out, Number number, float* scratch);
  void (*feed_back)(const FeedBack&, int64_t row, int64_t count);  // at most feedback_rows rows
  void (*rotate)(const Rotation&, int64_t vector, float* scratch);  // which has room for two vectors
  const Panels* (*panels)(const Product&);                          // of many vectors; nullptr where there are none for such a one
  bool (*reads_lines)(const Coded&);                                // as they are, what lies in lines; nullptr where nothing does
  const GramKernels* (*gram)(Number);                               // for inputs of a type; nullptr where there are none
};

constexpr int64_t feedback_rows = 32;
constexpr int64_t line_rows = 16;  // whose codes share a line of 64 bytes, where codes lie in lines
constexpr int64_t chunk_rows = 32;  // rows of a matrix that a thread takes at a time
constexpr int64_t word_rows = 64;   // rows of codewords that share a line

// Bytes of a row's codes that lie together where they lie in lines: a word, or half of one where rows are not of whole words.
constexpr int64_t word_of(const Coded& w) { return w.row_bytes % 4 == 0 ? 4 : 2; }

}  // namespace fewbits
