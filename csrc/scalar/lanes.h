// Four lanes of 32 bits in the compiler's own vectors: what every processor that it targets can do.
#pragma once
#include "../numbers.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int lanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));

static inline Floats zeros() { return Floats{}; }

static inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

static inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
static inline Floats spread(float value) { return Floats{value, value, value, value}; }
static inline Floats add(Floats a, Floats b) { return a + b; }
static inline Floats multiply(Floats a, Floats b) { return a * b; }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
static inline float sum(Floats value);
static inline void sum_four(Floats a, Floats b, Floats c, Floats d, float* to) { to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d); }
static inline float sum(Floats value) { return (value[0] + value[2]) + (value[1] + value[3]); }

// Lanes change their signs where a bit of `minus` is set: the highest of the four lowest for the first lane.
static inline Floats flip(Floats value, uint32_t minus) {
  const Words all = {minus << 28, minus << 29, minus << 30, minus << 31};
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) ^ (all & 0x80000000u));
}

// Lane i takes from[pick[i]], 0 <= pick[i] < 4.
static inline Floats permute(const float* from, const int32_t* pick) {
  return Floats{from[pick[0]], from[pick[1]], from[pick[2]], from[pick[3]]};
}

static inline void halves_to_floats(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
}

// Packed codes of a row as numbers; `bytes` has room for them, one to a byte.
static inline void codes_to_floats(const uint8_t* from, int bits, int64_t count, float* to, uint8_t* bytes) {
  unpack(from, bits, count, bytes);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(bytes[i]);
}

// The codes of a lane's columns from bit 0 of its word on. Reads 4 bytes from each lane's first byte.
template <int Bits>
static inline Words words(const uint8_t* from) {
  constexpr int width = Bits * (Bits <= 4 ? 8 : 4);  // bits that a lane takes
  uint32_t value[lanes];
  for (int i = 0; i < lanes; ++i) std::memcpy(&value[i], from + i * width / 8, 4);
  const Words all = {value[0], value[1], value[2], value[3]};
  if constexpr (width % 8 != 0) return all >> Words{0, 4, 0, 4};
  return all;
}

// The code of a lane's column `Index` as a number, times 2**(Bits * Index) but for the last column.
template <int Bits, int Index>
static inline Floats field(Words word) {
  constexpr int last = Bits <= 4 ? 7 : 3;
  constexpr uint32_t mask = (uint32_t{1} << Bits) - 1;
  const Words code = Index < last ? word & (mask << (Index < last ? Bits * Index : 0)) : (word >> (Bits * Index)) & mask;
  return __builtin_convertvector(reinterpret_cast<Integers>(code), Floats);
}

// Levels, as often as fill the lanes.
template <int Bits>
struct Book {
  const float* levels;
};

template <int Bits>
static inline Book<Bits> load_book(const float* levels) {
  return {levels};
}

template <int Bits, int Index>
static inline Floats look_up(Words word, const Book<Bits>& book) {
  const Words code = (word >> (Bits * Index)) & ((1u << Bits) - 1);
  return Floats{book.levels[code[0]], book.levels[code[1]], book.levels[code[2]], book.levels[code[3]]};
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
