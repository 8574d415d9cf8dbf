// Codes of three values, five to a byte, out of 32 bytes: a byte over 3, 9, 27 and 81 is the high half of a product.
#pragma once

namespace fewbits {
namespace FEWBITS_ISA {
namespace ternary {

constexpr int64_t window_lanes = 4;  // lanes whose bytes lie in one window of a row
constexpr int64_t rows_at_once = 2, rows_of_tile = 1;

static inline __m256i read_bytes(const uint8_t* row, const int32_t* bases, const uint8_t* order) {
  const auto window = [row](int32_t base) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + base)); };
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(window(bases[0])), window(bases[1]), 1);
  const __m256i bytes = _mm256_shuffle_epi8(both, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order)));
  return _mm256_min_epu8(bytes, _mm256_sub_epi8(bytes, _mm256_set1_epi8(static_cast<char>(243))));  // 243 less where that can be
}

// Every byte, below 243, over 3**Power, rounded down. A byte times 65536 / 3**Power, rounded up, is off by less than 243 of 65536.
template <int Power>
static inline __m256i divided(__m256i bytes) {
  constexpr int by = Power == 1 ? 3 : Power == 2 ? 9 : Power == 3 ? 27 : 81;
  if constexpr (Power == 0) return bytes;
  const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>((65536 + by - 1) / by)), low = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_mulhi_epu16(_mm256_and_si256(bytes, low), factor), odd = _mm256_mulhi_epu16(_mm256_andnot_si256(low, bytes), factor);
  return _mm256_or_si256(even, _mm256_andnot_si256(low, odd));
}

template <int Place>
static inline __m256i take_trit(__m256i bytes) {
  const __m256i here = divided<Place>(bytes);
  if constexpr (Place == 4) return here;
  const __m256i next = divided<Place + 1>(bytes);
  return _mm256_sub_epi8(here, _mm256_add_epi8(next, _mm256_add_epi8(next, next)));
}

template <int Place, int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void add_products(const __m256i* bytes, const uint8_t* digits, __m256i (*sum)[Rows][Vectors]) {
  __m256i code[Rows];
  for (int r = 0; r < Rows; ++r) code[r] = take_trit<Place>(bytes[r]);
  for (int digit = 0; digit < Digits; ++digit) {
    for (int v = 0; v < Vectors; ++v) {
      const __m256i input = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(digits + ((digit * 5 + Place) * Vectors + v) * 32));
      for (int r = 0; r < Rows; ++r) sum[digit][r][v] = _mm256_add_epi16(sum[digit][r][v], _mm256_maddubs_epi16(code[r], input));
    }
  }
}

// Sums of a block, lane by lane, in units of the inputs; `digits` lie [digit, trit, vector, 32], `starts` [vector, lanes].
template <int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void multiply_trits(const uint8_t* const* codes, const int32_t* bases, const uint8_t* order,
                                                                 const uint8_t* digits, const int32_t* starts, Floats (*found)[Vectors]) {
  __m256i bytes[Rows], sum[Digits][Rows][Vectors];
  for (int r = 0; r < Rows; ++r) bytes[r] = read_bytes(codes[r], bases, order);
  for (int digit = 0; digit < Digits; ++digit) for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) sum[digit][r][v] = _mm256_setzero_si256();
  add_products<0, Digits, Rows, Vectors>(bytes, digits, sum);
  add_products<1, Digits, Rows, Vectors>(bytes, digits, sum);
  add_products<2, Digits, Rows, Vectors>(bytes, digits, sum);
  add_products<3, Digits, Rows, Vectors>(bytes, digits, sum);
  add_products<4, Digits, Rows, Vectors>(bytes, digits, sum);
  const __m256i one = _mm256_set1_epi16(1);
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      __m256i whole = _mm256_madd_epi16(sum[0][r][v], one);
      for (int digit = 1; digit < Digits; ++digit) whole = _mm256_add_epi32(_mm256_slli_epi32(whole, 8), _mm256_madd_epi16(sum[digit][r][v], one));
      found[r][v] = _mm256_cvtepi32_ps(_mm256_add_epi32(whole, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts + v * 8))));
    }
  }
}

}  // namespace ternary
}  // namespace FEWBITS_ISA
}  // namespace fewbits
