// Products of ternary codes and of signs that lie in lines, by tables of sums: of a byte the first three codes and the last two, or four signs
// and four, are looked up together. Of what they can make of their inputs there are 27 sums and 9, or 16 and 16. That takes half the
// instructions of taking each code out and multiplying it.
//
//   a word of a row           byte 0                 byte 1          byte 2          byte 3
//   first three codes         places 0..31 of 128    places 32..63   places 64..95   places 96..127
//   last two, or four signs   places 0..15 of 64     places 16..31   places 32..47   places 48..63
//
// Numbers of a table are whole, of as many bytes as inputs have digits, a plane of bytes each. Four bytes of a word are added up by an instruction
// that multiplies them, too: so sums that do not fit have a unit of their own, a power of two times the group's. A word in which a group ends
// has tables for either group, with inputs of zero for the columns that are the other's. Tables are made once for a product.
#pragma once
#include <numeric>

#include "lines.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace sum_lines {

constexpr int64_t word_bytes = 4;
constexpr int64_t least_group = 16;         // columns; smaller ones would have tables for little but zeros
constexpr int64_t longest_group = 1 << 20;  // columns whose sums stay in 32 bits
constexpr int64_t most_blocks = 4;          // of sixteen rows, that share what is loaded of tables
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

// How a byte's codes are divided, and what an input is multiplied with at each place of a table.
//
// Of ternary codes, these less 1. The last two are found by the lowest four bits of 27 times what they are: of no two the same. Bytes of 243
// and more count as 243 less, which 243 itself says.
struct Trits {
  static constexpr int64_t columns[2] = {3, 2}, places[2] = {32, 16};
  alignas(64) float first[3][32], last[2][16];
  alignas(64) uint8_t last_of_four[64];  // of every fourth byte: itself less its first three codes
  constexpr Trits() : first{}, last{}, last_of_four{} {
    for (int i = 0; i < 27; ++i) first[0][i] = i % 3 - 1.0f, first[1][i] = i / 3 % 3 - 1.0f, first[2][i] = i / 9 - 1.0f;
    for (int i = 0; i < 10; ++i) last[0][27 * i % 16] = i % 3 - 1.0f, last[1][27 * i % 16] = i / 3 % 3 - 1.0f;
    for (int i = 0; i < 64; ++i) last_of_four[i] = static_cast<uint8_t>(4 * i / 27 * 27);
  }
};

struct Signs {
  static constexpr int64_t columns[2] = {4, 4}, places[2] = {16, 16};
  alignas(64) float first[4][16], last[4][16];
  constexpr Signs() : first{}, last{} {
    for (int i = 0; i < 64; ++i) first[i / 16][i % 16] = last[i / 16][i % 16] = (i % 16 >> i / 16 & 1) != 0 ? 1.0f : -1.0f;
  }
};

template <class Kind>
alignas(64) static constexpr Kind codes;

// A table of byte `place` of a word, plane by plane; the multiplier of its numbers.
template <int Planes, int64_t Columns, int64_t Places>
static inline uint32_t make_table(const float* inputs, const float (*all)[Places], int64_t place, uint8_t* to) {
  constexpr float most = static_cast<float>((1 << (8 * Planes - 1)) - 1);
  float reach = 0.0f;
  for (int64_t i = 0; i < Columns; ++i) reach += as_float(as_bits(inputs[i]) & 0x7fffffff);
  const uint32_t above = (as_bits(reach / most) + 0x7fffff) >> 23, exponent = above < 127 ? 0 : above - 127;
  const float by = as_float((127 - exponent) << 23);
  for (int64_t at = 0; at < Places; at += 16) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < Columns; ++i) sums = _mm512_fmadd_ps(_mm512_set1_ps(inputs[i] * by), _mm512_load_ps(all[i] + at), sums);
    const __m512i numbers = _mm512_cvtps_epi32(sums);
    for (int plane = 0; plane < Planes; ++plane) {
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, static_cast<unsigned>(8 * (Planes - 1 - plane))));
      _mm_store_si128(reinterpret_cast<__m128i*>(to + (plane * word_bytes + place) * Places + at), bytes);
    }
  }
  return uint32_t{1} << exponent;
}

template <class Kind, int Planes>
static void make_word(const float* inputs, uint8_t* to, uint32_t* multipliers) {
  constexpr int64_t first = Kind::columns[0], last = Kind::columns[1];
  multipliers[0] = multipliers[1] = 0;
  for (int64_t place = 0; place < word_bytes; ++place, inputs += first + last) {
    multipliers[0] |= make_table<Planes, first, Kind::places[0]>(inputs, codes<Kind>.first, place, to) << (8 * place);
    uint8_t* behind = to + Planes * word_bytes * Kind::places[0];
    multipliers[1] |= make_table<Planes, last, Kind::places[1]>(inputs + first, codes<Kind>.last, place, behind) << (8 * place);
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
      float inputs[32] = {};
      const int64_t column = (first_word(w, g) + i) * word_columns(w);
      for (int64_t c = column < from ? from : column; c < least(column + word_columns(w), to); ++c) inputs[c - column] = room[plan.values + c];
      make(inputs, reinterpret_cast<uint8_t*>(room) + (place + i) * product.digits * plane_bytes(w),
           reinterpret_cast<uint32_t*>(room + plan.multipliers) + 2 * (place + i));
    }
    place += words;
  }
}

// ---- products ---------------------------------------------------------------------------------------------------------------

// A constant that stays in its register.
static inline __m512i kept(__m512i value) {
  asm("" : "+v"(value));
  return value;
}

// Where the two parts of 64 bytes are found in their tables.
struct Places {
  __m512i first, last;
};

template <class Kind>
struct Split;

template <>
struct Split<Trits> {
  __m512i last_of_four = kept(_mm512_load_si512(codes<Trits>.last_of_four)), three = kept(_mm512_set1_epi8(27)), low = kept(_mm512_set1_epi8(15));
  __m512i first_places = kept(_mm512_set1_epi32(0x60402000)), last_places = kept(_mm512_set1_epi32(0x30201000));

  inline __attribute__((always_inline)) Places operator()(__m512i bytes) const {
    // What the first of four neighbouring bytes says is right for itself, and at most 27 too little for the others.
    const __m512i over = _mm512_sub_epi8(bytes, _mm512_permutexvar_epi8(_mm512_srli_epi16(bytes, 2), last_of_four));
    const __m512i first = _mm512_min_epu8(over, _mm512_sub_epi8(over, three)), last = _mm512_sub_epi8(bytes, first);
    return {_mm512_add_epi8(first, first_places), _mm512_ternarylogic_epi32(last, low, last_places, 0xea)};  // last & low | last_places
  }
};

template <>
struct Split<Signs> {
  __m512i low = kept(_mm512_set1_epi8(15)), places = kept(_mm512_set1_epi32(0x30201000));

  inline __attribute__((always_inline)) Places operator()(__m512i bytes) const {
    return {_mm512_ternarylogic_epi32(bytes, low, places, 0xea), _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low, places, 0xea)};
  }
};

// Word `word` of sixteen rows. Halves of words lie apart: sixteen of them behind sixteen, of which the last may have none behind.
template <bool Halves>
static inline __attribute__((always_inline)) __m512i read_word(const uint8_t* from, int64_t word, bool whole) {
  if constexpr (!Halves) return _mm512_loadu_si512(from + 64 * word);
  const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007, 0x160006, 0x150005,
                                         0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return _mm512_permutexvar_epi16(kept(order), _mm512_maskz_loadu_epi32(whole ? 0xffff : 0xff, from + 64 * word));
}

// Sums of four products of an unsigned and a signed byte, in their place.
static inline __attribute__((always_inline)) void add_up(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// Adds what a word's tables say. Bytes of the first plane are signed, those of the others are not.
template <class Kind, int Planes, int Blocks>
static inline __attribute__((always_inline)) void look_up(const Places* places, const uint8_t* tables, const int32_t* multipliers, __m512i (*sums)[Blocks]) {
  constexpr int64_t bytes = word_bytes * Kind::places[0];  // of a plane of the first table
  const __m512i first_times = _mm512_set1_epi32(multipliers[0]), last_times = _mm512_set1_epi32(multipliers[1]);
#pragma GCC unroll 4
  for (int p = 0; p < Planes; ++p) {
    const __m512i low = _mm512_load_si512(tables + bytes * p), high = _mm512_load_si512(tables + bytes * p + bytes - 64);
    const __m512i last = _mm512_load_si512(tables + bytes * Planes + 64 * p);
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const __m512i of_first = bytes == 64 ? _mm512_permutexvar_epi8(places[b].first, low) : _mm512_permutex2var_epi8(low, places[b].first, high);
      const __m512i of_last = _mm512_permutexvar_epi8(places[b].last, last);
      if (p == 0) add_up(sums[p][b], first_times, of_first), add_up(sums[p][b], last_times, of_last);
      else add_up(sums[p][b], of_first, first_times), add_up(sums[p][b], of_last, last_times);
    }
  }
}

template <class Kind, int Planes, int Blocks, bool Halves>
static void multiply_blocks(const Coded& w, const uint8_t* const* from, const lines::Grid* grids, const float* prepared, const Plan& plan, __m512* totals) {
  const uint8_t* tables = reinterpret_cast<const uint8_t*>(prepared);
  const int32_t* multipliers = reinterpret_cast<const int32_t*>(prepared + plan.multipliers);
  const int64_t ahead = Blocks * line_rows * w.row_bytes, whole = w.row_bytes / word_bytes;
  const Split<Kind> split;
  Places places[Blocks];  // of the last word that was read, in which the next group may begin
  for (int b = 0; b < Blocks; ++b) totals[b] = _mm512_setzero_ps();
  for (int64_t group = 0, word = 0; group < w.groups; ++group) {
    __m512i sums[Planes][Blocks];
#pragma GCC unroll 16
    for (int i = 0; i < Planes * Blocks; ++i) (&sums[0][0])[i] = _mm512_setzero_si512();
    const auto add = [&]() __attribute__((always_inline)) {
      look_up<Kind, Planes, Blocks>(places, tables, multipliers, sums);
      tables += Planes * plane_bytes(w), multipliers += 2;
    };
    if (word > first_word(w, group)) add();
    for (const int64_t end = end_word(w, group); word < end; ++word) {
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        places[b] = split(read_word<Halves>(from[b], word, word < whole));
        _mm_prefetch(reinterpret_cast<const char*>(from[b]) + 64 * word + ahead, _MM_HINT_T1);
      }
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) asm("" : "+v"(places[b].first), "+v"(places[b].last));  // all of them first: none is waited for
      add();
    }
    const __m512 unit = _mm512_set1_ps(prepared[plan.units + group]);
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      __m512 sum = _mm512_cvtepi32_ps(sums[0][b]);
#pragma GCC unroll 4
      for (int p = 1; p < Planes; ++p) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[p][b]));
      totals[b] = _mm512_fmadd_ps(sum, _mm512_mul_ps(unit, lines::scale_of(grids[b], group)), totals[b]);
      if (grids[b].offsets == nullptr) continue;
      const __m512 offset = sixteen_numbers(grids[b].offsets, group, grids[b].of_offsets);
      totals[b] = _mm512_fmadd_ps(offset, _mm512_set1_ps(prepared[plan.sums + group]), totals[b]);
    }
  }
}

static inline int64_t grid_floats(const Coded& w) { return rounded_up(lines::scratch_floats(w), lanes); }
static int64_t scratch_floats(const Coded& w) { return most_blocks * grid_floats(w); }

template <int Planes, int Blocks>
static void multiply_some(const Product& product, const float* prepared, int64_t row, float* scratch) {
  const Coded& w = *product.matrix;
  const Plan plan(product);
  const auto of_trits = word_of(w) == word_bytes ? multiply_blocks<Trits, Planes, Blocks, false> : multiply_blocks<Trits, Planes, Blocks, true>;
  const auto function = w.bits == base_three ? of_trits : multiply_blocks<Signs, Planes, Blocks, false>;
  const uint8_t* from[Blocks];
  lines::Grid grids[Blocks];
  for (int64_t b = 0; b < Blocks; ++b) {
    from[b] = w.codes + (row + b * line_rows) * w.row_bytes;
    grids[b] = lines::find_grid(w, nullptr, row + b * line_rows, scratch + b * grid_floats(w));
    grids[b].factor = 1.0f;  // signs are -1 and 1 here
  }
  for (int64_t v = 0; v < product.vectors; ++v, prepared += plan.floats) {
    __m512 totals[Blocks];
    function(w, from, grids, prepared, plan, totals);
    for (int64_t b = 0; b < Blocks; ++b) put_sixteen(product, v * w.rows + row + b * line_rows, 0xffff, totals[b]);
  }
}

template <int Planes>
static void multiply_as(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  int64_t row = first;
  for (; row + most_blocks * line_rows <= last; row += most_blocks * line_rows) multiply_some<Planes, most_blocks>(product, prepared, row, scratch);
  for (; row + 2 * line_rows <= last; row += 2 * line_rows) multiply_some<Planes, 2>(product, prepared, row, scratch);
  if (row < last) multiply_some<Planes, 1>(product, prepared, row, scratch);
}

// Rows first to last, whole sixteens of them.
static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const auto function = product.digits == 1 ? multiply_as<1> : product.digits == 2 ? multiply_as<2> : multiply_as<3>;
  function(product, prepared, first, last, scratch);
}

}  // namespace sum_lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits
