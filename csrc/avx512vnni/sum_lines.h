// Products of ternary codes and of signs that lie in lines, by tables of sums: of a byte the first three codes and the last two, or four signs
// and four, are looked up together. Of what they can make of their inputs there are 27 sums and 9, or 16 and 16. That takes half the
// instructions of taking each code out and multiplying it.
//
//   a word of a row      byte 0                  byte 1           byte 2           byte 3
//   first three codes    places 0..31 of 128     places 32..63    places 64..95    places 96..127
//   last two codes       places 0..7, 32..39     8..15, 40..47    16..23, 48..55   24..31, 56..63
//   four signs           places 0..15 of 64      places 16..31    places 32..47    places 48..63
//
// Numbers of a table are whole, of as many bytes as inputs have digits, a plane of bytes each. Four bytes of a word are added up by an instruction
// that multiplies them, too: so sums that do not fit have a unit of their own, a power of two times the group's. A word in which a group ends
// has tables for either group, with inputs of zero for the columns that are the other's. Tables are made once for a product.
#pragma once
#include "sum_tables.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace sum_lines {

constexpr int64_t most_blocks = 4;       // of sixteen rows, that share what is loaded of tables
constexpr int64_t fetched_ahead = 8192;  // bytes of sixteen rows

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
  __m512i low = kept(_mm512_load_si512(codes<Trits>.from)), high = kept(_mm512_load_si512(codes<Trits>.from + 64));
  __m512i in_last = kept(_mm512_set1_epi8(Trits::in_last));
  __m512i first_places = kept(_mm512_set1_epi32(0x60402000)), last_places = kept(_mm512_set1_epi32(0x18100800));

  inline __attribute__((always_inline)) Places operator()(__m512i bytes) const {
    const __m512i from = _mm512_permutex2var_epi8(low, _mm512_srli_epi16(bytes, 1), high);
    const __m512i first = _mm512_add_epi8(_mm512_sub_epi8(bytes, from), first_places);
    return {first, _mm512_ternarylogic_epi32(from, in_last, last_places, 0xea)};  // from & in_last | last_places
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

// `Blocks` times sixteen rows, whose codes lie one behind the other, with a vector. Memory is asked for what is read a little later of each sixteen,
// and past their end for the next ones; where words lie in halves, for the same word of the next ones, which is faster.
template <class Kind, int Planes, int Blocks, bool Halves>
static void multiply_blocks(const Coded& w, const uint8_t* codes, const lines::Grid* grids, const float* prepared, const Plan& plan, __m512* totals) {
  const uint8_t* tables = reinterpret_cast<const uint8_t*>(prepared);
  const int32_t* multipliers = reinterpret_cast<const int32_t*>(prepared + plan.multipliers);
  const int64_t apart = line_rows * w.row_bytes, whole = w.row_bytes / word_bytes, words = ceiling(w.row_bytes, word_bytes), groups = w.groups;
  const int64_t far = Halves ? Blocks * apart : fetched_ahead + (Blocks - 1) * apart, turn = Halves ? 0 : words - fetched_ahead / 64;
  const Number of_scales = grids[0].of_scales, of_offsets = grids[0].of_offsets;
  // Numbers of the rows that come after all these: those just behind a row's are read meanwhile.
  const auto numbers_of_next = [&](Number number) {
    const int64_t bytes = Blocks * groups * line_rows * (number == Number::f32 ? 4 : 2);
    return bytes > numbers_ahead ? bytes : numbers_ahead;
  };
  const int64_t scales_ahead = numbers_of_next(of_scales), offsets_ahead = numbers_of_next(of_offsets);
  const Split<Kind> split;
  Places places[Blocks];  // of the last word that was read, in which the next group may begin
  __m512 found[Blocks];
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) found[b] = _mm512_setzero_ps();
  for (int64_t group = 0, word = 0; group < groups; ++group) {
    __m512i sums[Planes][Blocks];
#pragma GCC unroll 16
    for (int i = 0; i < Planes * Blocks; ++i) (&sums[0][0])[i] = _mm512_setzero_si512();
    const auto add = [&]() __attribute__((always_inline)) {
      look_up<Kind, Planes, Blocks>(places, tables, multipliers, sums);
      tables += Planes * word_bytes * (Kind::places[0] + Kind::places[1]), multipliers += 2;
    };
    if (word > first_word(w, group)) add();
    for (const int64_t end = end_word(w, group); word < end; ++word) {
      const int64_t ahead = !Halves && word < turn ? fetched_ahead : far;
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        places[b] = split(read_word<Halves>(codes + b * apart, word, word < whole));
        _mm_prefetch(reinterpret_cast<const char*>(codes) + b * apart + 64 * word + ahead, _MM_HINT_T1);
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
      const __m512 scale = grids[b].scales == nullptr ? unit : _mm512_mul_ps(unit, sixteen_numbers(grids[b].scales, group, of_scales, scales_ahead));
      found[b] = _mm512_fmadd_ps(sum, scale, found[b]);
    }
    if (grids[0].offsets == nullptr) continue;
    const __m512 of_inputs = _mm512_set1_ps(prepared[plan.sums + group]);
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) found[b] = _mm512_fmadd_ps(sixteen_numbers(grids[b].offsets, group, of_offsets, offsets_ahead), of_inputs, found[b]);
  }
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) totals[b] = found[b];
}

static inline int64_t grid_floats(const Coded& w) { return rounded_up(lines::scratch_floats(w), lanes); }
static int64_t scratch_floats(const Coded& w) { return most_blocks * grid_floats(w); }

template <int Planes, int Blocks>
static void multiply_some(const Product& product, const float* prepared, int64_t row, float* scratch) {
  const Coded& w = *product.matrix;
  const Plan plan(product);
  const auto of_trits = word_of(w) == word_bytes ? multiply_blocks<Trits, Planes, Blocks, false> : multiply_blocks<Trits, Planes, Blocks, true>;
  const auto function = w.bits == base_three ? of_trits : multiply_blocks<Signs, Planes, Blocks, false>;
  const uint8_t* from = w.codes + row * w.row_bytes;
  lines::Grid grids[Blocks];
  for (int64_t b = 0; b < Blocks; ++b) {
    grids[b] = lines::find_grid(w, nullptr, row + b * line_rows, scratch + b * grid_floats(w));
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
