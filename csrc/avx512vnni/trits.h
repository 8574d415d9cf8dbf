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

// Sums of a block, lane by lane, in units of the inputs; `digits` lie [digit, trit, vector, 64], `starts` [vector, lanes].
template <int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void multiply_trits(const uint8_t* const* codes, const int32_t* bases, const uint8_t* order,
                                                                 const uint8_t* digits, const int32_t* starts, Floats (*found)[Vectors]) {
  // The digits' sums apart for one vector, so that one need not wait for another; of a tile there are sums enough.
  constexpr bool apart = Vectors == 1;
  __m512i code[5][Rows], sum[apart ? Digits : 1][Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const Trits all = read_trits(codes[r], bases, order);
    code[0][r] = take_trit<0>(all), code[1][r] = take_trit<1>(all), code[2][r] = take_trit<2>(all);
    code[3][r] = take_trit<3>(all), code[4][r] = take_trit<4>(all);
  }
#pragma GCC unroll 8
  for (int digit = 0; digit < Digits; ++digit) {
    const auto of = [&](int r, int v) -> __m512i& { return sum[apart ? digit : 0][r][v]; };
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) {
      if (apart || digit == 0) of(r, v) = fixed::fresh_zero();
      else of(r, v) = _mm512_slli_epi32(of(r, v), 8);
      if (digit == Digits - 1) of(r, v) = _mm512_add_epi32(of(r, v), _mm512_loadu_si512(starts + v * 16));
    }
#pragma GCC unroll 8
    for (int trit = 0; trit < 5; ++trit) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const __m512i input = _mm512_loadu_si512(digits + ((digit * 5 + trit) * Vectors + v) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) of(r, v) = _mm512_dpbusd_epi32(of(r, v), code[trit][r], input);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      __m512i whole = sum[0][r][v];
      for (int digit = 1; apart && digit < Digits; ++digit) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), sum[digit][r][v]);
      found[r][v] = fixed::converted(whole);
    }
  }
}

}  // namespace ternary
}  // namespace FEWBITS_ISA
}  // namespace fewbits
