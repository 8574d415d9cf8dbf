// Sixteen rows of a matrix side by side, a row a lane: codes, scales and zero points column by column. AVX-512 with BW, VL and DQ.
#pragma once
#include "../panels.h"
#include "../sixteen.h"

namespace fewbits {
namespace FEWBITS_ISA {

// Columns of a row, whole registers of them whatever the width of codes.
constexpr int64_t chunk = 256;
static inline int64_t padded_columns(const Coded& w) { return rounded_up(w.columns, chunk); }

// Lane r of place c from lane c of place r.
static inline __attribute__((always_inline)) void transpose(__m512i* all) {
  __m512i some[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    some[i] = _mm512_unpacklo_epi32(all[i], all[i + 1]);
    some[i + 1] = _mm512_unpackhi_epi32(all[i], all[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    all[i] = _mm512_unpacklo_epi64(some[i], some[i + 2]);
    all[i + 1] = _mm512_unpackhi_epi64(some[i], some[i + 2]);
    all[i + 2] = _mm512_unpacklo_epi64(some[i + 1], some[i + 3]);
    all[i + 3] = _mm512_unpackhi_epi64(some[i + 1], some[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    some[i] = _mm512_shuffle_i32x4(all[i], all[i + 4], 0x88);
    some[i + 4] = _mm512_shuffle_i32x4(all[i], all[i + 4], 0xdd);
    some[i + 8] = _mm512_shuffle_i32x4(all[i + 8], all[i + 12], 0x88);
    some[i + 12] = _mm512_shuffle_i32x4(all[i + 8], all[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    all[i] = _mm512_shuffle_i32x4(some[i], some[i + 8], 0x88);
    all[i + 4] = _mm512_shuffle_i32x4(some[i + 4], some[i + 12], 0x88);
    all[i + 8] = _mm512_shuffle_i32x4(some[i], some[i + 8], 0xdd);
    all[i + 12] = _mm512_shuffle_i32x4(some[i + 4], some[i + 12], 0xdd);
  }
}

// The same of eight registers and lanes of 64 bits.
static inline __attribute__((always_inline)) void transpose_long(__m512i* all) {
  __m512i some[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    some[i] = _mm512_unpacklo_epi64(all[i], all[i + 1]);
    some[i + 1] = _mm512_unpackhi_epi64(all[i], all[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i a = _mm512_shuffle_i64x2(some[i], some[i + 2], 0x88), b = _mm512_shuffle_i64x2(some[i], some[i + 2], 0xdd);
    const __m512i c = _mm512_shuffle_i64x2(some[i + 4], some[i + 6], 0x88), d = _mm512_shuffle_i64x2(some[i + 4], some[i + 6], 0xdd);
    all[i] = _mm512_shuffle_i64x2(a, c, 0x88), all[i + 2] = _mm512_shuffle_i64x2(b, d, 0x88);
    all[i + 4] = _mm512_shuffle_i64x2(a, c, 0xdd), all[i + 6] = _mm512_shuffle_i64x2(b, d, 0xdd);
  }
}

// Words `[16, stride]` to `[count, apart]`, the sixteen at the beginning of each; `count` is a multiple of 16.
static void transpose_words(const uint32_t* from, int64_t stride, int64_t count, uint32_t* to, int64_t apart) {
  for (int64_t at = 0; at < count; at += 16) {
    __m512i all[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) all[r] = _mm512_loadu_si512(from + r * stride + at);
    transpose(all);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) _mm512_store_si512(to + (at + c) * apart, all[c]);
  }
}

// The rows of a panel: those behind the matrix's last one are the last one again.
struct PanelRows {
  int64_t row[panel_rows];

  PanelRows(const Coded& w, int64_t first) {
    for (int64_t r = 0; r < panel_rows; ++r) row[r] = least(first + r, w.rows - 1);
  }
};

constexpr int64_t numbers_ahead = 2048;  // bytes of scales, zero points or offsets that are fetched meanwhile

// The numbers of a group that sixteen rows have, where they lie in lines. Those of groups to come are asked for: by itself a processor fetches
// up to the end of a page, which numbers of sixteen rows mostly are.
static inline __attribute__((always_inline)) __m512 sixteen_numbers(const void* data, int64_t group, Number number, int64_t ahead = numbers_ahead) {
  const uint8_t* from = static_cast<const uint8_t*>(data) + 16 * group * (number == Number::f32 ? 4 : 2);
  __builtin_prefetch(from + ahead, 0, 2);
  if (number == Number::f32) return _mm512_loadu_ps(from);
  return few_numbers(reinterpret_cast<const uint16_t*>(from), 16, number == Number::f16);
}

// The same of codes: byte after byte of sixteen rows, in which a code may be of two.
static inline __m512 sixteen_codes(const uint8_t* data, int64_t group, int bits) {
  const int64_t first = group * bits, bit = first % 8;
  const uint8_t* from = data + first / 8 * 16;
  __m512i all = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  if (bit + bits > 8) all = _mm512_or_si512(all, _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16))), 8));
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(all, static_cast<unsigned>(bit)), _mm512_set1_epi32((1 << bits) - 1)));
}

// Whether scales or offsets are codes times units that lanes hold whole runs of, as those of llama.cpp's two-level grids are.
static bool in_two_levels(const Values& values) {
  if (values.kind != Values::coded) return false;
  const Coded& c = *values.inner;
  return c.bits <= 8 && c.counts != Coded::as_signs && c.levels.kind == Values::none && c.scales.kind != Values::none && c.zeros.kind == Values::none && lanes % c.group == 0;
}

// Scales or offsets of sixteen rows in two levels: sixteen codes of a row are one register, and are exchanged in registers.
template <class Row>
static void read_two_levels(const Values& values, const Row& row, float* to, float* room, int64_t stride) {
  const Coded& c = *values.inner;
  const Unpacker unpacker(c.bits);
  const int shift = __builtin_ctzll(static_cast<uint64_t>(c.group));  // a power of two, as lanes are
  const int64_t each = c.groups + lanes;
  const __m512 zero = _mm512_set1_ps(zero_of(c));
  const uint8_t* codes[16];
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), picks = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift));
  for (int64_t r = 0; r < 16; ++r) {
    const int64_t at = place_of(values, row(r));
    codes[r] = c.codes + at * c.row_bytes;
    read_values(c.scales, c.bits, at, room + r * each, room + 16 * each);
  }
  for (int64_t g = 0; g < c.columns; g += 16) {
    const int64_t count = least(16, c.columns - g);
    const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
    __m512i all[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const __m512 units = _mm512_permutexvar_ps(picks, _mm512_loadu_ps(room + r * each + (g >> shift)));
      all[r] = _mm512_castps_si512(_mm512_maskz_mul_ps(there, _mm512_sub_ps(unpacker.take(codes[r], g, count), zero), units));
    }
    transpose(all);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (g + i) * stride, all[i]);
  }
}

template <class Row>
static bool read_faster(const Values& values, const Row& row, float* to, float* room, int64_t stride) {
  if (!in_two_levels(values)) return false;
  read_two_levels(values, row, to, room, stride);
  return true;
}

// Numbers that lie in lines, as `read_sixteen` brings them there; a panel's are `panel_rows` apart.
static void read_lines(const Coded& w, const Values& values, int64_t row, float* to) {
  const uint8_t* from = static_cast<const uint8_t*>(values.data) + row / line_rows * line_rows * row_bytes_of(values, w.bits);
  const bool packed = values.kind == Values::packed;
  for (int64_t g = 0; g < w.groups; ++g) {
    _mm512_storeu_ps(to + g * panel_rows, packed ? sixteen_codes(from, g, w.bits) : sixteen_numbers(from, g, values.number));
  }
  for (int64_t g = w.groups; g < padded_groups(w); ++g) _mm512_storeu_ps(to + g * panel_rows, _mm512_setzero_ps());
}

// Scales, zero points or offsets of a panel's rows, `[padded groups, panel_rows]`; `missing` where none are stored.
static void read_by_groups(const Coded& w, const Values& values, float missing, const PanelRows& rows, float* to, float* room) {
  const int64_t groups = padded_groups(w);
  if (values.kind == Values::none) {
    for (int64_t i = 0; i < groups * panel_rows; ++i) to[i] = missing;
    return;
  }
  for (int half = 0; half < 2; ++half) {
    if (values.lines && values.kind != Values::table) {
      read_lines(w, values, rows.row[16 * half], to + 16 * half);
      continue;
    }
    read_sixteen(w, values, [&](int64_t r) { return rows.row[16 * half + r]; }, to + 16 * half, room, panel_rows);
  }
}

#ifdef __AVX512VBMI__
// Sixty-four codes of a row, one to a byte, of its bytes from there on.
template <int Bits>
static inline __attribute__((always_inline)) __m512i expand_codes(__m512i all) {
  if constexpr (Bits == 8) return all;
  alignas(64) static constexpr auto order = [] {
    struct { uint8_t at[64]; } made{};
    for (int i = 0; i < 64; ++i) made.at[i] = static_cast<uint8_t>(i / 8 * Bits + (i % 8 < Bits ? i % 8 : 0));
    return made;
  }();
  constexpr uint64_t starts = [] {
    uint64_t made = 0;
    for (int i = 0; i < 8; ++i) made |= static_cast<uint64_t>(i * Bits) << (8 * i);
    return made;
  }();
  const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), all);
  const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(starts)), words);
  return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1)));
}

// The same from memory; bytes past `bytes` of the row count as zero and are not touched.
template <int Bits>
static inline __attribute__((always_inline)) __m512i take_codes(const uint8_t* from, int64_t bytes) {
  const uint64_t touched = bytes >= 64 ? ~uint64_t{0} : bytes <= 0 ? 0 : (uint64_t{1} << bytes) - 1;
  constexpr uint64_t taken = Bits == 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * Bits % 64)) - 1;
  return expand_codes<Bits>(_mm512_maskz_loadu_epi8(touched & taken, from));
}

// Bits that a code has in a register: its own, or 8 where they do not fill bytes, or where groups end inside of 32 bits of a row.
static inline int field_bits(const Coded& w) {
  const bool fits = w.bits == 2 || w.bits == 4;
  return fits && (w.groups == 1 || w.group % (32 / w.bits) == 0) ? w.bits : 8;
}

// Calls a function for the width of codes and the bits that they have in a register.
#define FEWBITS_FOR_FIELDS(function, w, ...)                                              \
  switch (w.bits) {                                                                       \
    case 1: return function<1, 8>(__VA_ARGS__);                                           \
    case 2: return (field_bits(w) == 2 ? function<2, 2> : function<2, 8>)(__VA_ARGS__);   \
    case 3: return function<3, 8>(__VA_ARGS__);                                           \
    case 4: return (field_bits(w) == 4 ? function<4, 4> : function<4, 8>)(__VA_ARGS__);   \
    case 5: return function<5, 8>(__VA_ARGS__);                                           \
    case 6: return function<6, 8>(__VA_ARGS__);                                           \
    case 7: return function<7, 8>(__VA_ARGS__);                                           \
    default: return function<8, 8>(__VA_ARGS__);                                          \
  }

// The codes of sixteen rows from a column on, 512 / Field of each: a row a lane of 32 bits, or of 64, the second eight rows in the second
// eight registers then. Of codes that lie in rows.
template <int Bits, int Field, int PerWord>
static inline __attribute__((always_inline)) void lanes_from_rows(const Coded& w, const int64_t* rows, int64_t column, __m512i* all) {
  const int64_t at = column / 8 * Bits;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) all[r] = take_codes<Field == Bits ? 8 : Bits>(w.codes + rows[r] * w.row_bytes + at, w.row_bytes - at);
  if constexpr (PerWord == 1) transpose(all);
  else transpose_long(all), transpose_long(all + 8);
}

// The same of codes that lie in lines. Rows behind the last one are any.
template <int Bits, int Field, int PerWord>
static inline __attribute__((always_inline)) void lanes_from_lines(const Coded& w, int64_t row, int64_t column, __m512i* all) {
  constexpr int words = Field == Bits ? 16 : 2 * Bits;  // of a row
  const int64_t first = column * Bits / 32, there = w.row_bytes / 4 - first;
  const uint8_t* from = w.codes + row / line_rows * line_rows * w.row_bytes + first * 64;
  __m512i line[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) line[i] = i < words && i < there ? _mm512_loadu_si512(from + 64 * i) : _mm512_setzero_si512();
  if constexpr (Field != Bits) {
    transpose(line);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) all[r] = expand_codes<Bits>(line[r]);
    if constexpr (PerWord == 1) transpose(all);
    else transpose_long(all), transpose_long(all + 8);
  } else if constexpr (PerWord == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) all[i] = line[i];
  } else {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      all[i] = _mm512_permutex2var_epi32(line[2 * i], low, line[2 * i + 1]);
      all[i + 8] = _mm512_permutex2var_epi32(line[2 * i], high, line[2 * i + 1]);
    }
  }
}

template <int Bits, int Field, int PerWord>
static inline __attribute__((always_inline)) void take_lanes(const Coded& w, const int64_t* rows, int64_t column, __m512i* all) {
  if (w.lines) lanes_from_lines<Bits, Field, PerWord>(w, rows[0], column, all);
  else lanes_from_rows<Bits, Field, PerWord>(w, rows, column, all);
}
#endif

// Asks for the codes of the chunk's columns that come next, of all rows of a panel.
static inline __attribute__((always_inline)) void fetch_codes(const Coded& w, const PanelRows& rows, int64_t column, int64_t columns) {
  const int64_t from = column * w.bits / 8, to = least((column + columns) * w.bits / 8, w.row_bytes);
  for (int64_t half = 0; w.lines && half < panel_rows; half += line_rows) {
    const uint8_t* lines = w.codes + rows.row[half] / line_rows * line_rows * w.row_bytes;
    for (int64_t at = from / 4; at < to / 4; ++at) __builtin_prefetch(lines + 64 * at, 0, 2);
  }
  if (w.lines) return;
  for (int64_t r = 0; r < panel_rows; ++r) {
    for (int64_t at = from; at < to; at += 64) __builtin_prefetch(w.codes + rows.row[r] * w.row_bytes + at, 0, 2);
  }
}

// Up to how many vectors codes that lie in lines are read as they are in less time than panels take, as far as seen. Short groups are
// converted to floats more often.
static inline int64_t few_vectors_of_lines(const Coded& w) { return w.groups == 1 || w.group >= 128 ? 32 : 12; }

constexpr int64_t tile = 12;            // vectors whose inputs lie side by side
constexpr int64_t panels_at_once = 2;  // that meet a tile of inputs while it is in the first cache

// Words of the vectors of a tile side by side, `[count, tile]`; `take(v, at)` has sixteen words of a vector, `count` is a multiple of 16.
template <class Take>
static inline __attribute__((always_inline)) void lay_out(int64_t count, uint32_t* to, const Take& take) {
  for (int64_t at = 0; at < count; at += 16) {
    __m512i all[16];
#pragma GCC unroll 16
    for (int v = 0; v < 16; ++v) all[v] = v < tile ? take(v, at) : _mm512_setzero_si512();
    transpose(all);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) _mm512_mask_storeu_epi32(to + (at + c) * tile, 0xfff, all[c]);
  }
}

// Sixteen sums, or those of them that are `there`, as numbers of the outputs' type from place `at` on.
static inline void put_sixteen(const Product& product, int64_t at, __mmask16 there, __m512 values) {
  if (product.number == Number::f32) return _mm512_mask_storeu_ps(static_cast<float*>(product.outputs) + at, there, values);
  __m256i numbers;
  if (product.number == Number::f16) {
    numbers = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 none = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    numbers = _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(none, rounded, _mm512_set1_epi32(0x7fc0)));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(product.outputs) + at, there, numbers);
}

// Up to 32 sums of a vector as numbers of the outputs' type.
static inline void put_rows(const Product& product, int64_t vector, int64_t row, const float* sums) {
  const int64_t at = vector * product.matrix->rows + row, count = least(panel_rows, product.matrix->rows - row);
  for (int64_t half = 0; half < count; half += 16) {
    const __mmask16 there = static_cast<__mmask16>(count - half >= 16 ? 0xffff : (1u << (count - half)) - 1);
    put_sixteen(product, at + half, there, _mm512_load_ps(sums + half));
  }
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
