// Products of codes of four bits by rows whose levels are each row's own, or those of a run of rows: 64 are looked up at once.
//
// Levels are whole numbers of two bytes in units of their range. The first bytes of all levels are a table in one register, so are the second ones,
// and each byte is multiplied with each digit of the inputs. Four rows share what is loaded of these. At three digits floats are faster.
#pragma once
#include "../avx512/columns.h"
#include "../fixed.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace row_levels {

constexpr int planes = 2, fields = 2;         // bytes of a level, codes of a byte
constexpr int64_t chunk_columns = 64 * fields;
constexpr int64_t most_vectors = 4;
constexpr int64_t rows_at_once = 4;
constexpr int64_t longest = 1 << 17;          // columns whose products are summed in 32 bits

static bool serves(const Coded& w, int64_t vectors, int digits) {
  const bool levels = w.form == Coded::packed && !w.lines && w.levels.kind == Values::dense && w.level_groups == 1 && w.bits == 4;
  const bool scales = w.scales.kind == Values::none || (w.groups == 1 && w.scales.kind == Values::dense);
  return levels && scales && w.columns <= longest && vectors <= most_vectors && digits <= 2;
}

static inline int64_t chunks_of(const Coded& w) { return ceiling(w.columns, chunk_columns); }

// Of a vector: digits [chunks, digits, fields, 64 bytes], then its unit and the sum of its numbers; and room to make them.
struct Inputs {
  int64_t unit, values, floats;  // places, in numbers of 32 bits

  explicit Inputs(const Product& product) {
    const Coded& w = *product.matrix;
    const int64_t columns = chunks_of(w) * chunk_columns;
    unit = columns * product.digits / 4, values = unit + lanes, floats = values + 2 * columns;
  }
};

static int64_t prepared_floats(const Product& product) { return product.vectors * Inputs(product).floats; }

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  if (vector >= product.vectors) return;
  const Inputs at(product);
  const int64_t columns = chunks_of(w) * chunk_columns;
  room += vector * at.floats;
  float* values = room + at.values;
  int32_t* numbers = reinterpret_cast<int32_t*>(values + columns);
  read_numbers(product.inputs, vector * w.columns, product.number, w.columns, values);
  for (int64_t c = w.columns; c < columns; ++c) values[c] = 0.0f;
  room[at.unit] = fixed::to_whole_numbers(values, columns, 8 * product.digits - 1, numbers);
  room[at.unit + 1] = static_cast<float>(fixed::sum_of_numbers(numbers, columns));
  uint8_t* to = reinterpret_cast<uint8_t*>(room);
  const __m512i middle = _mm512_set1_epi32(0x808080);  // of every digit: what makes them signed
  for (int64_t first = 0; first < columns; first += chunk_columns) {
    for (int digit = 0; digit < product.digits; ++digit, to += chunk_columns) {
      const unsigned shift = static_cast<unsigned>(8 * (product.digits - 1 - digit));
      for (int64_t i = 0; i < chunk_columns; i += 16) {  // sixteen numbers: those of a byte's low codes, and those of its high ones
        const __m512i signs = _mm512_xor_si512(_mm512_add_epi32(_mm512_loadu_si512(numbers + first + i), middle), middle);
        const __m512i all = _mm512_srli_epi32(signs, shift);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i / 2), _mm512_cvtepi64_epi8(all));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 64 + i / 2), _mm512_cvtepi64_epi8(_mm512_srli_epi64(all, 32)));
      }
    }
  }
}

// A level is a number times the unit, above the lowest one.
struct Row {
  const uint8_t* codes;
  __m512i tables[planes];
  float unit, lowest;
};

static inline Row find_row(const Coded& w, int64_t row) {
  constexpr float most = static_cast<float>((1 << (8 * planes)) - 1);
  const int64_t count = w.levels.columns, first = place_of(w.levels, row) * count;
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
  const bool wide = w.levels.number == Number::f32;
  const __m512 found = wide ? _mm512_maskz_loadu_ps(there, static_cast<const float*>(w.levels.data) + first)
                            : few_numbers(static_cast<const uint16_t*>(w.levels.data) + first, count, w.levels.number == Number::f16);
  const float lowest = _mm512_mask_reduce_min_ps(there, found), range = _mm512_mask_reduce_max_ps(there, found) - lowest;
  const __m512 places = _mm512_mul_ps(_mm512_sub_ps(found, _mm512_set1_ps(lowest)), _mm512_set1_ps(range > 0.0f ? most / range : 0.0f));
  const __m512i numbers = _mm512_cvtps_epi32(_mm512_min_ps(places, _mm512_set1_ps(most)));
  Row made;
  for (int plane = 0; plane < planes; ++plane) {
    made.tables[plane] = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, static_cast<unsigned>(8 * (planes - 1 - plane)))));
  }
  const bool finite = _mm512_mask_cmpneq_ps_mask(there, _mm512_sub_ps(found, found), _mm512_setzero_ps()) == 0;
  made.codes = w.codes + row * w.row_bytes, made.unit = finite ? range / most : as_float(0x7fc00000), made.lowest = lowest;
  return made;
}

template <int Digits, int Rows>
static void multiply_rows(const Product& product, const float* prepared, int64_t row) {
  constexpr int weights = Digits + planes - 1;
  const Coded& w = *product.matrix;
  const Inputs at(product);
  const __m512i low = _mm512_set1_epi8(15);
  const int64_t ahead = Rows * rows_ahead(w) / rows_at_once * w.row_bytes;
  Row rows[Rows];
  for (int r = 0; r < Rows; ++r) rows[r] = find_row(w, row + r);
  for (int64_t v = 0; v < product.vectors; ++v, prepared += at.floats) {
    const __m512i* inputs = reinterpret_cast<const __m512i*>(prepared);
    __m512i sums[Rows][weights];
#pragma GCC unroll 32
    for (int i = 0; i < Rows * weights; ++i) (&sums[0][0])[i] = _mm512_setzero_si512();
    for (int64_t at_byte = 0; at_byte < w.row_bytes; at_byte += 64, inputs += Digits * fields) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(rows[r].codes) + at_byte + ahead, _MM_HINT_T1);
        const uint8_t* from = rows[r].codes + at_byte;
        const int64_t left = w.row_bytes - at_byte;
        const __m512i all = left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, from);
        const __m512i codes[fields] = {_mm512_and_si512(all, low), _mm512_and_si512(_mm512_srli_epi16(all, 4), low)};
#pragma GCC unroll 2
        for (int field = 0; field < fields; ++field) {
#pragma GCC unroll 2
          for (int plane = 0; plane < planes; ++plane) {
            const __m512i levels = _mm512_shuffle_epi8(rows[r].tables[plane], codes[field]);
#pragma GCC unroll 2
            for (int digit = 0; digit < Digits; ++digit) {
              sums[r][plane + digit] = _mm512_dpbusd_epi32(sums[r][plane + digit], levels, _mm512_loadu_si512(inputs + digit * fields + field));
            }
          }
        }
      }
    }
    const float unit = prepared[at.unit], sum = prepared[at.unit + 1];
    for (int r = 0; r < Rows; ++r) {
      float total = 0.0f;
#pragma GCC unroll 8
      for (int weight = 0; weight < weights; ++weight) total = total * 256.0f + _mm512_reduce_add_ps(_mm512_cvtepi32_ps(sums[r][weight]));
      float scale = 1.0f;
      if (w.scales.kind != Values::none) scale = number_at(w.scales.data, place_of(w.scales, row + r), w.scales.number);
      put_number(product.outputs, v * w.rows + row + r, product.number, (total * rows[r].unit + sum * rows[r].lowest) * (unit * scale));
    }
  }
}

template <int Digits>
static void multiply_as(const Product& product, const float* prepared, int64_t first, int64_t last) {
  for (; first + rows_at_once <= last; first += rows_at_once) multiply_rows<Digits, rows_at_once>(product, prepared, first);
  for (; first < last; ++first) multiply_rows<Digits, 1>(product, prepared, first);
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float*) {
  (product.digits == 1 ? multiply_as<1> : multiply_as<2>)(product, prepared, first, last);
}

}  // namespace row_levels
}  // namespace FEWBITS_ISA
}  // namespace fewbits
