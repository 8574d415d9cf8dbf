// Eight lanes of 32 bits: AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include "../numbers.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int lanes = 8;
using Floats = __m256;
using Words = __m256i;

static inline Floats zeros() { return _mm256_setzero_ps(); }
static inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
static inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
static inline Floats spread(float value) { return _mm256_set1_ps(value); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

static inline float sum(Floats value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// The sums of four vectors' lanes.
static inline void sum_four(Floats a, Floats b, Floats c, Floats d, float* to) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

// Lanes change their signs where a bit of `minus` is set: the highest of the eight lowest for the first lane.
static inline Floats flip(Floats value, uint32_t minus) {
  const __m256i all = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(minus)), _mm256_setr_epi32(24, 25, 26, 27, 28, 29, 30, 31));
  return _mm256_xor_ps(value, _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(INT32_MIN))));
}

// Lane i takes from[pick[i]], 0 <= pick[i] < 8.
static inline Floats permute(const float* from, const int32_t* pick) {
  return _mm256_permutevar8x32_ps(load(from), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pick)));
}

// Up to 8 numbers of 2 bytes; `half` says of which kind.
static inline __m256 few_numbers(const uint16_t* from, int64_t count, bool half) {
  __m128i bits;
  if (count >= 8) {
    bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  } else {
    alignas(16) uint16_t few[8] = {};
    for (int64_t i = 0; i < count; ++i) few[i] = from[i];
    bits = _mm_load_si128(reinterpret_cast<const __m128i*>(few));
  }
  return half ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// How 8 packed codes come to lie in lanes.
struct Unpacker {
  __m256i shift, mask;
  int bits;

  explicit Unpacker(int width) : bits(width) {
    const __m256i first = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(width));
    // Above 4 bits the last four codes begin in bytes of their own, half a code's width times eight on.
    shift = width <= 4 ? first : _mm256_sub_epi32(first, _mm256_setr_epi32(0, 0, 0, 0, 4 * width, 4 * width, 4 * width, 4 * width));
    mask = _mm256_set1_epi32((1 << width) - 1);
  }

  // Up to 8 codes from place `at` on, a multiple of 8.
  __m256 take(const uint8_t* row, int64_t at, int64_t count) const {
    uint64_t word = 0;
    const uint8_t* from = row + at / 8 * bits;
    const int64_t there = count >= 8 ? bits : (count * bits + 7) / 8;
    for (int64_t i = 0; i < there; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
    const int low = static_cast<int>(word), high = bits <= 4 ? low : static_cast<int>(word >> (4 * bits));
    const __m256i words = _mm256_inserti128_si256(_mm256_set1_epi32(low), _mm_set1_epi32(high), 1);
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(words, shift), mask));
  }
};

static inline void halves_to_floats(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store(to + i, few_numbers(from + i, 8, true));
  if (i < count && count >= 8) store(to + count - 8, few_numbers(from + count - 8, 8, true));  // the last ones, some of them again
  else for (; i < count; ++i) to[i] = half_to_float(from[i]);
}

// Packed codes of a row as numbers; `bytes` has room for them, one to a byte.
static inline void codes_to_floats(const uint8_t* from, int bits, int64_t count, float* to, uint8_t*) {
  const Unpacker unpacker(bits);
  for (int64_t i = 0; i < count; i += 8) {
    if (i + 8 <= count) {
      store(to + i, unpacker.take(from, i, 8));
    } else {
      float few[8];
      store(few, unpacker.take(from, i, count - i));
      std::memcpy(to + i, few, static_cast<size_t>(count - i) * 4);
    }
  }
}

// Inputs times `factor`, rounded to whole numbers; `count` is a multiple of the lanes.
static inline void to_integers(const float* from, int64_t count, float factor, int32_t* to) {
  const __m256 by = _mm256_set1_ps(factor);
  for (int64_t i = 0; i < count; i += 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), by)));
  }
}

// The codes of a lane's columns from bit 0 of its word on. Reads 16 bytes from each half block's start.
template <int Bits>
static inline Words words(const uint8_t* from) {
  constexpr int half = Bits <= 4 ? 4 * Bits : 2 * Bits;  // bytes that four lanes take
  if constexpr (half == 16) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  } else {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + half)), 1);
    constexpr int width = half * 2;  // half bytes that a lane takes
    constexpr int o0 = 0, o1 = width / 8, o2 = width * 2 / 8, o3 = width * 3 / 8;
    const __m256i order = _mm256_setr_epi8(o0, o0 + 1, o0 + 2, o0 + 3, o1, o1 + 1, o1 + 2, o1 + 3, o2, o2 + 1, o2 + 2, o2 + 3, o3, o3 + 1, o3 + 2, o3 + 3,
                                           o0, o0 + 1, o0 + 2, o0 + 3, o1, o1 + 1, o1 + 2, o1 + 3, o2, o2 + 1, o2 + 2, o2 + 3, o3, o3 + 1, o3 + 2, o3 + 3);
    const __m256i placed = _mm256_shuffle_epi8(both, order);
    if constexpr (Bits == 5 || Bits == 7) return _mm256_srlv_epi32(placed, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    return placed;
  }
}

// The code of a lane's column `Index` as a number, times 2**(Bits * Index) but for the last column.
template <int Bits, int Index>
static inline Floats field(Words word) {
  constexpr int last = Bits <= 4 ? 7 : 3;
  constexpr uint32_t mask = (uint32_t{1} << Bits) - 1;
  if constexpr (Index < last) return _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(static_cast<int>(mask << (Bits * Index)))));
  else if constexpr (Bits * (last + 1) == 32) return _mm256_cvtepi32_ps(_mm256_srli_epi32(word, Bits * Index));
  else return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(word, Bits * Index), _mm256_set1_epi32(static_cast<int>(mask))));
}

// A codebook of up to 32 levels in registers, one of fewer than lanes again and again; a larger one in the cache.
template <int Bits>
struct Book {
  static constexpr int parts = Bits <= 3 ? 1 : Bits <= 5 ? 1 << (Bits - 3) : 0;
  __m256 levels[parts > 0 ? parts : 1];
  const float* wide;
};

template <int Bits>
static inline Book<Bits> load_book(const float* levels) {
  Book<Bits> book{};
  book.wide = levels;
  float some[8];
  for (int part = 0; part < Book<Bits>::parts; ++part) {
    for (int i = 0; i < 8; ++i) some[i] = levels[part * 8 + i % (1 << Bits)];
    book.levels[part] = load(some);
  }
  return book;
}

// Of `Parts` registers from the first on: three bits look up in one, and bit `Top` of a lane chooses between halves.
template <int Parts, int Top>
static inline __m256 look_up_parts(const __m256* levels, __m256i code, __m256i word) {
  if constexpr (Parts == 1) return _mm256_permutevar8x32_ps(levels[0], code);
  else {
    const __m256 low = look_up_parts<Parts / 2, Top - 1>(levels, code, word), high = look_up_parts<Parts / 2, Top - 1>(levels + Parts / 2, code, word);
    const __m256i choice = Top == 31 ? word : _mm256_slli_epi32(word, 31 - Top);  // the sign chooses
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(choice));
  }
}

template <int Bits, int Index>
static inline Floats look_up(Words word, const Book<Bits>& book) {
  const __m256i code = Index == 0 ? word : _mm256_srli_epi32(word, Bits * Index);
  if constexpr (Bits <= 2) return _mm256_permutevar_ps(book.levels[0], code);  // reads two bits
  else if constexpr (Bits <= 5) return look_up_parts<Book<Bits>::parts, Bits * Index + Bits - 1>(book.levels, code, word);  // reads three
  else return _mm256_i32gather_ps(book.wide, _mm256_and_si256(code, _mm256_set1_epi32((1 << Bits) - 1)), 4);
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
