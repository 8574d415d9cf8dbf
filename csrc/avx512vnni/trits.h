// Codes of three values, five to a byte, out of 64 bytes: a table of 256 entries in the instruction that looks bytes up.
#pragma once

namespace fewbits {
namespace FEWBITS_ISA {
namespace ternary {

constexpr int64_t window_lanes = 16;  // lanes whose bytes lie in one window of a row
constexpr int64_t rows_at_once = 4, rows_of_tile = 2;

// Of every byte the first four codes, two bits each, and the fifth.
struct Tables {
  uint8_t four[256], fifth[256];
  constexpr Tables() : four{}, fifth{} {
    for (int byte = 0; byte < 256; ++byte) {
      four[byte] = static_cast<uint8_t>(byte % 3 | byte / 3 % 3 << 2 | byte / 9 % 3 << 4 | byte / 27 % 3 << 6);
      fifth[byte] = static_cast<uint8_t>(byte / 81 % 3);
    }
  }
};

alignas(64) static constexpr Tables tables;

struct Trits {
  __m512i four, fifth;
};

static inline __m512i look_up_bytes(const uint8_t* table, __m512i bytes) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), bytes, _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high);
}

static inline Trits read_trits(const uint8_t* row, const int32_t* bases, const uint8_t* order) {
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(order), _mm512_loadu_si512(row + bases[0]));
  return {look_up_bytes(tables.four, bytes), look_up_bytes(tables.fifth, bytes)};
}

template <int Place>
static inline __m512i take_trit(const Trits& all) {
  if constexpr (Place == 4) return all.fifth;
  return _mm512_and_si512(Place == 0 ? all.four : _mm512_srli_epi16(all.four, 2 * Place), _mm512_set1_epi8(3));
}

template <int Place, int Rows, int Vectors>
static inline __attribute__((always_inline)) void add_products(const Trits* all, const uint8_t* digits, __m512i (*sum)[Vectors]) {
  __m512i code[Rows];
  for (int r = 0; r < Rows; ++r) code[r] = take_trit<Place>(all[r]);
  for (int v = 0; v < Vectors; ++v) {
    const __m512i input = _mm512_loadu_si512(digits + (Place * Vectors + v) * 64);
    for (int r = 0; r < Rows; ++r) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], code[r], input);
  }
}

// Sums of a block, lane by lane, in units of the inputs; `digits` lie [digit, trit, vector, 64], `starts` [vector, lanes].
template <int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void multiply_trits(const uint8_t* const* codes, const int32_t* bases, const uint8_t* order,
                                                                 const uint8_t* digits, const int32_t* starts, Floats (*found)[Vectors]) {
  Trits all[Rows];
  for (int r = 0; r < Rows; ++r) all[r] = read_trits(codes[r], bases, order);
  __m512i sum[Digits][Rows][Vectors];
  for (int digit = 0; digit < Digits; ++digit) {
    for (int v = 0; v < Vectors; ++v) for (int r = 0; r < Rows; ++r) {
      sum[digit][r][v] = digit == Digits - 1 ? _mm512_loadu_si512(starts + v * 16) : _mm512_setzero_si512();
    }
    const uint8_t* from = digits + digit * 5 * Vectors * 64;
    add_products<0, Rows, Vectors>(all, from, sum[digit]);
    add_products<1, Rows, Vectors>(all, from, sum[digit]);
    add_products<2, Rows, Vectors>(all, from, sum[digit]);
    add_products<3, Rows, Vectors>(all, from, sum[digit]);
    add_products<4, Rows, Vectors>(all, from, sum[digit]);
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      __m512i whole = sum[0][r][v];
      for (int digit = 1; digit < Digits; ++digit) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), sum[digit][r][v]);
      found[r][v] = fixed::converted(whole);
    }
  }
}

}  // namespace ternary
}  // namespace FEWBITS_ISA
}  // namespace fewbits
