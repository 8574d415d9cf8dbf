// Products of codewords by tables (word_tables.h): rows add up numbers that they look up, 64 rows at a time, whose codes lie side by side. A plane of
// 256 bytes is four registers, and one instruction looks 64 codes up among 128 entries.
#pragma once
#include "word_tables.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace word_tables {

constexpr int64_t bytes_ahead = 2048;  // of codes that are fetched meanwhile

// One or two planes' sums as floats, less what numbers were raised by and times the unit, to those of 64 rows: every fourth row from the first
// on, then from the second on, ...
template <int Planes>
static inline void add_to_sums(const __m512i* all, const __m512i* odd, __m512i raised, __m512 unit, float* sums) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  __m512i of[4] = {};
  for (int p = Planes - 1; p >= 0; --p) {
    const __m512i even = _mm512_sub_epi16(all[p], _mm512_slli_epi16(odd[p], 8));
    const __m512i more[] = {_mm512_and_si512(even, low), _mm512_and_si512(odd[p], low), _mm512_srli_epi32(even, 16), _mm512_srli_epi32(odd[p], 16)};
    for (int place = 0; place < 4; ++place) of[place] = _mm512_add_epi32(_mm512_slli_epi32(of[place], 8), more[place]);
  }
  for (int place = 0; place < 4; ++place) {
    float* to = sums + 16 * place;
    _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(of[place], raised)), unit, _mm512_load_ps(to)));
  }
}

// A run of tables, of `stride` bytes each.
struct Run {
  const uint8_t* tables;
  int64_t count, stride;
  float unit;
};

// Looks up in one or two neighbouring planes what a run has for some blocks of 64 rows. Of either plane all bytes are summed modulo 2**16, and the
// odd ones of each two: the even ones' sum is the difference.
template <int Planes, int Blocks>
static void add_up(const uint8_t* codes, int64_t stride, const Run& run, int64_t raised, float* sums) {
  __m512i all[Blocks][Planes], odd[Blocks][Planes];
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) for (int p = 0; p < Planes; ++p) all[b][p] = odd[b][p] = _mm512_setzero_si512();
  const uint8_t* tables = run.tables;
  for (int64_t table = 0; table < run.count; ++table, codes += word_rows, tables += run.stride) {
    __m512i part[Planes][4];
#pragma GCC unroll 4
    for (int p = 0; p < Planes; ++p) for (int i = 0; i < 4; ++i) part[p][i] = _mm512_load_si512(tables + p * table_entries + 64 * i);
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const __m512i code = _mm512_loadu_si512(codes + b * stride);
      __builtin_prefetch(codes + b * stride + bytes_ahead, 0, 2);
      const __mmask64 upper = _mm512_movepi8_mask(code);
#pragma GCC unroll 4
      for (int p = 0; p < Planes; ++p) {
        const __m512i one = _mm512_permutex2var_epi8(part[p][0], code, part[p][1]), two = _mm512_permutex2var_epi8(part[p][2], code, part[p][3]);
        const __m512i found = _mm512_mask_blend_epi8(upper, one, two);
        all[b][p] = _mm512_add_epi16(all[b][p], found);
        odd[b][p] = _mm512_add_epi16(odd[b][p], _mm512_srli_epi16(found, 8));
      }
    }
  }
  const __m512i less = _mm512_set1_epi32(static_cast<int>(run.count * raised));
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) add_to_sums<Planes>(all[b], odd[b], less, _mm512_set1_ps(run.unit), sums + b * word_rows);
}

// Three planes are looked up two at a time and one, as registers hold the sums of no more.
template <int Planes, int Blocks>
static void add_run(const uint8_t* codes, int64_t stride, Run run, float* sums) {
  if constexpr (Planes < 3) return add_up<Planes, Blocks>(codes, stride, run, Planes == 1 ? 1 << 7 : 1 << 15, sums);
  add_up<2, Blocks>(codes, stride, run, 0, sums);
  run.tables += 2 * table_entries;
  run.unit *= 0x1p16f;
  add_up<1, Blocks>(codes, stride, run, 1 << 7, sums);
}

// All runs of a vector for some blocks from `block` on.
template <int Planes, int Blocks>
static void multiply_blocks(const Product& product, const Plan& plan, const float* prepared, int64_t vector, int64_t block, float* sums) {
  const Coded& w = *product.matrix;
  const int64_t all = tables_of(w), stride = word_rows * w.row_bytes;
  for (int64_t i = 0; i < Blocks * word_rows; ++i) sums[i] = 0.0f;
  for (int64_t run = 0; run < plan.runs; ++run) {
    const int64_t first = run * plan.groups * w.books, count = least(plan.groups * w.books, all - first);
    const uint8_t* tables = reinterpret_cast<const uint8_t*>(prepared + plan.tables + (vector * all + first) * plan.table_floats);
    const Run found{tables, count, Planes * table_entries, prepared[plan.units + vector * plan.runs + run]};
    add_run<Planes, Blocks>(w.codes + block * stride + first * word_rows, stride, found, sums);
  }
}

// The rows first to last of a block, times their scales, as numbers of the outputs' type.
static void put_block(const Product& product, int64_t vector, int64_t block, int64_t first, int64_t last, const float* sums) {
  const Coded& w = *product.matrix;
  const int64_t from = block * word_rows < first ? first : block * word_rows, count = least((block + 1) * word_rows, last) - from;
  float values[word_rows], scales[word_rows];
  for (int64_t i = 0; i < word_rows; ++i) values[i] = sums[i % 4 * 16 + i / 4];
  float* there = values + from % word_rows;
  if (w.scales.kind != Values::none) {
    read_numbers(w.scales.data, from, w.scales.number, count, scales);
    for (int64_t i = 0; i < count; ++i) there[i] *= scales[i];
  }
  for (int64_t i = 0; i < count; ++i) put_number(product.outputs, vector * w.rows + from + i, product.number, there[i]);
}

// Whether codes of whole blocks all have codewords.
static bool have_words(const Coded& w, int64_t block, int64_t last) {
  if (w.entries == table_entries) return true;
  const uint8_t *from = w.codes + block * word_rows * w.row_bytes, *end = w.codes + last * word_rows * w.row_bytes;
  uint8_t largest = 0;
  for (; from < end; ++from) largest = *from > largest ? *from : largest;
  return largest < w.entries;
}

template <int Planes>
static void multiply_lines(const Product& product, const Plan& plan, const float* prepared, int64_t first, int64_t last) {
  constexpr int at_once = 4;  // as many as registers hold the sums of
  const int64_t end = ceiling(last, word_rows);
  alignas(64) float sums[at_once * word_rows];
  for (int64_t block = first / word_rows, blocks; block < end; block += blocks) {
    blocks = end - block >= at_once ? at_once : end - block >= 2 ? 2 : 1;
    if (!have_words(*product.matrix, block, block + blocks)) return product.broken->store(true);
    for (int64_t v = 0; v < product.vectors; ++v) {
      if (blocks == at_once) multiply_blocks<Planes, at_once>(product, plan, prepared, v, block, sums);
      else if (blocks == 2) multiply_blocks<Planes, 2>(product, plan, prepared, v, block, sums);
      else multiply_blocks<Planes, 1>(product, plan, prepared, v, block, sums);
      for (int64_t b = 0; b < blocks; ++b) put_block(product, v, block + b, first, last, sums + b * word_rows);
    }
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const int64_t end = vectors::rows_in_lines(*product.matrix);
  if (last > end) vectors::multiply(product, prepared, first < end ? end : first, last, scratch);
  if (first >= end) return;
  const Plan plan(product);
  last = least(last, end);
  if (product.digits == 1) multiply_lines<1>(product, plan, prepared, first, last);
  else if (product.digits == 2) multiply_lines<2>(product, plan, prepared, first, last);
  else multiply_lines<3>(product, plan, prepared, first, last);
}

}  // namespace word_tables
}  // namespace FEWBITS_ISA
}  // namespace fewbits
