// Sixteen bytes a vector, and products of signed bytes summed by fours into 32 bits: NEON's dot product instructions.
#pragma once
#include <utility>

namespace fewbits {
namespace FEWBITS_ISA {
namespace fixed {

// How codes of a width come out of memory: `fields` vectors of bytes for a block of columns.
template <int Bits, int Digits>
struct Block {
  static constexpr bool served = true, only_whole = false, cut = 8 % Bits == 0;  // whether whole codes fill bytes
  static constexpr int fields = cut ? 8 / Bits : Bits == 3 ? 2 : 1;
  static constexpr int columns = 16 * fields, bytes = columns * Bits / 8, read_bytes = 16, per_lane = columns / lanes;
  static constexpr int digits = Digits, digit_bytes = 1;
  static constexpr int longest = 16;  // blocks whose sums of codes times a digit, and times 256, stay in 32 bits
  static constexpr int rows = 4, rows_of_tile = Bits == 8 ? 1 : 2;
};

// The column of a block whose code is in byte `place` of a field: its lane's columns go round the fields, or fill one after the other.
template <int Bits>
constexpr int column_of(int field, int place) {
  using Shape = Block<Bits, 3>;
  const int first = place / 4 * Shape::per_lane, inside = place % 4;
  return first + (Shape::cut ? inside * Shape::fields + field : 4 * field + inside);
}

template <int Bits, int Digits>
static inline void deal(const uint8_t* bytes, int64_t stride, uint8_t* to) {
  for (int f = 0; f < Block<Bits, Digits>::fields; ++f) for (int i = 0; i < 16; ++i) to[f * stride + i] = bytes[column_of<Bits>(f, i)];
}

// Where codes that straddle bytes are: of eight of a field's, the two bytes that each is in, and how far it is shifted there.
struct Straddling {
  uint8_t order[16];
  int16_t shift[8];
};

template <int Bits>
constexpr Straddling find_straddling(int field, int first) {
  Straddling found{};
  for (int i = 0; i < 8; ++i) {
    const int bit = column_of<Bits>(field, first + i) * Bits;
    found.order[2 * i] = static_cast<uint8_t>(bit / 8);
    found.order[2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);  // past the end where the code is in one byte: nothing of it is taken
    found.shift[i] = static_cast<int16_t>(-(bit % 8));
  }
  return found;
}

template <int Bits, int Field, int First>
static inline uint8x16_t straddling_codes(uint8x16_t all) {
  static constexpr Straddling of = find_straddling<Bits>(Field, First);
  return vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(all, vld1q_u8(of.order))), vld1q_s16(of.shift)));
}

// The codes of a field, one to a byte, signed: of 8 bits they are 128 less.
template <int Bits, int Field>
static inline int8x16_t take_field(uint8x16_t all) {
  const uint8x16_t mask = vdupq_n_u8((1 << Bits) - 1);
  if constexpr (Bits == 8) return vreinterpretq_s8_u8(veorq_u8(all, vdupq_n_u8(128)));
  else if constexpr (8 % Bits != 0) return vreinterpretq_s8_u8(vandq_u8(vuzp1q_u8(straddling_codes<Bits, Field, 0>(all), straddling_codes<Bits, Field, 8>(all)), mask));
  else if constexpr (Field == 0) return vreinterpretq_s8_u8(vandq_u8(all, mask));
  else if constexpr (Bits * (Field + 1) == 8) return vreinterpretq_s8_u8(vshrq_n_u8(all, Bits * Field));
  else return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(all, Bits * Field), mask));
}

// Sums of a run of blocks for each digit; of 8-bit codes also what each vector's digits add up to, times -128.
template <int Bits, int Digits, int Rows, int Vectors>
struct Sums {
  int32x4_t of[Digits][Rows][Vectors], taken[Bits == 8 ? Digits : 1][Vectors];
};

template <int Bits, int Digits, int Rows, int Vectors, int Field>
static inline __attribute__((always_inline)) void add_field(const uint8x16_t* all, const int8_t* inputs, Sums<Bits, Digits, Rows, Vectors>& sums) {
  int8x16_t code[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) code[r] = take_field<Bits, Field>(all[r]);
#pragma GCC unroll 8
  for (int digit = 0; digit < Digits; ++digit) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int8x16_t input = vld1q_s8(inputs + ((digit * Block<Bits, Digits>::fields + Field) * Vectors + v) * 16);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sums.of[digit][r][v] = vdotq_s32(sums.of[digit][r][v], code[r], input);
      if constexpr (Bits == 8) sums.taken[digit][v] = vdotq_s32(sums.taken[digit][v], vdupq_n_s8(-128), input);
    }
  }
}

template <int Bits, int Digits, int Rows, int Vectors, int... Field>
static inline __attribute__((always_inline)) void add_block(const uint8x16_t* all, const int8_t* inputs, Sums<Bits, Digits, Rows, Vectors>& sums,
                                                            std::integer_sequence<int, Field...>) {
  (add_field<Bits, Digits, Rows, Vectors, Field>(all, inputs, sums), ...);
}

// Sums of `count` blocks, lane by lane, in units of the inputs; `digits` lie [block, digit, field, vector, 16].
template <int Bits, int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void multiply_blocks(const uint8_t* const* codes, const uint8_t* digits, int64_t count, int64_t ahead,
                                                                  Floats (*found)[Vectors]) {
  using Shape = Block<Bits, Digits>;
  Sums<Bits, Digits, Rows, Vectors> sums{};
  const int8_t* inputs = reinterpret_cast<const int8_t*>(digits);
  for (int64_t block = 0; block < count; ++block, inputs += Shape::columns * Digits * Vectors) {
    uint8x16_t all[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      all[r] = vld1q_u8(codes[r] + block * Shape::bytes);
      if (Vectors == 1) __builtin_prefetch(codes[r] + block * Shape::bytes + ahead, 0, 2);
    }
    add_block<Bits, Digits, Rows, Vectors>(all, inputs, sums, std::make_integer_sequence<int, Shape::fields>{});
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const auto total = [&](int digit) { return Bits == 8 ? vsubq_s32(sums.of[digit][r][v], sums.taken[Bits == 8 ? digit : 0][v]) : sums.of[digit][r][v]; };
      int32x4_t high = total(0);
      if constexpr (Digits >= 2) high = vaddq_s32(vshlq_n_s32(high, 8), total(1));
      found[r][v] = vcvtq_f32_s32(high);
      if constexpr (Digits == 3) found[r][v] = multiply_add(found[r][v], spread(256.0f), vcvtq_f32_s32(total(2)));
    }
  }
}

}  // namespace fixed
}  // namespace FEWBITS_ISA
}  // namespace fewbits
