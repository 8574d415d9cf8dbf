// Thirty-two bytes a vector, and products of bytes summed by twos into 16 bits, by fours into 32: AVX2.
#pragma once

namespace fewbits {
namespace FEWBITS_ISA {
namespace fixed {

// How codes of a width come out of memory: `fields` vectors of bytes for a block of columns.
template <int Bits, int Digits>
struct Block {
  static constexpr bool served = 8 % Bits == 0, only_whole = Bits == 8;
  static constexpr int fields = served ? 8 / Bits : 1;
  static constexpr int columns = 32 * fields, bytes = 32, read_bytes = 32, per_lane = Bits == 8 ? 2 : 4 * fields;
  // Products of bytes of 8 bits and digits of 8 bits would not fit 16 bits: two digits of 12 bits, and the codes widened.
  static constexpr int digit_bytes = Bits == 8 ? 2 : 1, digits = Bits == 8 ? 2 : Digits;
  static constexpr int longest = Bits == 8 ? 32 : Bits == 4 ? 2 : 4;  // blocks whose sums of codes times 2**23 stay in 32 bits
  static constexpr int rows = 2, rows_of_tile = 1;
};

template <int Bits, int Digits>
static inline void deal(const uint8_t* bytes, int64_t stride, uint8_t* to) {
  constexpr int fields = Block<Bits, Digits>::fields;
  for (int f = 0; f < fields; ++f) for (int i = 0; i < 32; ++i) to[f * stride + i] = bytes[fields * i + f];
}

template <int Bits>
static inline __m256i take_field(__m256i all, int field) {
  return _mm256_and_si256(field == 0 ? all : _mm256_srli_epi16(all, Bits * field), _mm256_set1_epi8(static_cast<char>((1 << Bits) - 1)));
}

static inline __attribute__((always_inline)) void fetch(const uint8_t* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1); }

// Sums of `count` blocks, lane by lane, in units of the inputs; `digits` lie [block, digit, field, vector, 32].
template <int Bits, int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void multiply_blocks(const uint8_t* const* codes, const uint8_t* digits, int64_t count, int64_t ahead,
                                                                  Floats (*found)[Vectors]) {
  using Shape = Block<Bits, Digits>;
  constexpr int kinds = Shape::digits;
  __m256i sum[kinds][Rows][Vectors];
#pragma GCC unroll 8
  for (int digit = 0; digit < kinds; ++digit) for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) sum[digit][r][v] = _mm256_setzero_si256();
  for (int64_t block = 0; block < count; ++block) {
    const __m256i* inputs = reinterpret_cast<const __m256i*>(digits) + block * kinds * Shape::fields * Shape::digit_bytes * Vectors;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) if (Vectors == 1 && (block % 2 == 0 || count == 1)) fetch(codes[r] + block * 32 + ahead);
    if constexpr (Bits == 8) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i code[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) code[r] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[r] + block * 32 + 16 * half)));
#pragma GCC unroll 2
        for (int digit = 0; digit < 2; ++digit) {
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) {
            const __m256i input = _mm256_load_si256(inputs + (digit * Vectors + v) * 2 + half);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) sum[digit][r][v] = _mm256_add_epi32(sum[digit][r][v], _mm256_madd_epi16(code[r], input));
          }
        }
      }
    } else {
#pragma GCC unroll 8
      for (int f = 0; f < Shape::fields; ++f) {
        __m256i code[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) code[r] = take_field<Bits>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes[r] + block * 32)), f);
#pragma GCC unroll 8
        for (int digit = 0; digit < kinds; ++digit) {
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) {
            const __m256i input = _mm256_load_si256(inputs + (digit * Shape::fields + f) * Vectors + v);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) sum[digit][r][v] = _mm256_add_epi16(sum[digit][r][v], _mm256_maddubs_epi16(code[r], input));
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (Bits == 8) {
        found[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[0][r][v]), _mm256_set1_ps(4096.0f), _mm256_cvtepi32_ps(sum[1][r][v]));
      } else {
        const __m256i one = _mm256_set1_epi16(1);
        __m256i all = _mm256_madd_epi16(sum[0][r][v], kinds == 1 ? one : _mm256_set1_epi16(256));
        if constexpr (kinds >= 2) all = _mm256_add_epi32(all, _mm256_madd_epi16(sum[1][r][v], one));
        if constexpr (kinds == 3) all = _mm256_add_epi32(_mm256_slli_epi32(all, 8), _mm256_madd_epi16(sum[2][r][v], one));
        found[r][v] = _mm256_cvtepi32_ps(all);
      }
    }
  }
}

}  // namespace fixed
}  // namespace FEWBITS_ISA
}  // namespace fewbits
