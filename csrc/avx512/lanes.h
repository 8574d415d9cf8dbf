// Sixteen lanes of 32 bits: AVX-512 F, BW and VL. Where the compiler does not target it, the same steps lane by lane,
// so that everything but these few instructions can be tested on any machine.
#pragma once
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "../numbers.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int lanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

static inline Floats zeros() { return Floats{}; }

static inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

static inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
static inline Floats spread(float value) {
  return Floats{value, value, value, value, value, value, value, value, value, value, value, value, value, value, value, value};
}
static inline Floats add(Floats a, Floats b) { return a + b; }
static inline Floats multiply(Floats a, Floats b) { return a * b; }

static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#ifdef __AVX512BW__
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
  return a * b + c;
#endif
}

static inline float sum(Floats value) {
#ifdef __AVX512BW__
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value));
#else
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) value[i] += value[i + step];
  return value[0];
#endif
}

#ifdef __AVX512BW__
// The sums of four vectors' lanes.
static inline void sum_four(Floats a, Floats b, Floats c, Floats d, float* to) {
  const auto both = [](Floats x, Floats y) {
    const __m512 one = reinterpret_cast<__m512>(x), two = reinterpret_cast<__m512>(y);
    return _mm512_add_ps(_mm512_unpacklo_ps(one, two), _mm512_unpackhi_ps(one, two));
  };
  const __m512 first = both(a, b), second = both(c, d);
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#else
static inline void sum_four(Floats a, Floats b, Floats c, Floats d, float* to) { to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d); }
#endif

// Lanes change their signs where a bit of `minus` is set: the highest of the sixteen lowest for the first lane.
static inline Floats flip(Floats value, uint32_t minus) {
  Words all = Words{} + minus;
  all <<= Words{16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) ^ (all & 0x80000000u));
}

// Lane i takes from[pick[i]], 0 <= pick[i] < 16.
static inline Floats permute(const float* from, const int32_t* pick) {
#ifdef __AVX512BW__
  return reinterpret_cast<Floats>(_mm512_permutexvar_ps(_mm512_loadu_si512(pick), _mm512_loadu_ps(from)));
#else
  Floats value;
  for (int i = 0; i < lanes; ++i) value[i] = from[pick[i]];
  return value;
#endif
}

#ifdef __AVX512BW__
// Up to 16 numbers of 2 bytes; `half` says of which kind.
static inline __m512 few_numbers(const uint16_t* from, int64_t count, bool half) {
  const __m256i bits = count >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                   : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return half ? _mm512_cvtph_ps(bits) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// How 16 packed codes come to lie in lanes.
struct Unpacker {
  __m512i order, shift, mask;
  int bits;

  explicit Unpacker(int width) : bits(width) {
    const __m512i first = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(width));
    const __m512i byte = _mm512_srli_epi32(first, 3), next = _mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(1)), 8);
    order = _mm512_or_si512(_mm512_or_si512(byte, next), _mm512_set1_epi32(static_cast<int>(0x80800000)));  // two bytes hold a code
    shift = _mm512_and_si512(first, _mm512_set1_epi32(7));
    mask = _mm512_set1_epi32((1 << width) - 1);
  }

  // Up to 16 codes from place `at` on, a multiple of 8.
  __m512 take(const uint8_t* row, int64_t at, int64_t count) const {
    const int64_t there = count >= 16 ? 2 * bits : (count * bits + 7) / 8;
    const __m128i packed = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << there) - 1), row + at / 8 * bits);
    const __m512i spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(packed), order);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(spread, shift), mask));
  }
};
#endif

static inline void halves_to_floats(const uint16_t* from, int64_t count, float* to) {
#ifdef __AVX512BW__
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, few_numbers(from + i, 16, true));
  if (i < count) _mm512_mask_storeu_ps(to + i, static_cast<__mmask16>((1u << (count - i)) - 1), few_numbers(from + i, count - i, true));
#else
  for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
#endif
}

// Packed codes of a row as numbers; `bytes` has room for them, one to a byte.
static inline void codes_to_floats(const uint8_t* from, int bits, int64_t count, float* to, uint8_t* bytes) {
#ifdef __AVX512BW__
  (void)bytes;
  const Unpacker unpacker(bits);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, unpacker.take(from, i, 16));
  if (i < count) _mm512_mask_storeu_ps(to + i, static_cast<__mmask16>((1u << (count - i)) - 1), unpacker.take(from, i, count - i));
#else
  unpack(from, bits, count, bytes);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(bytes[i]);
#endif
}

#ifdef __AVX512BW__
// Inputs times `factor`, rounded to whole numbers; `count` is a multiple of the lanes.
static inline void to_integers(const float* from, int64_t count, float factor, int32_t* to) {
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += 16) _mm512_storeu_si512(to + i, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), by)));
}
#endif

// The codes of a lane's columns from bit 0 of its word on. Reads 16 bytes from each quarter block's start.
template <int Bits>
static inline Words words(const uint8_t* from) {
  constexpr int quarter = Bits <= 4 ? 4 * Bits : 2 * Bits;  // bytes that four lanes take
  Words value;
  if constexpr (quarter == 16) {
    std::memcpy(&value, from, sizeof value);
    return value;
  } else {
    constexpr int width = quarter * 2;  // bits that a lane takes
#ifdef __AVX512BW__
    if constexpr (width == 8 || width == 16) {
      const __m256i all = width == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      value = reinterpret_cast<Words>(width == 16 ? _mm512_cvtepu16_epi32(all) : _mm512_cvtepu8_epi32(_mm256_castsi256_si128(all)));
    } else {
      constexpr int o1 = width / 8, o2 = width * 2 / 8, o3 = width * 3 / 8;
      const __m128i order = _mm_setr_epi8(0, 1, 2, 3, o1, o1 + 1, o1 + 2, o1 + 3, o2, o2 + 1, o2 + 2, o2 + 3, o3, o3 + 1, o3 + 2, o3 + 3);
      __m512i all;
      if constexpr (width == 24) {  // twelve bytes of four lanes into each quarter
        const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
        all = _mm512_permutexvar_epi32(quarters, _mm512_maskz_loadu_epi32(0x0fff, from));
      } else {
        const auto part = [from](int index) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + index * quarter)); };
        all = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
        all = _mm512_inserti32x4(_mm512_inserti32x4(all, part(2), 2), part(3), 3);
      }
      value = reinterpret_cast<Words>(_mm512_shuffle_epi8(all, _mm512_broadcast_i32x4(order)));
    }
#else
    for (int i = 0; i < lanes; ++i) {
      uint32_t word;
      std::memcpy(&word, from + i / 4 * quarter + i % 4 * width / 8, 4);
      value[i] = word;
    }
#endif
    if constexpr (Bits == 5 || Bits == 7) value >>= Words{0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4};
    return value;
  }
}

// The code of a lane's column `Index` as a number, times 2**(Bits * Index) but for the last column.
template <int Bits, int Index>
static inline Floats field(Words word) {
  constexpr int last = Bits <= 4 ? 7 : 3;
  constexpr uint32_t mask = (uint32_t{1} << Bits) - 1;
  const Words code = Index < last ? word & (mask << (Index < last ? Bits * Index : 0)) : (word >> (Bits * Index)) & mask;
  return __builtin_convertvector(reinterpret_cast<Integers>(code), Floats);
}

// A codebook in registers; one of fewer levels than lanes again and again.
template <int Bits>
struct Book {
  static constexpr int parts = Bits <= 4 ? 1 : 1 << (Bits - 4);
  Floats levels[parts];
};

template <int Bits>
static inline Book<Bits> load_book(const float* levels) {
  Book<Bits> book;
  for (int part = 0; part < Book<Bits>::parts; ++part) for (int i = 0; i < lanes; ++i) book.levels[part][i] = levels[part * lanes + i % (1 << Bits)];
  return book;
}

#ifdef __AVX512BW__
// Of `Parts` registers from the first on: the lowest five bits of a code look up in two at once, each bit above chooses between halves.
template <int Parts>
static inline __m512 look_up_parts(const Floats* levels, __m512i code, const __mmask16* upper) {
  if constexpr (Parts == 1) return _mm512_permutexvar_ps(code, reinterpret_cast<__m512>(levels[0]));
  else if constexpr (Parts == 2) return _mm512_permutex2var_ps(reinterpret_cast<__m512>(levels[0]), code, reinterpret_cast<__m512>(levels[1]));
  else {
    constexpr int bit = Parts == 4 ? 0 : Parts == 8 ? 1 : 2;
    return _mm512_mask_blend_ps(upper[bit], look_up_parts<Parts / 2>(levels, code, upper), look_up_parts<Parts / 2>(levels + Parts / 2, code, upper));
  }
}
#endif

template <int Bits, int Index>
static inline Floats look_up(Words word, const Book<Bits>& book) {
#ifdef __AVX512BW__
  const __m512i code = reinterpret_cast<__m512i>(word >> (Bits * Index));  // higher bits choose among equal copies of a small codebook, or are not looked at
  __mmask16 upper[3] = {};
  for (int bit = 5; bit < Bits; ++bit) upper[bit - 5] = _mm512_test_epi32_mask(code, _mm512_set1_epi32(1 << bit));
  return reinterpret_cast<Floats>(look_up_parts<Book<Bits>::parts>(book.levels, code, upper));
#else
  const Words code = (word >> (Bits * Index)) & ((1u << Bits) - 1);
  Floats value;
  for (int i = 0; i < lanes; ++i) value[i] = book.levels[code[i] / lanes][code[i] % lanes];
  return value;
#endif
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
