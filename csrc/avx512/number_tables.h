// Tables of up to 256 entries in registers, in which 64 codes are looked up at once: of bytes, or of numbers, which are four tables of bytes.
#pragma once
#include "lanes.h"

#ifdef __AVX512VBMI__
namespace fewbits {
namespace FEWBITS_ISA {

constexpr int parts_of(int bits) { return bits <= 6 ? 1 : 1 << (bits - 6); }  // registers of a table, of 64 entries each
constexpr int most_parts = parts_of(8);

// By six bits of each code or seven, of which those above narrower codes are any; the eighth says in which half.
template <int Bits>
static inline __attribute__((always_inline)) __m512i look_up(__m512i codes, const __m512i* table) {
  if constexpr (Bits <= 6) return _mm512_permutexvar_epi8(codes, table[0]);
  const __m512i low = _mm512_permutex2var_epi8(table[0], codes, table[1]);
  if constexpr (Bits <= 7) return low;
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

struct NumberTable {
  __m512i bytes[4][most_parts];  // the lowest ones first

  explicit NumberTable(const float* numbers) {  // 256 of them
    alignas(64) uint8_t all[4][256];
    for (int i = 0; i < 256; i += 16) {
      const __m512i some = _mm512_loadu_si512(numbers + i);
      for (int byte = 0; byte < 4; ++byte) {
        _mm_store_si128(reinterpret_cast<__m128i*>(all[byte] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(some, static_cast<unsigned>(8 * byte))));
      }
    }
    for (int i = 0; i < 4 * most_parts; ++i) bytes[i / most_parts][i % most_parts] = _mm512_load_si512(all[i / most_parts] + 64 * (i % most_parts));
  }

  // What code 4 k + j of each sixteen says goes to number 4 l + j of the k-th register, l which sixteen it is.
  template <int Bits>
  inline __attribute__((always_inline)) void look_up_in_fours(__m512i codes, __m512* numbers) const {
    __m512i found[4];
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; ++byte) found[byte] = look_up<Bits>(codes, bytes[byte]);
    const __m512i lows[2] = {_mm512_unpacklo_epi8(found[0], found[1]), _mm512_unpackhi_epi8(found[0], found[1])};
    const __m512i highs[2] = {_mm512_unpacklo_epi8(found[2], found[3]), _mm512_unpackhi_epi8(found[2], found[3])};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      numbers[2 * i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(lows[i], highs[i]));
      numbers[2 * i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(lows[i], highs[i]));
    }
  }
};

}  // namespace FEWBITS_ISA
}  // namespace fewbits
#endif
