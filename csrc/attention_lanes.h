// What attention does with lanes: exponentials, grids, codes times multipliers, and back to the order of tokens or channels.
// FEWBITS_LANES is how many there are, for the few steps that each instruction set writes in its own way.
#pragma once
#include <utility>

#include "matrix.h"
#include "numbers.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace attention {

static_assert(lanes == FEWBITS_LANES, "the lanes are not those of the instruction set");
constexpr int places = 8;  // codes that a lane holds at most
#ifdef __aarch64__
constexpr int accumulators = 16;  // of 32 registers
#else
constexpr int accumulators = lanes == 16 ? 16 : 8;
#endif
typedef int32_t Whole __attribute__((vector_size(4 * lanes)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t rounded_up(int64_t a, int64_t b) { return ceiling(a, b) * b; }
static inline int64_t codes_of_lane(int bits) { return bits <= 4 ? 8 : 4; }
static inline Floats multiply(Floats a, Floats b) { return a * b; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static inline float largest(Floats value) {
  float all[lanes];
  store(all, value);
  float found = all[0];
  for (int i = 1; i < lanes; ++i) found = all[i] > found ? all[i] : found;
  return found;
}

// exp of numbers that are at most 0, to 2 units in the last place; 0 below -87.
static inline Floats exponential(Floats x) {
  const Floats far = spread(-87.0f), inside = x < far ? far : x, magic = spread(12582912.0f);
  const Floats shifted = multiply_add(inside, spread(1.44269504f), magic), count = shifted - magic;
  Floats rest = multiply_add(count, spread(-0.693145752f), inside);
  rest = multiply_add(count, spread(-1.42860677e-6f), rest);
  Floats found = spread(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) found = multiply_add(found, rest, spread(factor));
  const Whole power = reinterpret_cast<Whole>(shifted) << 23;
  found = reinterpret_cast<Floats>(reinterpret_cast<Whole>(found) + power);
  return x < far ? zeros() : found;
}

static inline Floats halves(const uint16_t* from) {
#if FEWBITS_LANES == 16 && defined(__AVX512BW__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif FEWBITS_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  float all[lanes];
  halves_to_floats(from, lanes, all);
  return load(all);
#endif
}

// `count` of `total` numbers from place `at` on; writes whole lanes, so that `out` has room for the next multiple.
static void read_numbers(const void* data, Number number, int64_t at, int64_t count, int64_t total, float* out) {
  int64_t i = 0;
  if (number == Number::f32) {
    std::memcpy(out, static_cast<const float*>(data) + at, static_cast<size_t>(count) * 4);
  } else if (number == Number::bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(data) + at;
    for (; i < count; ++i) out[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(data) + at;
    for (; i < count && at + i + lanes <= total; i += lanes) store(out + i, halves(from + i));
    for (; i < count; ++i) out[i] = half_to_float(from[i]);
  }
}

// Scales, and zero points times scales, of the groups `at` to `at + count` of all rows' groups, row after row.
static void read_grid(const Coded& w, int64_t at, int64_t count, float* scales, float* shifts) {
  const int64_t total = w.rows * w.groups;
  read_numbers(w.scales.data, w.scales.number, at, count, total, scales);
  if (w.zeros.kind == Values::none) {
    for (int64_t g = 0; g < count; ++g) shifts[g] = middle_code(w.bits);
  } else {
    read_numbers(w.zeros.data, w.zeros.number, at, count, total, shifts);
  }
  for (int64_t g = 0; g < count; ++g) shifts[g] *= scales[g];
}

// What undoes the power of two that a code in its place is multiplied with.
static inline float unfold(int bits, int64_t place) {
  return place < codes_of_lane(bits) - 1 ? as_float(static_cast<uint32_t>(127 - bits * place) << 23) : 1.0f;
}

// ---- codes times multipliers --------------------------------------------------------------------------------------------

template <int Bits, int Index, int Rows>
static inline void accumulate_place(Words word, const Floats* by, Floats* sums) {
  const Floats code = field<Bits, Index>(word);
  for (int r = 0; r < Rows; ++r) sums[r] = multiply_add(code, by[r], sums[r]);
}

template <int Bits, int Rows, int First, int... Place>
static inline void accumulate_places(const float* words, const float* by, int64_t count, float* sums, std::integer_sequence<int, Place...>) {
  Floats total[sizeof...(Place)][Rows];
  ((void)[&] { for (int r = 0; r < Rows; ++r) total[Place][r] = load(sums + ((First + Place) * Rows + r) * lanes); }(), ...);
  for (int64_t block = 0; block < count; ++block) {
    Words word;
    std::memcpy(&word, words + block * lanes, sizeof word);
    Floats factors[Rows];
    for (int r = 0; r < Rows; ++r) factors[r] = load(by + (block * Rows + r) * lanes);
    (accumulate_place<Bits, First + Place, Rows>(word, factors, total[Place]), ...);
  }
  ((void)[&] { for (int r = 0; r < Rows; ++r) store(sums + ((First + Place) * Rows + r) * lanes, total[Place][r]); }(), ...);
}

template <int Bits, int Rows, int Each, int... Pass>
static inline void accumulate_passes(const float* words, const float* by, int64_t count, float* sums, std::integer_sequence<int, Pass...>) {
  (accumulate_places<Bits, Rows, Pass * Each>(words, by, count, sums, std::make_integer_sequence<int, Each>{}), ...);
}

// sums [places, rows, lanes] += the codes of `words [count, lanes]` times `by [count, rows, lanes]`.
template <int Bits, int Rows>
static void accumulate(const float* words, const float* by, int64_t count, float* sums) {
  constexpr int held = Bits <= 4 ? 8 : 4, fit = Rows == 3 ? accumulators / 4 : accumulators / Rows, each = fit < held ? fit : held;
  accumulate_passes<Bits, Rows, each>(words, by, count, sums, std::make_integer_sequence<int, held / each>{});
}

// ---- order -------------------------------------------------------------------------------------------------------------

#if FEWBITS_LANES == 16 && defined(__AVX512BW__)
// Quarter q of the four, one behind the other, at out + q * stride.
static inline void put_quarters(__m512 a, __m512 b, __m512 c, __m512 d, float* out, int64_t stride) {
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
  const __m512 ab_high = _mm512_shuffle_f32x4(a, b, 0xee), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
  _mm512_storeu_ps(out, _mm512_shuffle_f32x4(ab, cd, 0x88));
  _mm512_storeu_ps(out + stride, _mm512_shuffle_f32x4(ab, cd, 0xdd));
  _mm512_storeu_ps(out + 2 * stride, _mm512_shuffle_f32x4(ab_high, cd_high, 0x88));
  _mm512_storeu_ps(out + 3 * stride, _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd));
}

// Quarter q of rows[j] becomes lane 4q + j of the four.
static inline void transpose_quarters(const Floats* found, __m512* rows) {
  __m512 f[4];
  for (int i = 0; i < 4; ++i) f[i] = reinterpret_cast<__m512>(found[i]);
  const auto pair = [](__m512 low, __m512 high, bool upper) {
    const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    return _mm512_castpd_ps(upper ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  };
  const __m512 a = _mm512_unpacklo_ps(f[0], f[1]), b = _mm512_unpacklo_ps(f[2], f[3]), c = _mm512_unpackhi_ps(f[0], f[1]), d = _mm512_unpackhi_ps(f[2], f[3]);
  rows[0] = pair(a, b, false);
  rows[1] = pair(a, b, true);
  rows[2] = pair(c, d, false);
  rows[3] = pair(c, d, true);
}
#elif FEWBITS_LANES == 8
static inline void transpose_quarters(const Floats* f, __m256* rows) {
  const auto pair = [](__m256 low, __m256 high, bool upper) {
    const __m256d a = _mm256_castps_pd(low), b = _mm256_castps_pd(high);
    return _mm256_castpd_ps(upper ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
  };
  const __m256 a = _mm256_unpacklo_ps(f[0], f[1]), b = _mm256_unpacklo_ps(f[2], f[3]), c = _mm256_unpackhi_ps(f[0], f[1]), d = _mm256_unpackhi_ps(f[2], f[3]);
  rows[0] = pair(a, b, false);
  rows[1] = pair(a, b, true);
  rows[2] = pair(c, d, false);
  rows[3] = pair(c, d, true);
}
#endif

// Sums place by place, to the order of what they belong to: out[lane * Held + place] = found[place][lane].
template <int Held>
static inline void put_in_order(const Floats* found, float* out) {
#if FEWBITS_LANES == 16 && defined(__AVX512BW__)
  __m512 low[4], high[4];
  transpose_quarters(found, low);
  if constexpr (Held == 4) {
    put_quarters(low[0], low[1], low[2], low[3], out, 16);
  } else {
    transpose_quarters(found + 4, high);
    put_quarters(low[0], high[0], low[1], high[1], out, 32);
    put_quarters(low[2], high[2], low[3], high[3], out + 16, 32);
  }
#elif FEWBITS_LANES == 8
  __m256 low[4], high[4];
  transpose_quarters(found, low);
  if constexpr (Held == 8) transpose_quarters(found + 4, high);
  for (int j = 0; j < 4; ++j) {
    if constexpr (Held == 8) {
      _mm256_storeu_ps(out + 8 * j, _mm256_permute2f128_ps(low[j], high[j], 0x20));
      _mm256_storeu_ps(out + 8 * j + 32, _mm256_permute2f128_ps(low[j], high[j], 0x31));
    } else if (j % 2 == 0) {
      _mm256_storeu_ps(out + 4 * j, _mm256_permute2f128_ps(low[j], low[j + 1], 0x20));
      _mm256_storeu_ps(out + 4 * j + 16, _mm256_permute2f128_ps(low[j], low[j + 1], 0x31));
    }
  }
#else
  float all[Held * lanes];
  for (int i = 0; i < Held; ++i) store(all + i * lanes, found[i]);
  for (int lane = 0; lane < lanes; ++lane) for (int i = 0; i < Held; ++i) out[lane * Held + i] = all[i * lanes + lane];
#endif
}

}  // namespace attention
}  // namespace FEWBITS_ISA
}  // namespace fewbits
