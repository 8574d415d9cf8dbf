// Sixty-four bytes a vector, and products of bytes summed by fours: AVX-512 VNNI, and VBMI for codes that straddle bytes.
#pragma once

namespace fewbits {
namespace FEWBITS_ISA {
namespace fixed {

// How codes of a width come out of memory: `fields` vectors of bytes for a block of columns.
template <int Bits, int Digits>
struct Block {
  static constexpr bool served = true, only_whole = false, cut = 8 % Bits == 0;  // whether whole codes fill bytes
  static constexpr int fields = cut ? 8 / Bits : Bits == 3 ? 2 : 1;
  static constexpr int columns = 64 * fields, bytes = columns * Bits / 8, read_bytes = 64, per_lane = columns / lanes;
  static constexpr int digits = Digits, digit_bytes = 1;
  // A lane's sum of codes times inputs stays in 32 bits; wider codes have their digits summed apart, over some blocks.
  static constexpr bool joined = Bits <= 6;
  static constexpr int longest = joined ? 1 : 16;  // blocks that may be summed before sums are scaled
  static constexpr int rows = 4, rows_of_tile = joined ? 2 : 1;
};

// Made anew each time: a copy of a register takes a place in the queue, a zero does not.
static inline __m512i fresh_zero() {
  __m512i zero;
  asm("vpxord %0, %0, %0" : "=v"(zero));
  return zero;
}

// What the fields are cut from: the bytes as they lie, or those of eight codes brought into one word of 64 bits.
template <int Bits>
static inline __m512i read_block(const uint8_t* from) {
  const __m512i all = _mm512_loadu_si512(from);
  if constexpr ((8 % Bits == 0)) {
    return all;
  } else {
    constexpr int step = (Bits == 3 ? 2 : 1) * Bits;  // bytes that a word takes
    alignas(64) static constexpr auto order = [] {
      struct { uint8_t at[64]; } made{};
      for (int i = 0; i < 64; ++i) made.at[i] = static_cast<uint8_t>(i / 8 * step + (i % 8 < step ? i % 8 : 0));
      return made;
    }();
    return _mm512_permutexvar_epi8(_mm512_load_si512(order.at), all);
  }
}

// The codes of a field, one to a byte.
template <int Bits>
static inline __m512i take_field(__m512i all, int field) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1));
  if constexpr (Bits == 8) return all;
  if constexpr ((8 % Bits == 0)) return _mm512_and_si512(field == 0 ? all : _mm512_srli_epi16(all, static_cast<unsigned>(Bits * field)), mask);
  // The bit of a word at which each of eight codes begins; two lanes of 24 bits, four codes of each a field, where they have 3.
  constexpr auto starts = [](int of) {
    uint64_t made = 0;
    for (int i = 0; i < 8; ++i) made |= static_cast<uint64_t>(Bits == 3 ? i / 4 * 24 + (i % 4 + 4 * of) * 3 : i * Bits) << (8 * i);
    return static_cast<int64_t>(made);
  };
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(field == 0 ? starts(0) : starts(1)), all), mask);
}

// One digit of a block's columns, dealt to the fields; a field's bytes lie `stride` behind the last one's.
template <int Bits, int Digits>
static inline void deal(const uint8_t* bytes, int64_t stride, uint8_t* to) {
  constexpr int fields = Block<Bits, Digits>::fields, each = 64 / fields;
  for (int i = 0; i < fields; ++i) {
    const __m512i all = _mm512_load_si512(bytes + 64 * i);
#pragma GCC unroll 8
    for (int f = 0; f < fields; ++f) {
      uint8_t* out = to + f * stride + i * each;
      if constexpr (fields == 1) _mm512_store_si512(out, all);
      else if constexpr (Bits == 3) _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(_mm512_srli_epi64(all, static_cast<unsigned>(32 * f))));
      else if constexpr (fields == 2) _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(_mm512_srli_epi16(all, static_cast<unsigned>(8 * f))));
      else if constexpr (fields == 4) _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_srli_epi32(all, static_cast<unsigned>(8 * f))));
      else _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm512_cvtepi64_epi8(_mm512_srli_epi64(all, static_cast<unsigned>(8 * f))));
    }
  }
}

static inline Floats converted(__m512i numbers) { return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(numbers)); }

// Sums of `count` blocks, lane by lane, in units of the inputs; `digits` lie [block, digit, field, vector, 64].
template <int Bits, int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void multiply_blocks(const uint8_t* const* codes, const uint8_t* digits, int64_t count, int64_t ahead,
                                                                  Floats (*found)[Vectors]) {
  using Shape = Block<Bits, Digits>;
  if constexpr (Shape::joined && Vectors == 1) {  // the digits' sums apart: more of them than one product takes time
    __m512i all[Rows], sum[Digits][Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      all[r] = read_block<Bits>(codes[r]);
      _mm_prefetch(reinterpret_cast<const char*>(codes[r] + ahead), _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int digit = 0; digit < Digits; ++digit) for (int r = 0; r < Rows; ++r) sum[digit][r] = fresh_zero();
#pragma GCC unroll 8
    for (int f = 0; f < Shape::fields; ++f) {
      __m512i code[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) code[r] = take_field<Bits>(all[r], f);
#pragma GCC unroll 8
      for (int digit = 0; digit < Digits; ++digit) {
        const __m512i input = _mm512_load_si512(digits + (digit * Shape::fields + f) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) sum[digit][r] = _mm512_dpbusd_epi32(sum[digit][r], code[r], input);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      __m512i all = sum[0][r];
      if constexpr (Digits >= 2) all = _mm512_add_epi32(_mm512_slli_epi32(all, 8), sum[1][r]);
      if constexpr (Digits == 3) all = _mm512_add_epi32(_mm512_slli_epi32(all, 8), sum[2][r]);
      found[r][0] = converted(all);
    }
    (void)count;
  } else if constexpr (Shape::joined) {
    __m512i code[Rows][Shape::fields], sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i all = read_block<Bits>(codes[r]);
      _mm_prefetch(reinterpret_cast<const char*>(codes[r] + ahead), _MM_HINT_T1);
#pragma GCC unroll 8
      for (int f = 0; f < Shape::fields; ++f) code[r][f] = take_field<Bits>(all, f);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) sum[r][v] = fresh_zero();
#pragma GCC unroll 8
    for (int digit = 0; digit < Digits; ++digit) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) if (digit > 0) sum[r][v] = _mm512_slli_epi32(sum[r][v], 8);
#pragma GCC unroll 8
      for (int f = 0; f < Shape::fields; ++f) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          const __m512i input = _mm512_load_si512(digits + ((digit * Shape::fields + f) * Vectors + v) * 64);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], code[r][f], input);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) found[r][v] = converted(sum[r][v]);
    (void)count;
  } else {
    __m512i sum[Digits][Rows][Vectors];
#pragma GCC unroll 8
    for (int digit = 0; digit < Digits; ++digit) for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) sum[digit][r][v] = fresh_zero();
    for (int64_t block = 0; block < count; ++block) {
      __m512i code[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        code[r] = take_field<Bits>(read_block<Bits>(codes[r] + block * Shape::bytes), 0);
        _mm_prefetch(reinterpret_cast<const char*>(codes[r] + block * Shape::bytes + ahead), _MM_HINT_T1);
      }
#pragma GCC unroll 8
      for (int digit = 0; digit < Digits; ++digit) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          const __m512i input = _mm512_load_si512(digits + ((block * Digits + digit) * Vectors + v) * 64);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) sum[digit][r][v] = _mm512_dpbusd_epi32(sum[digit][r][v], code[r], input);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) {
        __m512i high = sum[0][r][v];
        if constexpr (Digits >= 2) high = _mm512_add_epi32(_mm512_slli_epi32(high, 8), sum[1][r][v]);
        found[r][v] = converted(high);
        if constexpr (Digits == 3) found[r][v] = multiply_add(found[r][v], spread(256.0f), converted(sum[2][r][v]));
      }
    }
  }
}

}  // namespace fixed
}  // namespace FEWBITS_ISA
}  // namespace fewbits
