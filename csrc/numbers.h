// Reading and writing of 16-bit floats, and unpacking of codes in their order. Included by one instruction set at a time.
#pragma once
#include <cstring>

#include "matrix.h"

namespace fewbits {
namespace FEWBITS_ISA {

static inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) {  // subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return as_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

static inline uint16_t float_to_half(float value) {
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity, or is it
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float number_at(const void* data, int64_t index, Number number) {
  if (number == Number::f32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return number == Number::f16 ? half_to_float(bits) : as_float(static_cast<uint32_t>(bits) << 16);
}

static inline void put_number(void* data, int64_t index, Number number, float value) {
  if (number == Number::f32) static_cast<float*>(data)[index] = value;
  else static_cast<uint16_t*>(data)[index] = number == Number::f16 ? float_to_half(value) : float_to_bf16(value);
}

// `count` codes of a row from its start, one to a byte; `out` has room for the next multiple of 8.
template <int Bits>
static void unpack_as(const uint8_t* row, int64_t count, uint8_t* out) {
  // Masks of the lower ones of every pair of neighbours: one pair of four codes, two pairs of two, four pairs of one.
  constexpr uint64_t fours = (uint64_t{1} << (4 * Bits)) - 1;
  constexpr uint64_t twos = ((uint64_t{1} << (2 * Bits)) - 1) * 0x0000000100000001;
  constexpr uint64_t ones = ((uint64_t{1} << Bits) - 1) * 0x0001000100010001;
  for (; count > 0; count -= 8, row += Bits, out += 8) {
    uint64_t word = 0;
    if (count * Bits >= 64) std::memcpy(&word, row, 8);  // in one piece, and what is too much is masked
    else if (count >= 8) std::memcpy(&word, row, Bits);
    else std::memcpy(&word, row, static_cast<size_t>((count * Bits + 7) / 8));
    word = (word & fours) | (word << (32 - 4 * Bits) & fours << 32);
    word = (word & twos) | (word << (16 - 2 * Bits) & twos << 16);
    word = (word & ones) | (word << (8 - Bits) & ones << 8);
    std::memcpy(out, &word, 8);
  }
}

// The five codes of every byte to the base of three, one to a byte.
struct Trits {
  uint64_t of[256];
  constexpr Trits() : of{} {
    for (uint64_t byte = 0; byte < 256; ++byte) {
      uint64_t left = byte;
      for (int place = 0; place < 5; ++place, left /= 3) of[byte] |= left % 3 << (8 * place);
    }
  }
};

static void unpack_trits(const uint8_t* row, int64_t count, uint8_t* out) {
  static constexpr Trits trits;
  for (; count >= 8; count -= 5, ++row, out += 5) std::memcpy(out, &trits.of[*row], 8);
  for (; count > 0; count -= 5, ++row, out += 5) std::memcpy(out, &trits.of[*row], count < 5 ? static_cast<size_t>(count) : 5);
}

static void unpack(const uint8_t* row, int bits, int64_t count, uint8_t* out) {
  if (bits == base_three) return unpack_trits(row, count, out);
  switch (bits) {
    case 1: return unpack_as<1>(row, count, out);
    case 2: return unpack_as<2>(row, count, out);
    case 3: return unpack_as<3>(row, count, out);
    case 4: return unpack_as<4>(row, count, out);
    case 5: return unpack_as<5>(row, count, out);
    case 6: return unpack_as<6>(row, count, out);
    case 7: return unpack_as<7>(row, count, out);
    default: return unpack_as<8>(row, count, out);
  }
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
