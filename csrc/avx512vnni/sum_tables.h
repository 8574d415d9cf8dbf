// The tables of sums that products of sum_lines.h look codes up in, and what inputs are before: numbers in the units of their groups.
#pragma once
#include <numeric>

#include "lines.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace sum_lines {

constexpr int64_t word_bytes = 4;
constexpr int64_t least_group = 16;         // columns; smaller ones would have tables for little but zeros
constexpr int64_t longest_group = 1 << 20;  // columns whose sums stay in 32 bits
constexpr int64_t part_words = 64;          // that a thread makes tables for at a time
constexpr int64_t most_bytes = 32 << 20;    // of tables that are there at once
constexpr int64_t most_plane_bytes = word_bytes * (32 + 16);
constexpr int finer = 2;                    // bits that numbers of tables may have beyond those of inputs in fixed point

// ---- what is prepared -------------------------------------------------------------------------------------------------------

static inline int64_t word_columns(const Coded& w) { return w.bits == base_three ? 20 : 32; }
static inline int64_t plane_bytes(const Coded& w) { return word_bytes * (w.bits == base_three ? 32 + 16 : 16 + 16); }
static inline int64_t first_word(const Coded& w, int64_t group) { return group * w.group / word_columns(w); }
static inline int64_t end_word(const Coded& w, int64_t group) { return ceiling(least((group + 1) * w.group, w.columns), word_columns(w)); }

// Words with tables: all of a row, and those in which a group ends once more.
static int64_t words_of(const Coded& w) {
  const int64_t columns = word_columns(w), inside = w.groups - 1, every = columns / std::gcd(columns, w.group);  // such an end is a word's, too
  return ceiling(w.columns, columns) + inside - inside / every;
}

static bool serves(const Coded& w, int64_t vectors) {
  const bool signs = w.counts == Coded::as_signs && w.columns % 32 == 0 && (w.groups == 1 || w.group % 32 == 0);
  const bool trits = w.bits == base_three && (w.groups == 1 || w.group >= least_group), ours = w.form == Coded::packed && w.lines && (signs || trits);
  return ours && least(w.group, w.columns) <= longest_group && words_of(w) <= most_bytes / (3 * most_plane_bytes) / vectors;
}

// How the memory of a vector's inputs is divided, in numbers of 32 bits: tables, then two words of multipliers for each of their words, the
// groups' units and sums, and the inputs in units.
struct Plan {
  int64_t words, multipliers, units, sums, values, floats;

  explicit Plan(const Product& product) {
    const Coded& w = *product.matrix;
    words = words_of(w);
    multipliers = words * product.digits * plane_bytes(w) / 4;
    units = multipliers + rounded_up(2 * words, lanes);
    sums = units + padded_groups(w);
    values = sums + padded_groups(w);
    floats = values + rounded_up(w.columns, lanes);
  }
};

static int64_t prepared_floats(const Product& product) { return product.vectors * Plan(product).floats; }

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  if (vector >= product.vectors) return;
  const Plan plan(product);
  float *values = room + vector * plan.floats + plan.values, *units = room + vector * plan.floats + plan.units, *sums = room + vector * plan.floats + plan.sums;
  read_numbers(product.inputs, vector * w.columns, product.number, w.columns, values);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t first = g * w.group, count = least(w.group, w.columns - first);
    sums[g] = sum_of(values + first, count);
    units[g] = fixed::find_unit(values + first, count, 8 * product.digits - 1 + finer);
    const float by = units[g] == units[g] ? 1.0f / units[g] : 0.0f;
    for (int64_t c = first; c < first + count; ++c) values[c] = by == 0.0f ? 0.0f : values[c] * by;
  }
}

// ---- tables -----------------------------------------------------------------------------------------------------------------

// How a byte's codes are divided, and what its inputs are multiplied with at each place of a table.
//
// Of ternary codes, these less 1. What is looked up for a byte without its lowest bit, for two neighbouring ones, is taken away from it, and that
// is its place in the first table; some bits of it are the place in the last. Mostly it is the first byte with the same last two codes, less 2:
//
//   places 0, 1      bytes 80 and 81, which differ in all codes: the fifth input's half is in the last table for both
//   places 2..28     first three codes
//   place 29         27, 135 and 189, for which the last table says what it does for 26, 134 and 188: a fourth code of one less
//   places 30, 31    242 and 243: all five codes, and nothing is in the last table. Bytes of 243 and more count as 243 less
struct Trits {
  static constexpr int64_t columns = 5, firsts = 5, before_last = 3, places[2] = {32, 16};
  static constexpr int64_t pair_apart = 16, half_apart = 32;  // in the last table
  static constexpr uint8_t in_last = 0x27;                    // bits of `from`, of no two that differ in their last two codes the same
  alignas(64) float first[5][32], last[2][16];
  alignas(64) uint8_t from[128], order[2][64];  // in which 32 numbers of a table leave two registers
  constexpr Trits() : first{}, last{}, from{}, order{} {
    for (int i = 0; i < 27; ++i) first[0][2 + i] = i % 3 - 1.0f, first[1][2 + i] = i / 3 % 3 - 1.0f, first[2][2 + i] = i / 9 - 1.0f;
    for (int i = 0; i < 5; ++i) {
      first[i][0] = i < 4 ? 1.0f : -0.5f, first[i][1] = -first[i][0];
      first[i][29] = i < 3 ? -1.0f : i == 3 ? 1.0f : 0.0f;
      first[i][30] = 1.0f, first[i][31] = -1.0f;
    }
    for (int i = 0; i < 128; ++i) {
      const int byte = 2 * i, fours = byte / 27;
      from[i] = static_cast<uint8_t>(byte == 80 ? byte : byte == 242 ? byte - 30 : 27 * fours - 2);
      const int place = (from[i] & 7) | (from[i] >> 2 & 8);
      last[0][place] = byte == 80 || byte == 242 ? 0.0f : fours % 3 - 1.0f;
      last[1][place] = byte == 80 ? -0.5f : byte == 242 ? 0.0f : fours / 3 % 3 - 1.0f;
    }
    for (int i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint8_t>(4 * i);
      order[1][i] = static_cast<uint8_t>(4 * (i % 8 + i / 8 % 2 * 16 + i / 16 * 8));  // of two bytes of a word: eight numbers of each, and eight
    }
  }
};

struct Signs {
  static constexpr int64_t columns = 8, firsts = 4, before_last = 4, places[2] = {16, 16};
  static constexpr int64_t pair_apart = 32, half_apart = 16;
  alignas(64) float first[4][16], last[4][16];
  alignas(64) uint8_t order[2][64];
  constexpr Signs() : first{}, last{}, order{} {
    for (int i = 0; i < 64; ++i) first[i / 16][i % 16] = last[i / 16][i % 16] = (i % 16 >> i / 16 & 1) != 0 ? 1.0f : -1.0f;
    for (int i = 0; i < 32; ++i) order[0][i] = order[1][i] = static_cast<uint8_t>(4 * i);
  }
};

template <class Kind>
alignas(64) static constexpr Kind codes;

// Where those inputs are among a word's that come first of each byte's; then those that come second.
template <class Kind>
struct Columns {
  alignas(64) int32_t of[8][word_bytes];
  constexpr Columns() : of{} {
    for (int64_t i = 0; i < Kind::columns * word_bytes; ++i) of[i % Kind::columns][i / Kind::columns] = static_cast<int32_t>(i);
  }
};

template <class Kind>
alignas(64) static constexpr Columns<Kind> columns_of;

// Inputs in that order.
struct Inputs {
  alignas(64) float of[8][word_bytes];
};

// Inputs `begin` to `end` of each byte in units in which all their sums fit; the multipliers that say so, a byte each.
template <int Planes>
static inline uint32_t scale(const Inputs& inputs, int64_t begin, int64_t end, Inputs& scaled) {
  constexpr float one_of_most = (1.0f + 1e-6f) / static_cast<float>((1 << (8 * Planes - 1)) - 1);  // sums are rounded
  __m128 reach = _mm_setzero_ps();
  for (int64_t i = begin; i < end; ++i) reach = _mm_add_ps(reach, _mm_andnot_ps(_mm_set1_ps(-0.0f), _mm_load_ps(inputs.of[i])));
  const __m128i above = _mm_srli_epi32(_mm_add_epi32(_mm_castps_si128(_mm_mul_ps(reach, _mm_set1_ps(one_of_most))), _mm_set1_epi32(0x7fffff)), 23);
  const __m128i one = _mm_set1_epi32(127), exponents = _mm_sub_epi32(_mm_max_epi32(above, one), one);
  const __m128 by = _mm_castsi128_ps(_mm_slli_epi32(_mm_sub_epi32(one, exponents), 23));
  for (int64_t i = begin; i < end; ++i) _mm_store_ps(scaled.of[i], _mm_mul_ps(_mm_load_ps(inputs.of[i]), by));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_cvtepi32_epi8(_mm_sllv_epi32(_mm_set1_epi32(1), exponents))));
}

// Sixteen numbers of the table of byte `place`.
template <int64_t Count, int64_t Places>
static inline __m512i make_numbers(const float (*all)[Places], const float (*inputs)[word_bytes], int64_t place, int64_t at) {
  __m512 sums = _mm512_mul_ps(_mm512_set1_ps(inputs[0][place]), _mm512_load_ps(all[0] + at));
#pragma GCC unroll 4
  for (int64_t i = 1; i < Count; ++i) sums = _mm512_fmadd_ps(_mm512_set1_ps(inputs[i][place]), _mm512_load_ps(all[i] + at), sums);
  return _mm512_cvtps_epi32(sums);
}

// Bytes of 32 numbers into each plane, sixteen at a time.
template <int Planes>
static inline void put_numbers(__m512i low, __m512i high, const uint8_t* order, uint8_t* to, int64_t plane_apart, int64_t half_apart) {
#pragma GCC unroll 4
  for (int plane = 0; plane < Planes; ++plane) {
    const __m512i wanted = _mm512_add_epi8(_mm512_load_si512(order), _mm512_set1_epi8(static_cast<char>(Planes - 1 - plane)));
    const __m256i bytes = _mm512_castsi512_si256(_mm512_permutex2var_epi8(low, wanted, high));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + plane * plane_apart), _mm256_castsi256_si128(bytes));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + plane * plane_apart + half_apart), _mm256_extracti128_si256(bytes, 1));
  }
}

// Tables of the word that begins at `inputs`, of those of its columns that `there` says.
template <class Kind, int Planes>
static void make_word(const float* inputs, uint32_t there, uint8_t* to, uint32_t* multipliers) {
  constexpr int64_t lasts = Kind::columns - Kind::before_last, first_bytes = word_bytes * Kind::places[0], last_bytes = word_bytes * Kind::places[1];
  const Kind& all = codes<Kind>;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), inputs);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), inputs + 16);
  Inputs ordered, of_first{}, of_last{};
  for (int i = 0; i < 8; i += 4) _mm512_store_ps(ordered.of[i], _mm512_permutex2var_ps(low, _mm512_load_si512(columns_of<Kind>.of[i]), high));
  multipliers[0] = scale<Planes>(ordered, 0, Kind::firsts, of_first);
  multipliers[1] = scale<Planes>(ordered, Kind::before_last, Kind::columns, of_last);
  asm("" : "+m"(of_first), "+m"(of_last));  // numbers are loaded to all places of a register: moving them there from registers takes shuffles
#pragma GCC unroll 4
  for (int64_t i = 0; i < first_bytes; i += 32) {
    const __m512i numbers = make_numbers<Kind::firsts>(all.first, of_first.of, i / Kind::places[0], 0);
    const __m512i behind = make_numbers<Kind::firsts>(all.first, of_first.of, (i + 16) / Kind::places[0], Kind::places[0] - 16);
    put_numbers<Planes>(numbers, behind, all.order[0], to + i, first_bytes, 16);
  }
  to += Planes * first_bytes;
#pragma GCC unroll 2
  for (int64_t pair = 0; pair < 2; ++pair) {
    const float(*of)[word_bytes] = of_last.of + Kind::before_last;
    put_numbers<Planes>(make_numbers<lasts>(all.last, of, 2 * pair, 0), make_numbers<lasts>(all.last, of, 2 * pair + 1, 0), all.order[1],
                        to + pair * Kind::pair_apart, last_bytes, Kind::half_apart);
  }
}

template <class Kind>
static auto find_make(int planes) {
  return planes == 1 ? make_word<Kind, 1> : planes == 2 ? make_word<Kind, 2> : make_word<Kind, 3>;
}

static int64_t parts(const Product& product) { return product.vectors * ceiling(words_of(*product.matrix), part_words); }

static void make_part(const Product& product, int64_t part, float* room) {
  const Coded& w = *product.matrix;
  const Plan plan(product);
  const int64_t each = ceiling(plan.words, part_words), begin = part % each * part_words, end = least(begin + part_words, plan.words);
  room += part / each * plan.floats;
  const auto make = w.bits == base_three ? find_make<Trits>(product.digits) : find_make<Signs>(product.digits);
  int64_t place = 0;
  for (int64_t g = 0; g < w.groups && place < end; ++g) {
    const int64_t from = g * w.group, to = least(from + w.group, w.columns), words = end_word(w, g) - first_word(w, g);
    for (int64_t i = place < begin ? least(begin - place, words) : 0; i < words && place + i < end; ++i) {
      const int64_t column = (first_word(w, g) + i) * word_columns(w), begins = column < from ? from - column : 0, ends = least(word_columns(w), to - column);
      const uint32_t there = static_cast<uint32_t>((uint64_t{1} << ends) - (uint64_t{1} << begins));
      make(room + plan.values + column, there, reinterpret_cast<uint8_t*>(room) + (place + i) * product.digits * plane_bytes(w),
           reinterpret_cast<uint32_t*>(room + plan.multipliers) + 2 * (place + i));
    }
    place += words;
  }
}

}  // namespace sum_lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits
