// Matrices of codewords: a code stands for `unit` neighbouring numbers, and each group of them is the sum of one codeword of each
// codebook. Codewords run along a row, or, transposed, down a column.
#pragma once
#include <utility>

#include "grid.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace vectors {

constexpr int64_t tile = tile_vectors;  // input vectors that share a codeword once it is read

static inline int64_t groups(const Coded& w) { return ceiling(w.transposed ? w.rows : w.columns, w.unit); }
static inline int64_t code_rows(const Coded& w) { return w.transposed ? w.columns : w.rows; }
static inline int64_t input_floats(const Coded& w) { return w.transposed ? rounded_up(w.columns, lanes) : rounded_up(groups(w) * w.unit, lanes); }
static inline int64_t book_floats(const Coded& w) { return w.entries * w.unit; }
static inline int64_t padded_vectors(int64_t count) { return count == 1 ? 1 : rounded_up(count, tile); }

// Whether codewords are read as the halves that are stored, where floats would take more than the second cache has.
static inline bool reads_halves(const Coded& w) {
#ifdef __F16C__
  return w.number == Number::f16 && w.unit == 8 && w.books == 1 && !w.transposed && book_floats(w) > 1 << 17;
#else
  return (void)w, false;
#endif
}

static inline bool makes_floats(const Coded& w) { return w.number != Number::f32 && !reads_halves(w); }

// Inputs, one vector after the other, then the codebooks as floats unless they are, or are read as they are.
static int64_t prepared_floats(const Product& product) {
  const Coded& w = *product.matrix;
  return padded_vectors(product.vectors) * input_floats(w) + (makes_floats(w) ? w.books * book_floats(w) : 0);
}

static const float* find_books(const Product& product, const float* prepared) {
  const Coded& w = *product.matrix;
  return w.number == Number::f32 ? static_cast<const float*>(w.indices) : prepared + padded_vectors(product.vectors) * input_floats(w);
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  const int64_t there = vector < product.vectors ? w.columns : 0, all = input_floats(w);
  if (vector == 0 && makes_floats(w)) {
    read_numbers(w.indices, 0, w.number, w.books * book_floats(w), room + padded_vectors(product.vectors) * all);
  }
  float* to = room + vector * all;
  read_numbers(product.inputs, vector * w.columns, product.number, there, to);
  for (int64_t c = there; c < all; ++c) to[c] = 0.0f;
  if (w.transposed && w.scales.kind != Values::none) for (int64_t c = 0; c < there; ++c) to[c] *= number_at(w.scales.data, c, w.scales.number);
}

// Codes at a time are those of a row, or of the groups that a thread has; transposed, the outputs of a tile are in the scratch too.
static int64_t scratch_floats(const Coded& w) { return groups(w) * w.books + (w.transposed ? tile * groups(w) * w.unit : 0) + 16; }

// One code that begins at a bit of a row; no byte from `end` on is read.
static inline uint32_t code_at(const uint8_t* row, uint64_t bit, int bits, const uint8_t* end) {
  const uint8_t* from = row + bit / 8;
  uint32_t word = 0;
  std::memcpy(&word, from, from + 4 <= end ? 4 : static_cast<size_t>(end - from));
  return word >> (bit % 8) & ((uint32_t{1} << bits) - 1);
}

// Eight codes are as many bytes as a code has bits.
template <int Bits, int... Place>
static inline void unpack_eight(const uint8_t* from, uint32_t* out, std::integer_sequence<int, Place...>) {
  uint32_t words[8];
  (std::memcpy(&words[Place], from + Place * Bits / 8, 4), ...);
  ((out[Place] = words[Place] >> (Place * Bits % 8) & ((uint32_t{1} << Bits) - 1)), ...);
}

template <int Bits>
static void unpack_wide(const uint8_t* row, uint64_t from, uint64_t to, const uint8_t* end, uint32_t* out) {
  if constexpr (Bits == 8) {  // whole bytes, many in one instruction
    for (uint64_t i = from; i < to; ++i) out[i - from] = row[i];
    return;
  }
  for (; from < to && from % 8 != 0; ++from) *out++ = code_at(row, from * Bits, Bits, end);
  for (; from + 8 <= to && row + from / 8 * Bits + Bits + 4 <= end; from += 8, out += 8) {
    unpack_eight<Bits>(row + from / 8 * Bits, out, std::make_integer_sequence<int, 8>{});
  }
  for (; from < to; ++from) *out++ = code_at(row, from * Bits, Bits, end);
}

using Unpack = void (*)(const uint8_t* row, uint64_t from, uint64_t to, const uint8_t* end, uint32_t* out);

template <int... Before>
static constexpr Unpack find_unpack(int bits, std::integer_sequence<int, Before...>) {
  constexpr Unpack found[] = {unpack_wide<Before + 1>...};
  return found[bits - 1];
}

static bool all_have_words(const Coded& w, const uint32_t* codes, int64_t count) {
  if (w.entries == int64_t{1} << w.bits) return true;
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = codes[i] > largest ? codes[i] : largest;
  return largest < w.entries;
}

// Rows of codes of which 64 lie side by side; those behind lie one after another.
static inline int64_t rows_in_lines(const Coded& w) { return w.lines ? code_rows(w) / word_rows * word_rows : 0; }

// Codes `from` to `from + count` of a row as numbers. Returns whether each of them has a codeword.
static bool unpack_codes(const Coded& w, int64_t row, int64_t from, int64_t count, uint32_t* out) {
  if (row < rows_in_lines(w)) {
    const uint8_t* code = w.codes + row / word_rows * word_rows * w.row_bytes + from * word_rows + row % word_rows;
    for (int64_t i = 0; i < count; ++i) out[i] = code[i * word_rows];
    return all_have_words(w, out, count);
  }
  const auto unpack = find_unpack(w.bits, std::make_integer_sequence<int, 16>{});
  unpack(w.codes + row * w.row_bytes, static_cast<uint64_t>(from), static_cast<uint64_t>(from + count), w.codes + w.code_bytes, out);
  return all_have_words(w, out, count);
}

template <int Unit>
struct Word {
  typedef float Type __attribute__((vector_size(Unit * 4)));
  static inline Type read(const float* from) {
    Type word;
    std::memcpy(&word, from, Unit * 4);
    return word;
  }
  // Halves as floats.
  static inline Type read(const uint16_t* from) {
#ifdef __F16C__
    if constexpr (Unit == 8) return reinterpret_cast<Type>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
    float numbers[Unit];
    for (int i = 0; i < Unit; ++i) numbers[i] = half_to_float(from[i]);
    return read(numbers);
  }
  static inline void write(float* to, const Type& word) { std::memcpy(to, &word, Unit * 4); }
};

// The sum of a group's codewords; Books of 0 are as many as `w` says.
template <int Unit, int Books, typename Element>
static inline typename Word<Unit>::Type find_group(const Coded& w, const Element* books, const uint32_t* codes) {
  typename Word<Unit>::Type found = Word<Unit>::read(books + codes[0] * Unit);
  const int64_t count = Books == 0 ? w.books : Books;
  for (int64_t book = 1; book < count; ++book) found += Word<Unit>::read(books + book * book_floats(w) + codes[book] * Unit);
  return found;
}

template <int Unit, int Books, int Vectors, typename Element>
static void multiply_row(const Coded& w, const Element* books, const uint32_t* codes, const float* inputs, float* sums) {
  using Sum = typename Word<Unit>::Type;
  constexpr int sets = Vectors == 1 ? 4 : 1;  // sums that do not wait for each other
  const int64_t count = groups(w), step = Books == 0 ? w.books : Books, stride = input_floats(w);
  Sum found[sets][Vectors] = {};
  int64_t group = 0;
  for (; group + sets <= count; group += sets) {
    for (int s = 0; s < sets; ++s) {
      const Sum weights = find_group<Unit, Books>(w, books, codes + (group + s) * step);
      for (int v = 0; v < Vectors; ++v) found[s][v] += weights * Word<Unit>::read(inputs + v * stride + (group + s) * Unit);
    }
  }
  for (; group < count; ++group) {
    const Sum weights = find_group<Unit, Books>(w, books, codes + group * step);
    for (int v = 0; v < Vectors; ++v) found[0][v] += weights * Word<Unit>::read(inputs + v * stride + group * Unit);
  }
  for (int v = 0; v < Vectors; ++v) {
    for (int s = 1; s < sets; ++s) found[0][v] += found[s][v];
    float total = 0.0f;
    for (int i = 0; i < Unit; ++i) total += found[0][v][i];
    sums[v] = total;
  }
}

template <int Unit, int Books, typename Element>
static void multiply_rows(const Product& product, const Element* books, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  uint32_t* codes = reinterpret_cast<uint32_t*>(scratch);
  for (int64_t row = first; row < last; ++row) {
    if (!unpack_codes(w, row, 0, groups(w) * w.books, codes)) return product.broken->store(true);
    const float scale = w.scales.kind == Values::none ? 1.0f : number_at(w.scales.data, row, w.scales.number);
    for (int64_t v = 0; v < product.vectors; v += tile) {
      float sums[tile];
      const float* inputs = prepared + v * input_floats(w);
      if (product.vectors == 1) multiply_row<Unit, Books, 1>(w, books, codes, inputs, sums);
      else multiply_row<Unit, Books, tile>(w, books, codes, inputs, sums);
      for (int64_t i = 0; i < least(tile, product.vectors - v); ++i) put_number(product.outputs, (v + i) * w.rows + row, product.number, sums[i] * scale);
    }
  }
}

// Outputs first to last, a multiple of the unit: each column's codewords times its input are added to them.
template <int Unit, int Books, int Vectors>
static void add_columns(const Product& product, const float* prepared, int64_t vector, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const float* books = find_books(product, prepared);
  const int64_t from = first / Unit, count = ceiling(last, Unit) - from, step = Books == 0 ? w.books : Books, stride = input_floats(w);
  uint32_t* codes = reinterpret_cast<uint32_t*>(scratch);
  float* sums = scratch + groups(w) * w.books;
  for (int64_t i = 0; i < Vectors * count * Unit; ++i) sums[i] = 0.0f;
  for (int64_t column = 0; column < w.columns; ++column) {
    if (!unpack_codes(w, column, from * step, count * step, codes)) return product.broken->store(true);
    __builtin_prefetch(w.codes + least(column + 8, w.columns - 1) * w.row_bytes + from * step * w.bits / 8, 0, 2);
    float input[Vectors];
    for (int v = 0; v < Vectors; ++v) input[v] = prepared[(vector + v) * stride + column];
    for (int64_t group = 0; group < count; ++group) {
      const auto weights = find_group<Unit, Books>(w, books, codes + group * step);
      for (int v = 0; v < Vectors; ++v) {
        float* to = sums + (v * count + group) * Unit;
        Word<Unit>::write(to, Word<Unit>::read(to) + weights * input[v]);
      }
    }
  }
  for (int64_t v = 0; v < least(Vectors, product.vectors - vector); ++v) {
    for (int64_t row = first; row < last; ++row) put_number(product.outputs, (vector + v) * w.rows + row, product.number, sums[v * count * Unit + row - first]);
  }
}

template <int Unit, int Books>
static void multiply_some(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
#ifdef __F16C__
  if constexpr (Unit == 8 && Books == 1) {
    if (reads_halves(*product.matrix)) {
      return multiply_rows<Unit, Books>(product, static_cast<const uint16_t*>(product.matrix->indices), prepared, first, last, scratch);
    }
  }
#endif
  if (!product.matrix->transposed) return multiply_rows<Unit, Books>(product, find_books(product, prepared), prepared, first, last, scratch);
  if (product.vectors == 1) return add_columns<Unit, Books, 1>(product, prepared, 0, first, last, scratch);
  for (int64_t v = 0; v < product.vectors; v += tile) add_columns<Unit, Books, tile>(product, prepared, v, first, last, scratch);
}

template <int Unit>
static void multiply_unit(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  if (product.matrix->books == 1) return multiply_some<Unit, 1>(product, prepared, first, last, scratch);
  if (product.matrix->books == 2) return multiply_some<Unit, 2>(product, prepared, first, last, scratch);
  multiply_some<Unit, 0>(product, prepared, first, last, scratch);
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  if (product.matrix->unit == 4) return multiply_unit<4>(product, prepared, first, last, scratch);
  if (product.matrix->unit == 8) return multiply_unit<8>(product, prepared, first, last, scratch);
  multiply_unit<16>(product, prepared, first, last, scratch);
}

// ---- decoding -------------------------------------------------------------------------------------------------------------

// A codeword of any type.
template <int Unit>
static inline typename Word<Unit>::Type word_at(const Coded& w, int64_t book, uint32_t code) {
  const int64_t at = book * book_floats(w) + int64_t{code} * Unit;
  if (w.number == Number::f32) return Word<Unit>::read(static_cast<const float*>(w.indices) + at);
  const uint16_t* from = static_cast<const uint16_t*>(w.indices) + at;
  if (w.number == Number::f16) return Word<Unit>::read(from);
  float numbers[Unit];
  for (int i = 0; i < Unit; ++i) numbers[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
  return Word<Unit>::read(numbers);
}

// A row of what lies along rows, every code of which has a codeword, as the definition adds them up.
template <int Unit>
static void decode_row(const Coded& w, int64_t row, float* out, uint32_t* codes) {
  unpack_codes(w, row, 0, groups(w) * w.books, codes);
  const float scale = w.scales.kind == Values::none ? 1.0f : number_at(w.scales.data, row, w.scales.number);
  for (int64_t group = 0; group < groups(w); ++group, codes += w.books) {
    auto sum = word_at<Unit>(w, 0, codes[0]);
    for (int64_t book = 1; book < w.books; ++book) sum += word_at<Unit>(w, book, codes[book]);
    Word<Unit>::write(out + group * Unit, sum * scale);
  }
}

static int64_t decode_floats(const Coded& w) { return groups(w) * (w.books + w.unit) + 16; }

static void decode(const Coded& w, int64_t first, int64_t last, void* out, Number number, float* scratch) {
  uint32_t* codes = reinterpret_cast<uint32_t*>(scratch);
  float* values = scratch + groups(w) * w.books;
  const auto decode_one = w.unit == 4 ? decode_row<4> : w.unit == 8 ? decode_row<8> : decode_row<16>;
  for (int64_t row = first; row < last; ++row) {
    decode_one(w, row, values, codes);
    for_number(number, [&](auto type) { write_numbers(type, values, w.columns, out, (row - first) * w.columns); });
  }
}

}  // namespace vectors
}  // namespace FEWBITS_ISA
}  // namespace fewbits
