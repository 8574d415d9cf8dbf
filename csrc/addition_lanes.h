// What the terms that are added to a matrix of codes ask of lanes: numbers of any type, lanes of which some count, sums of many rows at once.
#pragma once
#include "grid.h"
#include "rounding.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace additions {

typedef uint32_t Wholes __attribute__((vector_size(4 * lanes)));

constexpr int64_t two = 2 * lanes;  // numbers that are read in one go

// Numbers of a type in lanes: the first half and the second, of bfloat16 those in even places and those in odd ones, which costs less.
template <Number Is>
static inline __attribute__((always_inline)) void load_two(const uint8_t* from, Floats* found) {
  if constexpr (Is == Number::f32) {
    found[0] = load(reinterpret_cast<const float*>(from));
    found[1] = load(reinterpret_cast<const float*>(from) + lanes);
  } else if constexpr (Is == Number::f16) {
    float all[two];
    halves_to_floats(reinterpret_cast<const uint16_t*>(from), two, all);
    found[0] = load(all);
    found[1] = load(all + lanes);
  } else {
    Wholes all;
    std::memcpy(&all, from, sizeof all);
    found[0] = reinterpret_cast<Floats>(all << 16);
    found[1] = reinterpret_cast<Floats>(all & 0xffff0000u);
  }
}

template <Number Is>
static inline Floats load_lanes(const uint8_t* from) {
  float all[lanes];
  read_numbers(from, 0, Is, lanes, all);
  return load(all);
}

// Lanes whose bit is set, the first one's the lowest; zeros elsewhere.
static inline __attribute__((always_inline)) Floats load_some(const float* from, uint64_t bits) {
#ifdef __AVX512BW__
  return reinterpret_cast<Floats>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), from));
#else
  Wholes place;
  for (int lane = 0; lane < lanes; ++lane) place[lane] = 1u << lane;
  const Wholes there = reinterpret_cast<Wholes>(((Wholes{} + static_cast<uint32_t>(bits)) & place) != 0);
  return reinterpret_cast<Floats>(reinterpret_cast<Wholes>(load(from)) & there);
#endif
}

typedef float Anywhere __attribute__((aligned(1), may_alias));

// Numbers of which each lane says the place: floats, or bfloat16, of which each is read with the one before it, which costs nothing.
template <bool Halves, typename Index>
static inline __attribute__((always_inline)) Floats gather(const void* from, const Index* places) {
  typedef float Four __attribute__((vector_size(16)));
  const auto at = [from](uint64_t place) -> float {
    return *reinterpret_cast<const Anywhere*>(static_cast<const uint8_t*>(from) + (Halves ? 2 : 4) * place);
  };
  Four parts[lanes / 4];
  for (int i = 0; i < lanes / 4; ++i) {
    const Index* four = places + 4 * i;
    if constexpr (sizeof(Index) == 2) {  // two places in one load
      uint32_t pairs[2];
      std::memcpy(pairs, four, 8);
      parts[i] = Four{at(pairs[0] & 0xffff), at(pairs[0] >> 16), at(pairs[1] & 0xffff), at(pairs[1] >> 16)};
    } else {
      parts[i] = Four{at(four[0]), at(four[1]), at(four[2]), at(four[3])};
    }
  }
  Floats found;
#if defined(__AVX512BW__)
  const auto both = [&](int i) { return _mm256_insertf128_ps(_mm256_castps128_ps256(parts[i]), parts[i + 1], 1); };
  found = reinterpret_cast<Floats>(_mm512_insertf32x8(_mm512_castps256_ps512(both(0)), both(2), 1));
#elif defined(__AVX2__)
  found = _mm256_insertf128_ps(_mm256_castps128_ps256(parts[0]), parts[1], 1);
#else
  std::memcpy(&found, parts, sizeof found);
#endif
  if constexpr (Halves) return reinterpret_cast<Floats>(reinterpret_cast<Wholes>(found) & 0xffff0000u);
  return found;
}

// The sums of as many vectors' lanes as a vector has.
static inline __attribute__((always_inline)) Floats sum_all(const Floats* sums) {
#ifdef __AVX512BW__
  __m512 fours[4];  // sums of four vectors, a quarter each
  for (int i = 0; i < 4; ++i) {
    const auto both = [&](int at) {
      const __m512 one = reinterpret_cast<__m512>(sums[4 * i + at]), other = reinterpret_cast<__m512>(sums[4 * i + at + 1]);
      return _mm512_add_ps(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other));
    };
    const __m512 first = both(0), second = both(2);
    fours[i] = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
  }
  const auto both = [&](int at) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(fours[at], fours[at + 1], 0x44), _mm512_shuffle_f32x4(fours[at], fours[at + 1], 0xee));
  };
  const __m512 first = both(0), second = both(2);
  return reinterpret_cast<Floats>(_mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd)));
#else
  float found[lanes];
  for (int r = 0; r < lanes; r += 4) sum_four(sums[r], sums[r + 1], sums[r + 2], sums[r + 3], found + r);
  return load(found);
#endif
}

// Products of one vector: `count` rows from `row` on, one a lane.
static inline __attribute__((always_inline)) void put_lanes(const Product& product, int64_t row, int64_t count, Floats found) {
  if (product.base != nullptr) found = add(load_some(product.base + row, (uint64_t{1} << count) - 1), found);
  if (count == lanes && product.number == Number::f32) return store(static_cast<float*>(product.outputs) + row, found);
  float each[lanes];
  store(each, found);
  if (count == lanes && product.number == Number::bf16) return write_numbers(Type<Number::bf16>{}, each, lanes, product.outputs, row);
  for (int64_t r = 0; r < count; ++r) put_number(product.outputs, row + r, product.number, each[r]);
}

static inline void put_one(const Product& product, int64_t vector, int64_t row, float value) {
  const int64_t at = vector * product.matrix->rows + row;
  put_number(product.outputs, at, product.number, product.base == nullptr ? value : product.base[at] + value);
}

}  // namespace additions
}  // namespace FEWBITS_ISA
}  // namespace fewbits
